"""What happens, as the daemon tells it."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import cast
from urllib.parse import urlencode

from kpmd.client.answers import Event
from kpmd.client.connection import Connection
from kpmd.client.errors import ConnectionFailed, ProtocolError

#: Bytes of an event that are read at the most.
MAX_LINE = 1 << 20

#: Bytes asked for at once.
_PIECE = 1 << 16


class Events(Iterator[Event]):
    """The events, as they happen, over a connection of its own; see ``Client.events``.

    It is connected and listens when it is made: nothing that happens after that is missed. Use it
    as a context manager, or ``close`` it. ``close`` may be called from another thread: an iteration
    that waits for an event then comes to its end.
    """

    _closed = True

    def __init__(self, connection: Connection, since: str | None) -> None:
        #: Where to take up again: the ``seq`` of the event given last, at first what ``since`` was.
        self.seq = since
        query = "" if since is None else "?" + urlencode({"since": since})
        self._connection = connection
        self._socket, self._response = connection.stream(f"/events{query}", "application/x-ndjson")
        self._lines: collections.deque[bytes] = collections.deque()
        self._rest = b""
        self._closed = False

    def __enter__(self) -> Events:
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

    def __next__(self) -> Event:
        if self._closed:
            raise StopIteration
        try:
            event = self._event()
        except Exception:
            if self._closed:  # by another thread
                raise StopIteration from None
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        if event is None:
            self.close()
            raise StopIteration
        self.seq = event["seq"]
        return event

    def _event(self) -> Event | None:
        """The next event; None at the end of the stream."""
        while True:
            while self._lines:
                line = self._lines.popleft()
                if line.strip():
                    return _parse(line)
            if not self._read():
                return None

    def _read(self) -> bool:
        """Wait for more of the stream. False where the daemon has ended it."""
        try:
            piece = self._response.read1(_PIECE)
        except http.client.LineTooLong as error:
            raise ProtocolError("the stream of events is no HTTP") from error
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
            raise ProtocolError(f"an event is over the {MAX_LINE} bytes that are read")
        return True

    def _lost(self) -> ConnectionFailed:
        return ConnectionFailed(
            f"the daemon at {self._connection.path} closed the connection in the middle of the "
            "events: they were not read as fast as they came, or the daemon failed (journalctl -u "
            "kpmd may say why); listen anew, and list what there is now",
            "lost",
        )


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the daemon sent an event that is no JSON") from error
    if not isinstance(event, dict) or not isinstance(event.get("seq"), str):
        raise ProtocolError("the daemon sent an event without its seq")
    return cast(Event, event)
