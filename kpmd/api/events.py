"""The stream of what happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable

from kpmd.api.answers import EventAnswer
from kpmd.api.bodies import EventsQuery
from kpmd.api.route import Call, Reply, Route
from kpmd.log import Log
from kpmd.runtime.journal import Entry, Listener

log = Log("kpmd.events")

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"

#: Seconds without an event after which a server-sent-events stream gets a comment: proxies and
#: browsers take silence for a dead connection.
_SILENCE = 15.0


class EventStream:
    """A listener's events as one of the two content types."""

    def __init__(self, listener: Listener, content_type: str) -> None:
        self._listener = listener
        self.content_type = content_type

    async def begin(self, abort: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """The events in batches. Who falls too far behind is cut off: never skipped in silence."""
        self._listener.on_lost = abort
        sse = self.content_type == SSE
        while await self._listener.wait(_SILENCE):
            entries = self._listener.ready()
            if entries:
                yield _as_sse(entries) if sse else _as_ndjson(entries)
            elif sse:
                yield b":\n\n"

    def close(self) -> None:
        """Nobody listens any more."""
        self._listener.close()


def _as_ndjson(entries: Iterable[Entry]) -> bytes:
    return b"".join(each.line + b"\n" for each in entries)


def _as_sse(entries: Iterable[Entry]) -> bytes:
    return b"".join(b"id: %b\ndata: %b\n\n" % (each.id.encode(), each.line) for each in entries)


async def events(call: Call) -> Reply:
    """GET /events"""
    query: EventsQuery = call.query
    accepted = call.headers.get("Accept", "")
    since = call.headers.get("Last-Event-ID") if query.since is None else query.since
    listener = call.state.journal.listen(
        None if call.caller.reads_others else call.caller.uid, since
    )
    return Reply(EventStream(listener, SSE if SSE in accepted.lower() else NDJSON))


ROUTES = [
    Route(
        "GET",
        "/events",
        events,
        "What is created, what ends and why, as it happens: yours, or all for administrators",
        EventAnswer,
        query=EventsQuery,
        streams=(NDJSON, SSE),
        right="events",
        errors=("gone",),
    ),
]
