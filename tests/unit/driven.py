"""``AsyncClient``, driven one call at a time, so that a test can be of both clients."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import uvloop

from kpmd.client.aio import AsyncClient
from kpmd.client.client import Client

#: What makes a client, by what it runs on. ``Any``: Driven has the methods of Client.
Make = Callable[..., Any]


class Driven:
    """An ``AsyncClient`` with an event loop of its own, and the methods of ``Client``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *args: Any, **more: Any) -> None:
        self._loop = loop
        try:
            self._client = AsyncClient(*args, **more)
        except BaseException:
            loop.close()
            raise

    def __enter__(self) -> Driven:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._loop.run_until_complete(self._client.close())
        finally:
            self._loop.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **more: Any) -> Any:
            found = method(*args, **more)
            if inspect.iscoroutine(found):
                return self._loop.run_until_complete(found)
            if hasattr(found, "seq"):  # a stream listens when it is made
                self._loop.run_until_complete(found.__aenter__())
            return _Driven(self._loop, found)

        return call


class _Driven:
    """An asynchronous iterator, or context manager, as one that blocks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, one: Any) -> None:
        self._loop = loop
        self._one = one

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return self._loop.run_until_complete(self._next())
        except StopAsyncIteration:
            raise StopIteration from None

    async def _next(self) -> Any:
        return await self._one.__anext__()

    def __enter__(self) -> Any:
        made = self._loop.run_until_complete(self._one.__aenter__())
        return self if made is self._one else made

    def __exit__(self, *error: Any) -> Any:
        return self._loop.run_until_complete(self._one.__aexit__(*error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._one, name)


#: All that a client can run on.
MAKES: dict[str, Make] = {
    "sync": Client,
    "asyncio": lambda *args, **more: Driven(asyncio.new_event_loop(), *args, **more),
    "uvloop": lambda *args, **more: Driven(uvloop.new_event_loop(), *args, **more),
}
