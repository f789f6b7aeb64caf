"""Streams as both clients give them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from kpmd.client.net import run
from kpmd.client.operation import TwoFaced

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """Where a stream comes from."""

    @property
    def seq(self) -> str | None:
        """Where to take up again."""

    async def open(self) -> None:
        """Connect, once."""

    async def next(self) -> T_co:
        """The next; raises StopAsyncIteration at the end."""

    def close(self) -> None:
        """Listen no more."""


class _Stream:
    def __init__(self, lines: Source[Any]) -> None:
        self._lines = lines

    @property
    def seq(self) -> str | None:
        """Of events, where to take up again.

        It is the ``seq`` of the event given last, at first what ``since`` was.
        """
        return self._lines.seq

    def close(self) -> None:
        """Listen no more, and close the connection.

        An iteration that waits, in another thread or task, comes to its end.
        """
        self._lines.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class Stream(_Stream, Iterator[T]):
    """What the daemon goes on sending: an iterator, and a context manager that closes it.

    It listens when it is made. It may be closed by another thread.
    """

    def __init__(self, lines: Source[T]) -> None:
        super().__init__(lines)
        run(lines.open())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __next__(self) -> T:
        try:
            found: T = run(self._lines.next())
        except StopAsyncIteration:
            raise StopIteration from None
        return found


class AsyncStream(_Stream, AsyncIterator[T]):
    """What the daemon goes on sending: an asynchronous iterator, and context manager.

    It listens from the ``async with`` on, else from the first step of the iteration.
    """

    def __init__(self, lines: Source[T]) -> None:
        super().__init__(lines)

    async def __aenter__(self) -> Self:
        await self._lines.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __anext__(self) -> T:
        found: T = await self._lines.next()
        return found


class streaming(TwoFaced[P, Stream[T], AsyncStream[T]]):  # noqa: N801 - a decorator
    """A call that gives a stream."""

    def __init__(self, function: Callable[Concatenate[Any, P], Source[T]]) -> None:
        def sync(self: Any, *args: P.args, **kwargs: P.kwargs) -> Stream[T]:
            return Stream(function(self, *args, **kwargs))

        def asynchronous(self: Any, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T]:
            return AsyncStream(function(self, *args, **kwargs))

        super().__init__(function, sync, asynchronous, ("Stream", "AsyncStream"))
