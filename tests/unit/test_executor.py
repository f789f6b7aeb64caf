"""Blocking work in the pool: nothing that it made is ever lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.errors import Quota
from kpmd.runtime import executor as module
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.turns import Turns

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


class Pieces:
    """Pieces of work that are let go one by one, and tell which of them have begun."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._begun: asyncio.Queue[str] = asyncio.Queue()
        self._gates: dict[str, threading.Event] = {}
        self.running: list[str] = []
        self.tasks: dict[str, asyncio.Task[str]] = {}

    def give(self, uid: int | None, *names: str, lane: Lane = Lane.LOAD) -> None:
        """Have the executor do these for a user, in this order."""
        for name in names:
            self._gates[name] = threading.Event()
            loop = asyncio.get_running_loop()
            work = self._work(name, loop)
            self.tasks[name] = asyncio.create_task(self.executor.run(work, lane=lane, uid=uid))

    def _work(self, name: str, loop: asyncio.AbstractEventLoop) -> Callable[[], str]:
        def work() -> str:
            loop.call_soon_threadsafe(self._begun.put_nowait, name)
            assert self._gates[name].wait(20)
            return name

        return work

    async def begun(self, number: int) -> list[str]:
        """The next so many that begin."""
        found = sorted([await asyncio.wait_for(self._begun.get(), 10) for _ in range(number)])
        self.running += found
        return found

    def let_go(self, name: str) -> None:
        """Let it end."""
        self._gates[name].set()

    async def finish(self, name: str) -> None:
        """Let it end, and wait for it."""
        self.let_go(name)
        assert await self.tasks.pop(name) == name
        self.running.remove(name)

    async def cancel(self, name: str) -> None:
        """Cancel its caller, who ends by that."""
        task = self.tasks.pop(name)
        await asyncio.sleep(0)  # it has asked
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    async def finish_all(self) -> None:
        for name in self._gates:
            self.let_go(name)
        while self.tasks:
            await asyncio.wait([self.tasks.popitem()[1]])


@pytest.fixture
async def pieces(executor: Executor) -> AsyncIterator[Pieces]:
    pieces = Pieces(executor)
    yield pieces
    await pieces.finish_all()


async def test_one_user_has_no_more_than_half_of_the_threads(pieces: Pieces) -> None:
    pieces.give(1, *(f"a{number}" for number in range(20)))
    assert await pieces.begun(4) == ["a0", "a1", "a2", "a3"]
    # Another's work begins at once, and so does the daemon's.
    pieces.give(2, "b0")
    pieces.give(None, "own")
    assert await pieces.begun(2) == ["b0", "own"]


async def test_beside_others_a_user_has_one_thread(pieces: Pieces) -> None:
    pieces.give(1, *(f"a{number}" for number in range(9)))
    pieces.give(2, *(f"b{number}" for number in range(3)))
    assert await pieces.begun(5) == ["a0", "a1", "a2", "a3", "b0"]
    # What had begun goes on; nothing more of the first one's does until there is but one left.
    for ends in ("a0", "a1", "a2"):
        await pieces.finish(ends)
    await pieces.finish("b0")
    assert await pieces.begun(1) == ["b1"]
    await pieces.finish("a3")
    assert await pieces.begun(1) == ["a4"]


