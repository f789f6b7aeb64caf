"""What has happened, for those who listen: in order, and for a while back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kpmd.core.changes import Event
from kpmd.core.model import Client, Link, Program
from kpmd.core.times import rfc3339
from kpmd.errors import Gone, Invalid
from kpmd.log import Log

log = Log("kpmd.journal")

#: Events kept of each user, and of all together for administrators.
HISTORY = 4096

#: Events that a listener may be behind. Less than are kept: who is cut off can go on where it was,
#: though what was on its way to it is lost with the connection.
MOST_BEHIND = 2048

#: Seconds that a listener has to take what came in one burst.
GRACE = 0.25


@dataclass(frozen=True, slots=True)
class Entry:
    """An event as it is sent: ``id`` to resume behind it, and its line of JSON."""

    id: str
    line: bytes


class _Scope:
    """The events that one kind of listener sees: a user's own, or all."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        #: The number of the event that comes next.
        self.next = 1
        self.wake = asyncio.Event()
        self.listeners: set[Listener] = set()
        self.trimming = False

    def trim(self) -> None:
        """Forget what is too long ago, and cut off who is too far behind."""
        self.trimming = False
        while len(self.entries) > HISTORY:
            self.entries.popleft()
        behind = self.next - MOST_BEHIND
        for listener in [each for each in self.listeners if each.place < behind]:
            listener.lose()

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept."""
        return self.next - len(self.entries)


class Journal:
    """Every user's events are numbered by themselves: numbers tell nothing of other users, and a
    user who makes many pushes none of the others' out.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        #: In the ids, so that those of an earlier daemon are told apart.
        self._boot = secrets.token_hex(4)
        self._scopes: dict[int | None, _Scope] = {}
        self._closed = False
        #: Listeners that were cut off because they were too far behind.
        self.cut = 0

    @property
    def listeners(self) -> int:
        """How many listen."""
        return sum(len(scope.listeners) for scope in self._scopes.values())

    def _scope(self, uid: int | None) -> _Scope:
        if uid not in self._scopes:
            self._scopes[uid] = _Scope()
        return self._scopes[uid]

    def add(self, event: Event) -> None:
        """Keep an event, and wake who listens."""
        record = event.record
        fields: dict[str, object] = {
            "time": rfc3339(self._now()),
            "what": event.what,
            "event": event.event,
            "id": record.id,
            "uid": record.uid,
        }
        if event.reason is not None:
            fields["reason"] = event.reason
        if isinstance(record, Link):
            fields |= {"program": record.program, "kind": record.kind, "count": record.count}
        if isinstance(record, Program):
            fields["name"] = record.name
        if isinstance(record, Client):
            fields |= {"pid": record.pid, "command": record.command}
        else:
            fields["client"] = record.client
        rest = json.dumps(fields)[1:]
        for scope in (self._scope(None), self._scope(record.uid)):
            id_ = f"{self._boot}-{scope.next}"
            scope.entries.append(Entry(id_, f'{{"seq": "{id_}", {rest}'.encode()))
            scope.next += 1
            scope.wake.set()
            if not scope.trimming and (scope.listeners or len(scope.entries) > HISTORY):
                # Not now: of what a client's death brings about in one go nobody can have read.
                scope.trimming = True
                asyncio.get_running_loop().call_later(GRACE, scope.trim)

    def listen(self, uid: int | None, since: str | None) -> Listener:
        """Listen to a user's events, or to all (None), from now on or behind the event ``since``.

        Raises Invalid, and Gone where events behind ``since`` are not kept any more.
        """
        scope = self._scope(uid)
        return Listener(self, scope, scope.next if since is None else self._place(scope, since))

    def _place(self, scope: _Scope, since: str) -> int:
        boot, dash, number = since.partition("-")
        if not dash or not number.isascii() or not number.isdecimal() or len(number) > 18:
            raise Invalid.at(["since"], "is not the seq of an event")
        place = int(number) + 1
        if boot != self._boot or place < scope.first or place > scope.next:
            raise Gone(
                "events since then are not kept any more; list what there is now, and listen anew"
            )
        return place

    def close(self) -> None:
        """Let all listeners come to their end, with what has happened up to now."""
        self._closed = True
        for scope in self._scopes.values():
            scope.wake.set()

    @property
    def closed(self) -> bool:
        """Whether nothing will come any more."""
        return self._closed


class Listener:
    """A place in a scope's events."""

    def __init__(self, journal: Journal, scope: _Scope, place: int) -> None:
        self._journal = journal
        self._scope = scope
        self._closed = False
        #: The number of the event that it gets next.
        self.place = place
        #: Called when it is too far behind.
        self.on_lost: Callable[[], None] = lambda: None
        scope.listeners.add(self)

    def ready(self) -> list[Entry]:
        """The events since the last call; none once it is closed."""
        scope = self._scope
        if self._closed:
            return []
        found = list(itertools.islice(scope.entries, self.place - scope.first, None))
        self.place = scope.next
        return found

    async def wait(self, seconds: float) -> bool:
        """Wait for events, at most that long. False when there will be none any more."""
        scope = self._scope
        if self.place == scope.next and self._goes_on():
            scope.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await scope.wake.wait()
        return not self._closed and (self.place < scope.next or self._goes_on())

    def _goes_on(self) -> bool:
        return not self._closed and not self._journal.closed

    def lose(self) -> None:
        """It is too far behind."""
        log.info("listener too slow", events=self._scope.next - self.place)
        self._journal.cut += 1
        self.close()
        self.on_lost()

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        self._scope.listeners.discard(self)
        self._scope.wake.set()
