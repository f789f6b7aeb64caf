"""Sockets, and waiting for them: the one part of the library that is blocking or asynchronous.

All else is written once, as coroutines over a ``Net``. With ``Blocking`` these never wait for an
event loop: ``run`` takes them from their start to their end. ``kpmd.client.aio`` has the ``Net``
for asyncio.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

#: Bytes that are received at once.
_PIECE = 1 << 16

#: Seconds of sleep between two looks at whether it is still wanted.
_MOMENT = 0.1

#: Room for one file descriptor beside them.
_ONE_FD = socket.CMSG_LEN(4)

T = TypeVar("T")


class Net(Protocol):
    """Everything that waits."""

    async def connect(self, sock: socket.socket, path: str, seconds: float | None) -> None:
        """Connect a Unix socket, which does not block from then on. Raises OSError, ValueError."""

    async def wait(self, sock: socket.socket, to_send: bool, seconds: float | None) -> None:
        """Wait until ``sock`` takes more, or has something to read. Raises TimeoutError."""

    async def sleep(self, seconds: float) -> None:
        """Wait for some time."""

    def turns(self, number: int) -> AbstractAsyncContextManager[Any]:
        """Something that ``number`` of tasks can be in at a time, and others wait for."""


class Blocking:
    """``Net`` for who runs alone in a thread."""

    async def connect(self, sock: socket.socket, path: str, seconds: float | None) -> None:
        """Connect. Where the daemon is busy the kernel waits for it, as long as it takes."""
        sock.connect(path)
        sock.setblocking(False)

    async def wait(self, sock: socket.socket, to_send: bool, seconds: float | None) -> None:
        """Wait in poll(2)."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT if to_send else select.POLLIN)
        if not poll.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)  # noqa: ASYNC251 - no event loop is there

    def turns(self, number: int) -> AbstractAsyncContextManager[Any]:
        """Nobody else is there."""
        return contextlib.nullcontext()


def run(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine over ``Blocking`` returns."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    finally:
        work.close()
    raise RuntimeError("a blocking call waited for an event loop")


class Transport:
    """A connected socket, owned. ``timeout`` is in seconds, for each wait; None: without end.

    ``close`` may be called while another task, or thread, waits in ``receive``, which then comes to
    its end.
    """

    def __init__(self, net: Net, sock: socket.socket, timeout: float | None) -> None:
        self._net = net
        self._sock = sock
        self._waiting = self._closed = False
        self.timeout = timeout

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError (TimeoutError)."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                await self._wait(to_send=True)

    async def receive(self, fds: list[int] | None = None) -> bytes:
        """What comes next; nothing at the end. Raises OSError (TimeoutError).

        File descriptors that come beside it are put into ``fds``, and are the caller's; without it
        the kernel closes them.
        """
        while True:
            try:
                if fds is None:
                    return self._sock.recv(_PIECE)
                # Python's own recv_fds does not pass flags on.
                data, beside, _, _ = self._sock.recvmsg(_PIECE, _ONE_FD, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await self._wait(to_send=False)
            else:
                for level, kind, content in beside:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        fds += memoryview(content).cast("i").tolist()
                return data

    def pending(self) -> bool:
        """Whether there is something to read now, the end of the connection say."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close it."""
        self._closed = True
        # Who waits wakes up from that, and closes: the number is not given away under their feet.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._shut()

    async def _wait(self, *, to_send: bool) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the connection is closed")
        self._waiting = True
        try:
            await self._net.wait(self._sock, to_send, self.timeout)
        finally:
            self._waiting = False
            self._shut()

    def _shut(self) -> None:
        if self._closed and not self._waiting:
            self._sock.close()


async def nap(net: Net, seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleep, no longer than until a moment after ``stopped`` says so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stopped():
        await net.sleep(min(left, _MOMENT))


class Patience:
    """Trying again, later each time, for ``seconds`` from the first failure on."""

    _FIRST = 0.1
    _LONGEST = 2.0

    def __init__(self, net: Net, seconds: float) -> None:
        self._net = net
        self._seconds = seconds
        self._end: float | None = None
        self._delay = self._FIRST

    async def wait(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Wait before the next try. False, at once, where there is no time left for one.

        It ends soon after ``stopped`` says so.
        """
        now = time.monotonic()
        if self._end is None:
            self._end = now + self._seconds
        left = self._end - now
        if left <= 0:
            return False
        await nap(self._net, min(self._delay, left), stopped)
        self._delay = min(2 * self._delay, self._LONGEST)
        return True
