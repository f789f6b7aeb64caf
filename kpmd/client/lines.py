"""A stream of lines of JSON that the daemon goes on sending, over a connection of its own."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

from kpmd.client.connection import Connection
from kpmd.client.errors import ConnectionFailed, ProtocolError

#: Bytes of a line that are read at the most.
MAX_LINE = 1 << 20

#: Bytes asked for at once.
_PIECE = 1 << 16

T = TypeVar("T")
S = TypeVar("S", bound="Lines[Any]")


class Lines(Iterator[T], Generic[T]):
    """What each line says, as it comes.

    It is connected when it is made. Use it as a context manager, or ``close`` it. ``close`` may be
    called from another thread: an iteration that waits then comes to its end.
    """

    #: What a line is, for errors, and what to do where they are cut off.
    what: ClassVar[str]
    advice: ClassVar[str]

    _closed = True

    def __init__(self, connection: Connection, target: str) -> None:
        self._connection = connection
        self._socket, self._response = connection.stream(target, "application/x-ndjson")
        self._lines: collections.deque[bytes] = collections.deque()
        self._rest = b""
        self._closed = False

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Listen no more, and close the connection."""
        if self._closed:
            return
        self._closed = True
        # Another thread may be reading: that wakes it up.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._connection.close()

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        try:
            line = self._line()
            found = None if line is None else self.parse(line)
        except Exception:
            if self._closed:  # by another thread
                raise StopIteration from None
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        if found is None:
            self.close()
            raise StopIteration
        return found

    def parse(self, line: dict[str, Any]) -> T:
        """What a line says. Raises ProtocolError."""
        raise NotImplementedError

    def _line(self) -> dict[str, Any] | None:
        """The next line; None at the end of the stream."""
        while True:
            while self._lines:
                line = self._lines.popleft()
                if line.strip():
                    return self._decode(line)
            if not self._read():
                return None

    def _decode(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the daemon sent {self.what} that is no JSON") from error
        if not isinstance(found, dict):
            raise ProtocolError(f"the daemon sent {self.what} that is no JSON object")
        return found

    def _read(self) -> bool:
        """Wait for more of the stream. False where the daemon has ended it."""
        try:
            piece = self._response.read1(_PIECE)
        except http.client.LineTooLong as error:
            raise ProtocolError("the stream is no HTTP") from error
        except (http.client.HTTPException, OSError) as error:
            raise self._lost() from error
        if not piece:
            # Without chunks an end cannot be told from a cut.
            if self._rest or not self._response.chunked:
                raise self._lost()
            return False
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._lines.extend(lines)
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"{self.what} is over the {MAX_LINE} bytes that are read")
        return True

    def _lost(self) -> ConnectionFailed:
        return ConnectionFailed(
            f"the daemon at {self._connection.path} closed the connection in the middle of the "
            f"stream: it was not read as fast as it came, or the daemon failed (journalctl -u kpmd "
            f"may say why); {self.advice}",
            "lost",
        )
