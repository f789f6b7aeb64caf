"""Closes what has ended: in the background, in a fair order, and quickly where somebody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from kpmd.bpf.progress import Progress
from kpmd.core.changes import Ending
from kpmd.core.model import Link, Map, Program, Reason
from kpmd.core.registry import Registry
from kpmd.log import Log
from kpmd.runtime import spans
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.kernel import Handle
from kpmd.runtime.tallies import LONG, Histogram
from kpmd.runtime.turns import Turns
from kpmd.runtime.work import Board, Work

log = Log("kpmd.closing")

#: Seconds: a close that takes less holds up nobody (kernel 7.3), and the longest pause after one.
_QUICK = 0.025
_LONGEST_PAUSE = 0.06


def pause_after(seconds: float) -> float:
    """How long to wait after a close that took so long, where nobody waits for the next one.

    Kernel 6.12 begins a close at the pace of its RCU-tasks grace periods, and lets nobody attach
    while it waits for one: in the gap others get their turn, and all closes together take no longer
    (BENCHMARKS.md, Detaching).
    """
    return 0.0 if seconds < _QUICK else min(seconds, _LONGEST_PAUSE)


@dataclass(eq=False)
class _Job:
    """A link to detach. ``done`` once it is, and what it alone kept is closed."""

    link: Link
    handle: Handle
    work: Work
    done: asyncio.Future[None]
    #: Somebody waits for it, or did when it began.
    awaited: bool


class Closing:
    """The one place where handles are closed whose records have ended.

    The kernel takes links apart one after the other, however many threads ask for it, and each
    takes 50 ms and more (kernel 6.12). So what nobody waits for goes one at a time, and what a
    request waits for overtakes it: it waits for one link at the most, not for the 300 of a client
    that died.
    """

    def __init__(
        self,
        executor: Executor,
        registry: Registry,
        take: Callable[[str], Handle],
        board: Board | None = None,
    ) -> None:
        """``board``: where links that are being taken apart are shown."""
        self._executor = executor
        self._registry = registry
        self._take = take
        self._board = board or Board()
        self._awaited: Turns[int, _Job] = Turns()
        self._unawaited: Turns[int, _Job] = Turns()
        self._jobs: dict[str, _Job] = {}
        #: What the kernel took to detach each link.
        self.seconds = Histogram(LONG)
        self._awaited_runs = False
        self._common_runs = False
        self._stopped = False
        self._pause_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Links that are still attached though they have ended."""
        return len(self._jobs)

    @property
    def oldest(self) -> float | None:
        """Since when the first of them waits, in seconds since the epoch; None: there is none."""
        return next((job.work.since for job in self._jobs.values()), None)

    def later(self, ending: Ending) -> None:
        """Close all of it; nobody waits."""
        self._start(ending, self._unawaited)

    async def now(self, ending: Ending, also: Iterable[str] = ()) -> None:
        """Close all of it before what nobody waits for; returns when the kernel has let go of it.

        ``also``: ids of links that may be in the queue already, to be waited for too.
        """
        ids = [*(link.id for link in ending.links), *also]
        rest = self._start(ending, self._awaited)
        jobs = [job for id_ in ids if (job := self._jobs.get(id_)) is not None]
        for job in jobs:
            if self._unawaited.remove(job.link.uid, job):
                job.awaited = True
                self._awaited.push(job.link.uid, job)
        self._pump()
        waiting: list[asyncio.Future[None]] = [job.done for job in jobs]
        if rest is not None:
            waiting.append(rest)
        if waiting:
            # A waiter that is cancelled must not cancel the others' waiting.
            with spans.phase("detach"):
                await asyncio.wait(waiting)

    def stop(self) -> None:
        """Begin nothing more of what nobody waits for: the FD store has it for the next daemon."""
        self._stopped = True

    async def drain(self) -> None:
        """Wait until everything is closed; once stopped, what has begun or is waited for."""
        while self._tasks or (self._unawaited and not self._stopped):
            await (asyncio.wait(self._tasks) if self._tasks else asyncio.sleep(_LONGEST_PAUSE))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, ending: Ending, queue: Turns[int, _Job]) -> asyncio.Task[None] | None:
        for link in ending.links:
            done = asyncio.get_running_loop().create_future()
            awaited = queue is self._awaited
            handle = self._take(link.id)
            # What is of many parts counts them; the kernel is silent about the others.
            progress = getattr(handle, "detaching", None) or Progress(total=link.count)
            work = self._board.begin_detach(link, progress)
            job = self._jobs[link.id] = _Job(link, handle, work, done, awaited)
            queue.push(link.uid, job)
        self._pump()
        if not ending.programs and not ending.maps:
            return None
        return self._task(self._close_rest(ending))

    def _pump(self) -> None:
        """Let a slot of its own work for those who wait, and another for all."""
        while not self._awaited_runs and (job := self._awaited.pop()):
            self._awaited_runs = True
            self._task(self._detach(job, own_slot=True))
        while not self._common_runs:
            job = self._awaited.pop() or self._next_unawaited()
            if job is None:
                return
            self._common_runs = True
            self._task(self._detach(job, own_slot=False))

    def _next_unawaited(self) -> _Job | None:
        if self._stopped or not self._unawaited:
            return None
        loop = asyncio.get_running_loop()
        if loop.time() < self._pause_until:
            if self._timer is None:
                self._timer = loop.call_at(self._pause_until, self._pause_ended)
            return None
        return self._unawaited.pop()

    def _pause_ended(self) -> None:
        self._timer = None
        self._pause_until = 0.0
        self._pump()

    async def _detach(self, job: _Job, *, own_slot: bool) -> None:
        link = job.link
        job.work.progress.phase = "detaching"
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await self._executor.run(
                _close, [("link", link, link.detaching, job.handle)], lane=Lane.CLOSE
            )
        finally:
            if own_slot:
                self._awaited_runs = False
            else:
                self._common_runs = False
            took = loop.time() - began
            self.seconds.observe(took)
            if not job.awaited:
                self._pause_until = loop.time() + pause_after(took)
            rest = self._registry.detached(link)
            del self._jobs[link.id]
            self._board.end(job.work)
            self._pump()
        try:
            if rest:
                await self._close_rest(rest)
        finally:
            job.done.set_result(None)

    async def _close_rest(self, ending: Ending) -> None:
        """Programs and maps: the kernel lets go of these at once."""
        items: list[_Item] = [
            *(("program", each, each.released, self._take(each.id)) for each in ending.programs),
            *(("map", each, None, self._take(each.id)) for each in ending.maps),
        ]
        await self._executor.run(_close, items, lane=Lane.CLOSE)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # It is nobody's: what has just ended lets the next one's begin.
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_Item = tuple[str, "Link | Program | Map", "Reason | None", Handle]


def _close(items: Iterable[_Item]) -> None:
    for what, record, reason, handle in items:
        try:
            handle.close()
        except Exception as error:
            # The kernel has let go of it all the same: close(2) frees the FD first. Whatever it
            # is, somebody may be waiting for this, and others are behind it.
            log.error("closing failed", error, what=what, id=record.id)
        log.info("ended", what=what, id=record.id, uid=record.uid, reason=reason)
