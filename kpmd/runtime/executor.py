"""Blocking work off the event loop, in bounded pools, without ever losing what it made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar

from kpmd.log import Log

T = TypeVar("T")

log = Log("kpmd.executor")


class Lane(Enum):
    """Kinds of work, each with threads of its own: what is slow never holds up what is quick."""

    QUICK = "reads of what is there: microseconds to milliseconds"
    LOAD = "program loads: up to the loader's limit, 10 s by default"
    ATTACH = "links, and finding their targets: up to seconds for tens of thousands of functions"
    CLOSE = "closing that a request waits for"
    CLOSE_LATER = "closing that nobody waits for"


#: More threads would only queue behind the kernel's locks. It takes links apart one after the other
#: (50 to 135 ms each on 6.12), and a client can die with hundreds: one thread does for these.
_THREADS = {
    Lane.QUICK: 4,
    Lane.LOAD: 8,
    Lane.ATTACH: 8,
    Lane.CLOSE: 2,
    Lane.CLOSE_LATER: 1,
}


class Executor:
    """A pool of threads for each lane."""

    def __init__(self) -> None:
        self._pools = {
            lane: ThreadPoolExecutor(threads, thread_name_prefix=f"kpmd-{lane.name.lower()}")
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

    def close_later(self, closing: Callable[[], object]) -> asyncio.Future[object]:
        """Run ``closing`` behind all other closing; the future is done when it is."""
        future = asyncio.wrap_future(self._pools[Lane.CLOSE_LATER].submit(closing))
        future.add_done_callback(_tell_failure)
        return future

    async def drain(self) -> None:
        """Wait for everything under way, undoing included, and end the threads."""
        while self._running:
            self._idle.clear()
            await self._idle.wait()
        for pool in self._pools.values():
            await asyncio.to_thread(pool.shutdown, True)


def _tell_failure(future: asyncio.Future[object]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("closing failed", error)


async def _end_of(future: asyncio.Future[Any]) -> None:
    """Wait for the end of ``future``, through any number of cancellations."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