async def test_who_is_alone_again_has_half_of_them(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces.give(2, "b0")
    pieces.give(1, *(f"a{number}" for number in range(9)))
    assert await pieces.begun(2) == ["a0", "b0"]
    monkeypatch.setattr(module, "_CROWDED_SECONDS", 0)
    await pieces.finish("a0")
    assert await pieces.begun(4) == ["a1", "a2", "a3", "a4"]


async def test_users_who_flood_take_turns(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CROWDED_SECONDS", 0)
    pieces.give(1, *(f"a{number}" for number in range(9)))
    pieces.give(2, *(f"b{number}" for number in range(9)))
    await pieces.begun(8)
    pieces.give(3, *(f"c{number}" for number in range(9)))
    await asyncio.sleep(0)
    order = []
    for ends in ("a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3", "c0"):
        await pieces.finish(ends)
        order += await pieces.begun(1)
    # The one who had nothing comes first; then each in turn.
    assert order == ["c0", "a4", "b4", "c1", "a5", "b5", "c2", "a6", "b6"]


async def test_who_has_nothing_running_waits_for_one_piece_only(pieces: Pieces) -> None:
    """However many there are who flood."""
    for uid in range(8):
        pieces.give(uid, f"begun-{uid}")
    assert len(await pieces.begun(8)) == 8
    for uid in range(8):
        pieces.give(uid, *(f"flood-{uid}-{number}" for number in range(9)))
    pieces.give(99, "mine")
    await asyncio.sleep(0)
    await pieces.finish(pieces.running[0])
    assert await pieces.begun(1) == ["mine"]


async def test_the_daemon_may_have_all_threads_and_takes_its_turn(pieces: Pieces) -> None:
    pieces.give(None, *(f"own{number}" for number in range(12)))
    assert len(await pieces.begun(8)) == 8
    pieces.give(1, "a0", "a1")
    await asyncio.sleep(0)
    order = []
    for ends in ("own0", "own1", "own2"):
        await pieces.finish(ends)
        order += await pieces.begun(1)
    assert order == ["a0", "own8", "a1"]


@pytest.mark.parametrize("lane", Lane)
async def test_every_lane_has_room_for_two(pieces: Pieces, lane: Lane) -> None:
    pieces.give(1, "a0", "a1", "a2", "a3", "a4", lane=lane)
    pieces.give(2, "b0", lane=lane)
    while "b0" not in pieces.running:
        await pieces.begun(1)
    assert "a4" not in pieces.running


async def test_what_has_not_begun_when_its_caller_is_cancelled_never_does(pieces: Pieces) -> None:
    pieces.give(1, "a0", "a1", "a2", "a3", "dropped", "a5")
    await pieces.begun(4)
    await pieces.cancel("dropped")
    # It has left its place to the next.
    await pieces.finish("a0")
    assert await pieces.begun(1) == ["a5"]


async def test_the_daemons_own_work_is_done_though_its_caller_is_cancelled(pieces: Pieces) -> None:
    """A close that waits for its turn, say: it must not be forgotten."""
    pieces.give(None, *(f"own{number}" for number in range(9)))
    await pieces.begun(8)
    cancelling = asyncio.create_task(pieces.cancel("own8"))
    await asyncio.wait([cancelling], timeout=0.02)
    assert not cancelling.done()
    await pieces.finish("own0")
    assert await pieces.begun(1) == ["own8"]
    pieces.let_go("own8")
    await cancelling


async def test_draining_waits_for_what_waits_for_its_turn(pieces: Pieces) -> None:
    pieces.give(1, *(f"a{number}" for number in range(6)))
    await pieces.begun(4)
    await pieces.cancel("a4")
    draining = asyncio.create_task(pieces.executor.drain())
    await asyncio.wait([draining], timeout=0.02)
    assert not draining.done()
    await pieces.finish("a0")
    assert await pieces.begun(1) == ["a5"]
    await pieces.finish_all()
    await draining


async def test_only_so_much_of_one_user_waits(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    monkeypatch.setattr(module, "_CROWDED_SECONDS", 0)
    pieces.give(1, *(f"a{number}" for number in range(7)))
    await pieces.begun(4)
    run = pieces.executor.run
    with pytest.raises(Quota) as caught:
        await run(int, lane=Lane.LOAD, uid=1)
    assert caught.value.fields == {"limit": "requests", "used": 3, "most": 3}
    # Another lane, another user and the daemon itself have room.
    assert await run(int, lane=Lane.ATTACH, uid=1) == 0
    assert await run(int, lane=Lane.LOAD, uid=2) == 0
    assert await run(int, lane=Lane.LOAD) == 0
    await pieces.finish("a0")
    pieces.give(1, "a7")
    assert await pieces.begun(1) == ["a4"]
    await asyncio.sleep(0)
    assert not pieces.tasks["a7"].done()


async def test_work_is_dropped_that_waits_for_the_first_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its turn has come, but the one thread that there is has not come to it."""
    executor = Executor()
    pieces = Pieces(executor)

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        pieces.give(1, "a0", "a1", "a2")
        assert await pieces.begun(1) == ["a0"]
        await pieces.cancel("a1")
        await pieces.finish("a0")
        assert await pieces.begun(1) == ["a2"]
        await pieces.finish_all()
    await executor.drain()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_an_error_keeps_nothing_alive_that_was_worked_on(executor: Executor) -> None:
    """Bodies are large: they must not wait for the garbage collector."""

    class Body:
        pass

    def fail(body: Body) -> None:
        raise OSError("no")

    async def request() -> weakref.ref[Body]:
        body = Body()
        with contextlib.suppress(OSError):
            await executor.run(fail, body, uid=1)
        return weakref.ref(body)

    with no_garbage_collection():
        body = await request()
        await asyncio.sleep(0)
        # A thread lets go of its last piece of work by the next.
        await asyncio.gather(*(executor.run(int) for _ in range(8)))
        assert body() is None


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(0, 3), st.integers(0, 5)),
        max_size=60,
    )
)
def test_turns(steps: list[tuple[str, int, int]]) -> None:
    """Each user's items come in their order, and nobody gets two turns while another waits."""
    turns: Turns[int, int] = Turns()
    model: dict[int, list[int]] = {user: [] for user in range(4)}
    #: Turns that others had since a user began to wait, or had their last.
    passed: dict[int, list[int]] = {}
    for number, (what, user, barred) in enumerate(steps):
        waiting = {each for each, items in model.items() if items}
        if what == "push":
            turns.push(user, number)
            model[user].append(number)
            passed.setdefault(user, [])
        elif what == "remove":
            item = model[user][-1] if model[user] else -1
            assert turns.remove(user, item) == (item >= 0)
            model[user] = model[user][:-1]
        else:
            popped = turns.pop(lambda each, barred=barred: each != barred)  # type: ignore[misc]
            owner = next((each for each in waiting if popped in model[each]), None)
            if owner is None:
                assert waiting <= {barred}
                continue
            assert owner != barred
            assert popped == model[owner].pop(0)
            for each, others in passed.items():
                if each not in (owner, barred):
                    others.append(owner)
                    assert len(others) == len(set(others))
                elif each == owner or owner in others:
                    others.clear()
        for each in model:
            assert turns.count(each) == len(model[each])
            if not model[each]:
                passed.pop(each, None)
        assert len(turns) == sum(map(len, model.values()))


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
