"""What keeps one user from taking the daemon away from the others: shares of its loop and log."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from kpmd.core.model import Caller
from kpmd.core.quotas import exceeded
from kpmd.errors import Quota
from kpmd.log import Log
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.quotas import Counters
from kpmd.runtime.turns import Crowd, Turns

log = Log("kpmd.api")

T = TypeVar("T")

#: Users of which something is remembered that has no more meaning, at the most.
_REMEMBERED = 1024

#: Bodies from this size on count for what a user's bodies may hold, and are read in the pool.
LARGE_BODY = 64 << 10

#: How many bodies of the size that a user may send are held at once, for each user.
_BODIES = 2

#: How many requests are let in at a time of a user who has been alone for a second.
_ALONE = 8

#: How long a user's next large body waits, in times of what reading the last one took.
_REST = 128.0

#: A user's requests that wait for their turn at the most. Connections are bounded before: these are
#: those that were closed meanwhile.
_MOST_WAITING = 1024

#: Lines about one user's refused requests: so many at once, then so many in a second.
_LINES, _LINES_PER_SECOND = 100, 10.0

#: Seconds, and how many of them may go into reading what one user sends, where there are others.
_READ_WINDOW, _READ_SHARE = 0.05, 0.01

#: For how long users who send something are taken to go on with that.
_CROWDED_SECONDS = 1.0

#: In the place of the uid of those who cannot be told apart.
UNKNOWN = -1

#: Seconds until it is told how many were not logged.
_TELL_SECONDS = 10.0


class Turnstile:
    """Lets in one request of each user in each round of the event loop, and a few of one alone.

    So a user with a hundred busy connections keeps others waiting for about one request, not for a
    hundred. Who is alone, and has but a few requests at a time, never waits.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: Turns[int, tuple[int, asyncio.Future[None]]] = Turns()
        #: Whose requests were let in this round, and how many.
        self._passed: dict[int, int] = {}
        self._turning = False
        self._queued = False
        self._crowd = Crowd()

    def admit(self, uid: int) -> bool:
        """Whether it is this user's turn already; if not, wait for it with ``enter``."""
        self._crowd.came(uid)
        if not self._may_pass(uid):
            return False
        self._pass(uid)
        return True

    async def enter(self, uid: int) -> None:
        """Return when it is this user's turn. Raises Quota where too many wait for that."""
        if self.admit(uid):
            return
        waiting = self._waiting.count(uid)
        if waiting >= _MOST_WAITING:
            raise exceeded("requests", waiting, _MOST_WAITING)
        future: asyncio.Future[None] = self._loop.create_future()
        item = uid, future
        self._waiting.push(uid, item)
        self._queued = True
        try:
            await future
        finally:
            self._waiting.remove(uid, item)

    @property
    def crowded(self) -> bool:
        """Whether several users have been here in the last second."""
        return self._crowd.within(_CROWDED_SECONDS)

    def _may_pass(self, uid: int) -> bool:
        passed = self._passed.get(uid, 0)
        return passed == 0 or (passed < _ALONE and not self.crowded)

    def _pass(self, uid: int) -> None:
        self._passed[uid] = self._passed.get(uid, 0) + 1
        if not self._turning:
            self._turning = True
            # It runs in the next round: after what has come meanwhile was read.
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._passed.clear()
        if not self._queued:
            return
        while (item := self._waiting.pop(self._may_pass)) is not None:
            uid, future = item
            if not future.done():
                future.set_result(None)
                self._pass(uid)
        self._queued = bool(self._waiting)


class Reader(Protocol):
    """A connection, of which the reading can be held."""

    def hold_reading(self) -> None:
        """Read no more, until ``release_reading``."""

    def release_reading(self) -> None:
        """Go on reading."""


class ReadShares:
    """How much of the loop's time goes into reading what each user sends.

    Where several users send something, who has used up the share of a while is not read until the
    next one: a hundred connections that dribble bytes cost as much as one.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, set[Reader]] = {}
        self._spent: dict[int, float] = {}
        self._held: set[Reader] = set()
        self._turning = False
        self._crowd = Crowd()

    @contextmanager
    def connection(self, uid: int, reader: Reader) -> Iterator[None]:
        """Know a user's connection as long as the block lasts."""
        self._open.setdefault(uid, set()).add(reader)
        try:
            yield
        finally:
            readers = self._open[uid]
            readers.discard(reader)
            self._held.discard(reader)
            if not readers:
                del self._open[uid]

    def took(self, uid: int, seconds: float) -> None:
        """What a user sent was read, which took so long."""
        self._crowd.came(uid)
        if not self._crowd.within(_CROWDED_SECONDS):
            return
        if not self._turning:
            self._turning = True
            self._loop.call_later(_READ_WINDOW, self._turn)
        before = self._spent.get(uid, 0.0)
        self._spent[uid] = before + seconds
        if before <= _READ_SHARE < before + seconds:
            for reader in self._open.get(uid, ()):
                reader.hold_reading()
                self._held.add(reader)

    def _turn(self) -> None:
        self._turning = False
        self._spent.clear()
        held, self._held = self._held, set()
        for reader in held:
            reader.release_reading()


