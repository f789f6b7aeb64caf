"""``AsyncClient``: the calls of the API as coroutines, on asyncio's event loop or uvloop's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

from kpmd.client.client import AllCalls
from kpmd.client.operation import Async

#: Seconds between two tries to connect to a daemon with too many that wait already.
_BUSY = 0.01

T = TypeVar("T")

#: Tasks that were cancelled and go on for what they have sent; they wait for nothing else any more.
_hurried: set[asyncio.Task[Any]] = set()
#: Tasks that wait for time to pass.
_asleep: set[asyncio.Task[Any]] = set()


class AsyncioNet:
    """``Net`` for asyncio. It watches the sockets itself: no loop's transport passes on FDs."""

    async def connect(self, sock: socket.socket, path: str, seconds: float | None) -> None:
        """Connect."""
        sock.setblocking(False)
        async with asyncio.timeout(seconds):
            while True:
                try:
                    sock.connect(path)
                except BlockingIOError:
                    # unix(7): there is no waiting for room among those that wait.
                    await self.sleep(_BUSY)
                else:
                    return

    async def wait(self, sock: socket.socket, to_send: bool, seconds: float | None) -> None:
        """Wait for the event loop to see it."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        number = sock.fileno()
        if to_send:
            loop.add_writer(number, ready.set)
        else:
            loop.add_reader(number, ready.set)
        try:
            async with asyncio.timeout(seconds):
                await ready.wait()
        finally:
            if to_send:
                loop.remove_writer(number)
            else:
                loop.remove_reader(number)

    async def sleep(self, seconds: float) -> None:
        """Sleep, unless the task was cancelled already."""
        task = asyncio.current_task()
        if task is None or task in _hurried:
            raise asyncio.CancelledError
        _asleep.add(task)
        try:
            await asyncio.sleep(seconds)
        finally:
            _asleep.discard(task)

    def turns(self, number: int) -> AbstractAsyncContextManager[Any]:
        """A semaphore."""
        return asyncio.Semaphore(number)


class AsyncClient(AllCalls, Async):
    """A client of the daemon whose calls are coroutines; all else is as for ``Client``.

    Use it as an asynchronous context manager, or ``await`` its ``close``. Several tasks of one
    event loop may use it at once: it makes up to eight connections for calls, one for each that is
    under way, and further ones wait. What has the lifetime ``"connection"`` has one of its own.

    A call that is cancelled closes its connection, and no other. The daemon does not stop for that:
    a link that was being attached with the lifetime ``"process"`` may be there, until it is
    detached or this process ends. ``attached``, ``loaded_builtin``, ``loaded_object`` and
    ``leased`` leave nothing behind: cancelled, they wait for the daemon's answer (``timeout``
    bounds that), and end what was made. The end of their blocks is not cut short either. With the
    lifetime ``"connection"`` a cancelled call leaves nothing, as the daemon ends it then; but
    neither do the others that were made with it stay.
    """

    _make_net = AsyncioNet

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @staticmethod
    async def _finish(work: Coroutine[Any, Any, T]) -> tuple[T, BaseException | None]:
        """Bring ``work`` to its end, whoever cancels it meanwhile; the cancellation, if any.

        Where both fail it is the cancellation that is raised.
        """
        task = asyncio.ensure_future(work)
        cancelled: asyncio.CancelledError | None = None
        try:
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as error:
                    cancelled = error
                    _hurried.add(task)
                    if task in _asleep:  # nothing is under way
                        task.cancel()
        finally:
            _hurried.discard(task)
        if cancelled is not None and (task.cancelled() or task.exception() is not None):
            raise cancelled
        return task.result(), cancelled
