"""Blocking work off the event loop, in bounded pools, without ever losing what it made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


class Lane(Enum):
    """Kinds of work, each with threads of its own: what is slow never holds up what is quick."""

    QUICK = "reads of what is there: microseconds to milliseconds"
    LOAD = "program loads: up to the loader's limit, 10 s by default"
    ATTACH = "links, and finding their targets: up to seconds for tens of thousands of functions"
    CLOSE = "closing; in which order is kpmd.runtime.closing's matter"


_THREADS = {
    Lane.QUICK: 4,
    Lane.LOAD: 8,
    Lane.ATTACH: 8,
    Lane.CLOSE: 4,
}


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


class Executor:
    """A pool of threads for each lane."""

    def __init__(self) -> None:
        self._pools = {
            lane: _Threads(threads, f"kpmd-{lane.name.lower()}")
            for lane, threads in _THREADS.items()
        }
        self._running = 0
        self._idle = asyncio.Event()

    async def run(
        self,
        work: Callable[..., T],
        *args: Any,
        lane: Lane = Lane.QUICK,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Run ``work(*args)`` in the lane's pool.

        A caller that is cancelled meanwhile is so only once the work has ended and ``undo`` got
        what it returned: nothing that the kernel gave is lost, nothing is closed under the work.
        """
        self._running += 1
        pool = self._pools[lane]
        try:
            future = asyncio.wrap_future(pool.submit(work, *args))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                await _end_of(future)
                if undo is not None and future.exception() is None:
                    await _end_of(asyncio.wrap_future(pool.submit(undo, future.result())))
                raise
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def drain(self) -> None:
        """Wait for everything under way, undoing included, and end the threads."""
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        for pool in self._pools.values():
            await asyncio.to_thread(pool.shutdown, True)


async def _end_of(future: asyncio.Future[Any]) -> None:
    """Wait for the end of ``future``, through any number of cancellations."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
