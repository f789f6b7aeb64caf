"""A stream of lines of JSON that the daemon goes on sending, over a connection of its own."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from kpmd.client.connection import Connection, Cut, Request
from kpmd.client.errors import (
    ApiError,
    ClientError,
    ConnectionFailed,
    NotFound,
    ProtocolError,
    ShuttingDown,
)
from kpmd.client.net import Patience, nap
from kpmd.client.way import Way

#: Bytes of a line that are read at the most.
MAX_LINE = 1 << 20

#: Seconds for which a stream that connects again looks for the daemon, at the least: a restart, or
#: an upgrade of its machine's packages, takes some.
LEAST_PATIENCE = 30.0

#: Seconds before it connects again where the last connection brought nothing.
_PAUSE = 1.0

_TYPE = "application/x-ndjson"

#: What is told of a place where something may be missing.
OnGap = Callable[[str], object]

T = TypeVar("T")


class Lines(Generic[T]):
    """What each line says, as it comes.

    With ``on_gap`` it connects again where the connection ends, for ``patience`` seconds and 30 at
    the least, and says where something may be missing.
    """

    #: What a line is, for errors, and what to do where they are cut off.
    what: ClassVar[str]
    advice: ClassVar[str]

    #: Where to take up again, of events.
    seq: str | None = None

    def __init__(self, way: Way, patience: float, on_gap: OnGap | None) -> None:
        self._way = way
        self._patience = patience
        self._on_gap = on_gap
        self._connection = Connection(way)
        self._lines: collections.deque[bytes] = collections.deque()
        self._rest = b""
        self._opened = self._closed = False
        #: Whether nothing has come since it connected again.
        self._silent = False

    def target(self) -> str:
        """What is asked for now: path and query."""
        raise NotImplementedError

    def parse(self, line: dict[str, Any]) -> T:
        """What a line says. Raises ProtocolError."""
        raise NotImplementedError

    async def reopen(self) -> str | None:
        """Connect once more. Returns what may be missing now, if anything. Raises as ``open``."""
        raise NotImplementedError

    def close(self) -> None:
        """Listen no more; an iteration that waits comes to its end."""
        self._closed = True
        self._connection.close()

    async def open(self) -> None:
        """Connect, once. Raises ClientError."""
        if self._opened or self._closed:
            return None
        self._opened = True
        patience = Patience(self._way.net, self._patience)
        try:
            while True:
                try:
                    return await self.connect()
                except ClientError as error:
                    # Nothing but a question is sent, so that any of it can be asked again.
                    if not _passes(error) or not await patience.wait():
                        raise
        except BaseException:
            self.close()
            raise

    async def connect(self) -> None:
        """Ask for the stream. Raises ApiError, ConnectionFailed, ProtocolError."""
        self._lines.clear()
        self._rest = b""
        try:
            refused = await self._connection.stream(
                Request("GET", self.target(), accept=_TYPE), _TYPE
            )
        except Cut as cut:
            when = "in the middle of its answer" if cut.heard else "without an answer"
            raise self._way.lost(when) from None
        if refused is not None:
            self._connection.close()
            raise refusal(self._way, *refused)

    async def next(self) -> T:
        """The next; raises StopAsyncIteration at the end, and ClientError."""
        try:
            await self.open()
            while not self._closed:
                try:
                    line = await self._line()
                    if line is not None:
                        self._silent = False
                        return self.parse(line)
                    if self._on_gap is None:
                        break
                except ConnectionFailed:
                    if self._on_gap is None:
                        raise
                if not await self._again(self._on_gap):
                    break
        except Exception:
            if not self._closed:  # by another thread or task, else
                self.close()
                raise
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopAsyncIteration

    async def _again(self, on_gap: OnGap) -> bool:
        """Connect again. False where there is nothing to connect to any more."""
        self._connection.close()
        if self._silent:  # else it would be made and cut again as fast as that goes
            await nap(self._way.net, _PAUSE, self._is_closed)
        patience = Patience(self._way.net, max(self._patience, LEAST_PATIENCE))
        while not self._closed:
            try:
                gap = await self.reopen()
            except NotFound:
                return False
            except ClientError as error:
                if not _passes(error) or not await patience.wait(self._is_closed):
                    raise
            else:
                self._silent = True
                if gap is not None:
                    on_gap(gap)
                return True
        return False

    def _is_closed(self) -> bool:
        return self._closed

    async def _line(self) -> dict[str, Any] | None:
        """The next line; None at the end of the stream."""
        while True:
            while self._lines:
                line = self._lines.popleft()
                if line.strip():
                    return self._decode(line)
            if not await self._read():
                return None

    def _decode(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the daemon sent {self.what} that is no JSON") from error
        if not isinstance(found, dict):
            raise ProtocolError(f"the daemon sent {self.what} that is no JSON object")
        return found

    async def _read(self) -> bool:
        """Wait for more of the stream. False where the daemon has ended it."""
        try:
            piece = await self._connection.piece()
        except Cut:
            raise self._lost() from None
        if piece is None:
            if self._rest:
                raise self._lost()
            return False
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._lines.extend(lines)
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"{self.what} is over the {MAX_LINE} bytes that are read")
        return True

    def _lost(self) -> ConnectionFailed:
        return ConnectionFailed(
            f"the daemon at {self._way.name} closed the connection in the middle of the "
            f"stream: it was not read as fast as it came, or the daemon failed (journalctl -u kpmd "
            f"may say why); {self.advice}{self._way.aside()}",
            "lost",
        )


def _passes(error: ClientError) -> bool:
    """Whether it may be otherwise in a moment: the daemon is restarted, say."""
    if isinstance(error, ConnectionFailed):
        return error.reason in ("missing", "refused", "lost", "timeout", "ssh")
    return isinstance(error, ShuttingDown)


def refusal(way: Way, status: int, content: bytes) -> ApiError | ProtocolError:
    """The error that an answer without success stands for."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return way.not_kpmd(f"HTTP status {status}, and no JSON")
    if not isinstance(found, dict) or 200 <= status < 300:
        return way.not_kpmd(f"HTTP status {status}, and no problem document")
    return ApiError.from_problem(status, found)
