"""An answer with a file descriptor beside it, which aiohttp and its transports cannot send."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from kpmd.api import connection
from kpmd.api.connection import HttpConnection
from kpmd.bpf.fd import OwnedFd
from kpmd.log import Log

log = Log("kpmd.api")


class FdAnswer(web.Response):
    """aiohttp makes its head, and takes it for one that needs no more sending."""

    async def send(self, http: HttpConnection, request: web.BaseRequest, fd: OwnedFd) -> None:
        """Send it, with a copy of ``fd``; where the client has gone away, nothing.

        Raises Closed where ``fd`` is, and OSError where the kernel does not pass it on: nothing is
        sent then.
        """
        if not request.content.is_eof():
            self.force_close()
        await self.prepare(request)
        version = request.version
        head = (
            f"HTTP/{version.major}.{version.minor} {self.status} {self.reason}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        )
        content = self.body if isinstance(self.body, bytes) else b""
        try:
            await _send(http, "\r\n".join((*head, "", "")).encode() + content, fd)
        except ConnectionError:
            log.debug("answer cut", path=request.path)

    async def write_eof(self, data: bytes = b"") -> None:
        """It is sent already."""


async def _send(http: HttpConnection, data: bytes, fd: OwnedFd) -> None:
    """Send ``data`` behind all that is under way, and a copy of ``fd`` beside its first byte.

    Raises ConnectionError where the client is gone or does not read, Closed, and OSError.
    """
    await http.all_sent()
    transport = http.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client is gone")
    with little_room(transport.get_extra_info("socket").fileno()) as sock:
        sent = 0
        while not sent:
            if transport.is_closing():
                raise ConnectionResetError("the client is gone, or does not read")
            try:
                with fd.borrow() as number:
                    sent = send_now(sock, data, number)
            except BlockingIOError:
                await _wait_for_room(http, sock)
    if sent < len(data):
        transport.write(data[sent:])


async def _wait_for_room(http: HttpConnection, sock: socket.socket) -> None:
    """Wait until a copy of the connection's socket takes more, or the connection is lost."""
    loop = asyncio.get_running_loop()
    room = http.room = asyncio.Event()
    # The loop lets nobody watch what it watches itself, but a copy.
    loop.add_writer(sock, room.set)
    try:
        async with asyncio.timeout(connection.STALL_SECONDS):
            await room.wait()
    except TimeoutError:
        http.force_close()
    finally:
        loop.remove_writer(sock)
        http.room = None


@contextmanager
def little_room(number: int) -> Iterator[socket.socket]:
    """A copy of the socket ``number`` that takes few answers as long as none is read.

    Of file descriptors that wait to be received the daemon can have as many as it may have open,
    and no more (unix(7), ETOOMANYREFS): clients that do not read shall not use that up.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(number)) as sock:
        size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        # The least that there is (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        try:
            yield sock
        finally:
            # The kernel doubles what it is told.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 2)


def send_now(sock: socket.socket, data: bytes, fd: int) -> int:
    """Send what there is room for, with ``fd`` beside its first byte (SCM_RIGHTS, unix(7)).

    Returns how many bytes were sent, one at the least. Raises BlockingIOError where there is no
    room, and OSError.
    """
    return socket.send_fds(sock, [data], [fd], socket.MSG_DONTWAIT)
