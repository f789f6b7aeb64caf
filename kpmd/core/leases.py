"""Leases and when they end: which are due, and which have ended already."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from kpmd.core.model import Caller, Lease, Reason
from kpmd.core.shelf import Shelf
from kpmd.errors import Gone, NotFound

#: How many ended leases of each user are remembered, so that their holders hear ``gone``.
REMEMBERED = 256

_WHY: dict[Reason, str] = {
    "lease-expired": "was not renewed in time",
    "lease-ended": "has been ended",
    "client-released": "ended when all that its client held was released",
    "shutdown": "ended with the daemon",
}


class Leases:
    """All leases. Times are those of one monotonic clock, in seconds; the caller has the clock."""

    def __init__(self) -> None:
        self.shelf: Shelf[Lease] = Shelf(lambda lease: [("uid", lease.uid)])
        #: (deadline, id); a renewal pushes another, and what is out of date is dropped when met.
        self._deadlines: list[tuple[float, str]] = []
        self._ended: dict[int, deque[tuple[str, Reason]]] = {}

    def __iter__(self) -> Iterator[Lease]:
        return iter(self.shelf)

    def __len__(self) -> int:
        return len(self.shelf)

    def add(self, lease: Lease) -> None:
        """List a lease."""
        self.shelf.add(lease)
        self._push(lease)

    def _push(self, lease: Lease) -> None:
        # A lease that is renewed all the time must not fill the memory.
        if len(self._deadlines) > 2 * len(self.shelf) + 64:
            self._deadlines = [(each.deadline, each.id) for each in self.shelf]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (lease.deadline, lease.id))

    def get(self, caller: Caller, id_: str, now: float) -> Lease:
        """The lease of that id. Raises Gone when it has ended, NotFound also for another user's."""
        lease = self.shelf.get(id_)
        if lease is not None and (caller.reads_others or caller.uid == lease.uid):
            if now >= lease.deadline:
                raise _gone(id_, "lease-expired")
            return lease
        for uid, ended in self._ended.items():
            if caller.reads_others or caller.uid == uid:
                for each, reason in ended:
                    if each == id_:
                        raise _gone(id_, reason)
        raise NotFound(f"there is no lease {id_!r} that you may see; list yours with GET /leases")

    def renew(self, lease: Lease, ttl: float, now: float) -> None:
        """Let it live for ``ttl`` seconds from now on."""
        lease.ttl = ttl
        lease.deadline = now + ttl
        self._push(lease)

    def end(self, id_: str, reason: Reason) -> Lease | None:
        """Take a lease away and remember that it was there; None when it is not."""
        lease = self.shelf.remove(id_)
        if lease is not None:
            ended = self._ended.setdefault(lease.uid, deque(maxlen=REMEMBERED))
            ended.append((id_, reason))
        return lease

    def next_deadline(self) -> float | None:
        """When the next one ends; None when there is none."""
        while self._deadlines:
            deadline, id_ = self._deadlines[0]
            lease = self.shelf.get(id_)
            if lease is not None and lease.deadline == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def due(self, now: float) -> list[str]:
        """The ids of those whose time is over; they are still there."""
        found = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            found.append(heapq.heappop(self._deadlines)[1])
        return found


def _gone(id_: str, reason: Reason) -> Gone:
    why = _WHY.get(reason, "has ended")
    return Gone(f"lease {id_} {why}, and all that was bound to it; make a new one")
