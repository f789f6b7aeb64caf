"""A listener to a stream that sees how it ends, which HTTP libraries hide."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from multidict import CIMultiDict

from tests.http.contract import NDJSON, Answer, check, events


class Cut(Exception):
    """The stream ended without the end of its body."""


class Stream:
    """An answer to GET /events, or the like, as it comes; all of it is checked against the
    contract.
    """

    def __init__(
        self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer
        self._left = b""
        self._ready: deque[Any] = deque()
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()

    async def _begin(self) -> None:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
        self.status = int(head[0].split()[1])
        pairs = (line.partition(":") for line in head[1:] if line)
        self.headers = CIMultiDict({name: value.strip() for name, _, value in pairs})
        self._check(b"")

    @property
    def content_type(self) -> str:
        return self.headers["Content-Type"].partition(";")[0]

    def _check(self, body: bytes) -> None:
        check("GET", self._path, Answer(self.status, self.headers, body))

    async def _chunk(self) -> bytes:
        """The next part of the body, b"" at its end. Raises Cut."""
        if "Content-Length" in self.headers:
            raise AssertionError("a stream has no length")
        try:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return await self._reader.read(1 << 16)
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            return (await self._reader.readexactly(size + 2))[:-2]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Cut from error

    async def _more(self) -> bool:
        data = await self._chunk()
        if not data:
            assert not self._left, "it ends in the middle of an event"
            return False
        end = b"\n" if self.content_type == NDJSON else b"\n\n"
        whole, found, self._left = (self._left + data).rpartition(end)
        self._check(whole + found)
        self._ready += events(self.content_type, whole + found)
        return True

    async def next(self) -> Any:
        """The next event. Raises Cut, and EOFError where the stream came to its end."""
        async with asyncio.timeout(10):
            while not self._ready:
                if not await self._more():
                    raise EOFError
        return self._ready.popleft()

    async def octets(self, length: int) -> bytes:
        """The next ``length`` bytes of a stream that has no lines. Raises Cut, EOFError."""
        async with asyncio.timeout(10):
            while len(self._left) < length:
                data = await self._chunk()
                if not data:
                    raise EOFError
                self._left += data
        found, self._left = self._left[:length], self._left[length:]
        return found

    async def until(self, event: str, id_: str) -> list[Any]:
        """All events up to this one of the thing of that id."""
        found = []
        while True:
            found.append(await self.next())
            if (found[-1]["event"], found[-1]["id"]) == (event, id_):
                return found

    async def rest(self) -> list[Any]:
        """All events up to the end of the stream. Raises Cut where that is not a clean one."""
        found = []
        try:
            while True:
                found.append(await self.next())
        except EOFError:
            return found

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


@asynccontextmanager
async def listening(
    where: Path | socket.socket,
    query: str = "",
    headers: Mapping[str, str] | None = None,
    version: str = "1.1",
    path: str = "/events",
) -> AsyncIterator[Stream]:
    """Listen, on the daemon's socket or a connection to it; the headers have come by then."""
    if isinstance(where, Path):
        reader, writer = await asyncio.open_unix_connection(str(where))
    else:
        where.setblocking(False)  # noqa: ASYNC240 - it is no path
        reader, writer = await asyncio.open_unix_connection(sock=where)
    path += query
    lines = [f"GET {path} HTTP/{version}", "Host: x"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode())
        stream = Stream(path, reader, writer)
        async with asyncio.timeout(10):
            await stream._begin()
        yield stream
    finally:
        writer.close()


def told(found: list[Any], *whats: str) -> list[tuple[str, str, str | None]]:
    """What happened to what, and why; of these kinds of things, or of all."""
    return [
        (each["what"], each["event"], each.get("reason"))
        for each in found
        if not whats or each["what"] in whats
    ]