@dataclass
class _Bucket:
    """How many lines a user has left, as of when; and how many were left out."""

    left: float
    at: float
    dropped: int = 0


class LineBudget:
    """How many lines each user may have written: nobody fills the log, or has others' dropped.

    journald counts by service: what one user makes kpmd write too much, it drops of all.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[int, _Bucket] = {}

    def take(self, uid: int) -> bool:
        """Whether one more line may be written for this user; if not, it is counted, and told."""
        now = self._clock()
        if len(self._buckets) > _REMEMBERED:
            self._forget(now)
        bucket = self._buckets.setdefault(uid, _Bucket(_LINES, now))
        bucket.left = min(_LINES, bucket.left + (now - bucket.at) * _LINES_PER_SECOND)
        bucket.at = now
        if bucket.left >= 1:
            bucket.left -= 1
            return True
        if not bucket.dropped:
            asyncio.get_running_loop().call_later(_TELL_SECONDS, self._tell, uid)
        bucket.dropped += 1
        return False

    def _tell(self, uid: int) -> None:
        bucket = self._buckets[uid]
        dropped, bucket.dropped = bucket.dropped, 0
        log.warning("refused requests not logged", uid=uid, number=dropped)

    def _forget(self, now: float) -> None:
        full = _LINES / _LINES_PER_SECOND
        self._buckets = {
            uid: each for uid, each in self._buckets.items() if each.dropped or now - each.at < full
        }


@dataclass
class _Share:
    """Of one user: one large body is parsed at a time, and the next one not before ``rested``."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    rested: float = 0.0


class Guard:
    """What all connections and requests of the daemon share."""

    def __init__(self, counters: Counters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self.turnstile = Turnstile()
        self.lines = LineBudget(clock)
        self.reading = ReadShares()
        self._connections = 0
        self._bodies: dict[int, int] = {}
        self._shares: dict[int, _Share] = {}
        # A connection needs an FD, and its process another: half of them are left for the rest.
        self._most_connections = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4

    @contextmanager
    def connection(self, caller: Caller) -> Iterator[None]:
        """Count a connection as long as the block lasts. Raises Quota. Administrators get in."""
        with self._counters.hold(caller.uid, "connections", caller.limits.connections):
            if not caller.admin and self._connections >= self._most_connections:
                raise Quota(
                    f"the daemon has {self._connections} connections, and takes no more: "
                    "try again later",
                    limit="connections",
                    used=self._connections,
                    most=self._most_connections,
                )
            self._connections += 1
            try:
                yield
            finally:
                self._connections -= 1

    @contextmanager
    def body(self, caller: Caller, size: int) -> Iterator[None]:
        """Count a large body, and what is made of it, as long as the block lasts. Raises Quota."""
        used = self._bodies.get(caller.uid, 0)
        most = _BODIES * caller.limits.body_bytes
        if used + size > most:
            raise Quota(
                f"your requests in flight have bodies of {used} bytes, of {most} at once: "
                "wait for their answers",
                limit="body_bytes",
                used=used,
                most=most,
                asked=size,
            )
        self._bodies[caller.uid] = used + size
        try:
            yield
        finally:
            left = self._bodies.pop(caller.uid) - size
            if left:
                self._bodies[caller.uid] = left

    async def parse(
        self, executor: Executor, work: Callable[..., T], *args: Any, caller: Caller
    ) -> T:
        """Run ``work(*args)``, which parses a large body, in the pool.

        While it runs no other thread does. So where there are several users, each but
        administrators has only a small part of the time for it.
        """
        if caller.admin:
            return await executor.run(work, *args, lane=Lane.PARSE, uid=caller.uid)
        loop = asyncio.get_running_loop()
        if len(self._shares) > _REMEMBERED:
            self._shares = {
                uid: each
                for uid, each in self._shares.items()
                if each.lock.locked() or each.rested > loop.time()
            }
        share = self._shares.setdefault(caller.uid, _Share())
        async with share.lock:
            if self.turnstile.crowded:
                await asyncio.sleep(share.rested - loop.time())
            begun = loop.time()
            try:
                return await executor.run(work, *args, lane=Lane.PARSE, uid=caller.uid)
            finally:
                ended = loop.time()
                share.rested = ended + _REST * (ended - begun)
