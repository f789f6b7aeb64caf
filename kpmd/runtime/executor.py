"""Blocking work off the event loop, in bounded pools that users share fairly.

Nothing that the work made is ever lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from kpmd.core.quotas import exceeded
from kpmd.runtime import spans
from kpmd.runtime.turns import Crowd, Turns

T = TypeVar("T")


class Lane(Enum):
    """Kinds of work, each with threads of its own: what is slow never holds up what is quick."""

    QUICK = "reads of what is there: microseconds to milliseconds"
    PARSE = (
        "what takes the interpreter for itself: large bodies, searches; up to a tenth of a second"
    )
    LOAD = "program loads: up to the loader's limit, 10 s by default"
    ATTACH = "links, and finding their targets: up to seconds for tens of thousands of functions"
    CLOSE = "closing; in which order is kpmd.runtime.closing's matter"


_THREADS = {
    Lane.QUICK: 4,
    Lane.PARSE: 2,
    Lane.LOAD: 8,
    Lane.ATTACH: 8,
    Lane.CLOSE: 4,
}

#: Pieces of one user's work that wait in one lane at the most. Requests in flight are bounded
#: before: this one holds for administrators too.
MOST_WAITING = 1024


#: For how long users of a lane who take turns are taken to go on with that.
_CROWDED_SECONDS = 2.0


class _Threads(ThreadPoolExecutor):
    """A pool that has its first thread from the start: what is given to it is always done.

    Where the machine has no thread left for a second one, work waits for the first.
    """

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.submit(int)

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            # The work is in the queue already: an error now would make the caller forget it.
            if not self._threads:
                raise


@dataclass(frozen=True)
class Use:
    """What a lane's threads are, and do: so many, busy, and pieces of work that wait for one."""

    threads: int
    busy: int
    waiting: int


@dataclass(eq=False)
class _Job:
    """A piece of work. ``given``: what the pool knows it as, once its turn has come."""

    uid: int | None
    work: Callable[[], Any]
    done: asyncio.Future[Any]
    given: Future[Any] | None = None


class _Queue:
    """The work of one lane: users take turns at its threads, and none has more than half of them.

    Where there were several users lately, each has one: what they do they do side by side, in the
    kernel and in the interpreter, so that threads are shares. Who has nothing running comes first.
    So whoever floods a lane, alone or with others, keeps nobody waiting for longer than one piece
    of work takes. Work without a user is the daemon's own: it takes its turn too, and may have all
    threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.pool = _Threads(threads, name)
        self._threads = self._free = threads
        self._most = max(1, threads // 2)
        self._crowd = Crowd()
        self._running: dict[int | None, int] = {}
        self._waiting: Turns[int | None, _Job] = Turns()

    def add(self, uid: int | None, work: Callable[[], Any]) -> _Job:
        """Give work to the pool, now or when its turn comes. Raises Quota."""
        loop = asyncio.get_running_loop()
        job = _Job(uid, work, loop.create_future())
        if uid is not None:
            self._crowd.came(uid)
        # Who waits while a thread is free has their share already.
        if self._free and self._may_begin(uid):
            self._begin(job)
        elif uid is not None and (waiting := self._waiting.count(uid)) >= MOST_WAITING:
            raise exceeded("requests", waiting, MOST_WAITING)
        else:
            self._waiting.push(uid, job)
        return job

    @property
    def use(self) -> Use:
        """How much there is to do."""
        return Use(self._threads, self._threads - self._free, len(self._waiting))

    def drop(self, job: _Job) -> bool:
        """Take work away that has not begun; False where it has."""
        return self._waiting.remove(job.uid, job) or (job.given is not None and job.given.cancel())

    def _may_begin(self, uid: int | None) -> bool:
        if uid is None:
            return True
        most = 1 if self._crowd.within(_CROWDED_SECONDS) else self._most
        return self._running.get(uid, 0) < most

    def _begin(self, job: _Job) -> None:
        loop = asyncio.get_running_loop()
        job.given = self.pool.submit(job.work)
        self._free -= 1
        self._running[job.uid] = self._running.get(job.uid, 0) + 1
        job.given.add_done_callback(lambda given: loop.call_soon_threadsafe(self._end, job, given))

    def _end(self, job: _Job, given: Future[Any]) -> None:
        self._free += 1
        # Those first who have nothing running; who has just had a thread is not of them.
        following = self._waiting.pop(lambda uid: uid not in self._running)
        running = self._running.pop(job.uid) - 1
        if running:
            self._running[job.uid] = running
        if following is not None:
            self._begin(following)
        while self._free and (following := self._waiting.pop(self._may_begin)) is not None:
            self._begin(following)
        if given.cancelled():
            job.done.cancel()
        elif (error := given.exception()) is not None:
            job.done.set_exception(error)
        else:
            job.done.set_result(given.result())
        job.given = None  # the two refer to each other


class Executor:
    """A pool of threads for each lane."""

    def __init__(self) -> None:
        self._queues = {
            lane: _Queue(threads, f"kpmd-{lane.name.lower()}") for lane, threads in _THREADS.items()
        }
        self._running = 0
        self._idle = asyncio.Event()

    def use(self) -> dict[Lane, Use]:
        """How much each lane has to do."""
        return {lane: queue.use for lane, queue in self._queues.items()}

    async def run(
        self,
        work: Callable[..., T],
        *args: Any,
        lane: Lane = Lane.QUICK,
        undo: Callable[[T], object] | None = None,
        uid: int | None = None,
    ) -> T:
        """Run ``work(*args)`` in the lane's pool, for the user ``uid`` or for the daemon itself.

        A caller that is cancelled meanwhile is so only once the work has ended and ``undo`` got
        what it returned: nothing that the kernel gave is lost, nothing is closed under the work.
        A user's work that has not begun by then never does; the daemon's own is always done.
        Raises Quota where too much of the user's work is waiting.
        """
        queue = self._queues[lane]
        self._running += 1
        try:
            job = queue.add(uid, spans.pooled(lane.name.lower(), work, *args))
            try:
                result: T = await asyncio.shield(job.done)
                return result
            except asyncio.CancelledError:
                if uid is not None and queue.drop(job):
                    raise
                await _end_of(job.done)
                if undo is not None and job.done.exception() is None:
                    await _end_of(queue.add(None, partial(undo, job.done.result())).done)
                raise
            finally:
                del job  # an error that it ended with would keep it, and all that it worked on
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def drain(self) -> None:
        """Wait for everything under way, undoing included, and end the threads."""
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        for queue in self._queues.values():
            await asyncio.to_thread(queue.pool.shutdown, True)


async def _end_of(future: asyncio.Future[Any]) -> None:
    """Wait for the end of ``future``, through any number of cancellations."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
