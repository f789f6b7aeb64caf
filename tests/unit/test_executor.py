"""Blocking work in the pool: nothing that it made is ever lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from kpmd.runtime.executor import Executor, Lane

pytestmark = pytest.mark.every_loop


class Work:
    """Something that blocks until it is let go, and tells what became of it."""

    def __init__(self, fails: bool = False) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.undone: list[str] = []
        self._fails = fails

    def __call__(self) -> str:
        self.entered.set()
        assert self.go_on.wait(20)
        if self._fails:
            raise OSError("no")
        return "made"

    def undo(self, made: str) -> None:
        self.undone.append(made)

    async def running(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    executor = Executor()
    yield executor
    await executor.drain()


async def test_results_and_errors_come_back(executor: Executor) -> None:
    def fail() -> None:
        raise OSError("no")

    def undo(made: object) -> None:
        pytest.fail("nothing was to be undone")

    assert await executor.run(pow, 2, 5, undo=undo) == 32
    with pytest.raises(OSError, match="no"):
        await executor.run(fail, undo=undo)


async def test_the_loop_goes_on_meanwhile(executor: Executor) -> None:
    work = Work()
    task = asyncio.create_task(executor.run(work))
    await work.running()
    assert not task.done()
    work.go_on.set()
    assert await task == "made"


async def test_what_a_cancelled_caller_would_have_got_is_undone(executor: Executor) -> None:
    work = Work()
    task = asyncio.create_task(executor.run(work, undo=work.undo))
    await work.running()
    task.cancel()
    await asyncio.wait([task], timeout=0.05)
    assert not task.done(), "it must not end before its work has"
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.undone == ["made"]


async def test_cancelling_twice_changes_nothing(executor: Executor) -> None:
    work = Work()
    task = asyncio.create_task(executor.run(work, undo=work.undo))
    await work.running()
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.undone == ["made"]


async def test_cancelling_while_it_is_undone(executor: Executor) -> None:
    work, undoing = Work(), Work()
    task = asyncio.create_task(executor.run(work, undo=lambda made: undoing()))
    await work.running()
    task.cancel()
    work.go_on.set()
    await undoing.running()
    task.cancel()
    await asyncio.wait([task], timeout=0.05)
    assert not task.done()
    undoing.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_fails_after_the_cancel_has_nothing_to_undo(executor: Executor) -> None:
    work = Work(fails=True)
    task = asyncio.create_task(executor.run(work, undo=work.undo))
    await work.running()
    task.cancel()
    await asyncio.sleep(0)
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.undone == []


async def test_work_that_waits_in_the_queue_when_cancelled_loses_nothing(
    executor: Executor,
) -> None:
    """Whether it still ran or not: what it made is undone."""
    blockers = [Work() for _ in range(64)]
    blocking = [asyncio.create_task(executor.run(work)) for work in blockers]
    await blockers[0].running()
    made: list[str] = []
    undone: list[str] = []

    def make() -> str:
        made.append("made")
        return "made"

    task = asyncio.create_task(executor.run(make, undo=undone.append))
    await asyncio.sleep(0)
    task.cancel()
    for work in blockers:
        work.go_on.set()
    await asyncio.gather(*blocking)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made == undone


async def test_a_cancelled_request_is_undone_even_while_the_pool_is_drained() -> None:
    executor = Executor()
    work = Work()
    task = asyncio.create_task(executor.run(work, undo=work.undo))
    await work.running()
    task.cancel()
    draining = asyncio.create_task(executor.drain())
    await asyncio.wait([draining], timeout=0.05)
    assert not draining.done()
    work.go_on.set()
    await draining
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.undone == ["made"]


def test_work_waits_for_the_first_thread_where_there_can_be_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of processes (EAGAIN): nothing that was given to a pool is forgotten."""

    async def run() -> None:
        executor = Executor()
        with monkeypatch.context() as patched:

            def no_more(thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patched.setattr(threading.Thread, "start", no_more)
            assert await asyncio.gather(
                *(executor.run(lambda each=each: each, lane=Lane.CLOSE) for each in range(20))
            ) == list(range(20))
        await executor.drain()

    asyncio.run(run())
