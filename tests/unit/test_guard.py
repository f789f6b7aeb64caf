"""Turns on the event loop, lines of the log, and bodies: what each user has of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.api.guard import Guard, LineBudget, ReadShares, Turnstile, _Share
from kpmd.core.model import Caller
from kpmd.core.quotas import Limits
from kpmd.errors import Quota
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.quotas import Counters
from tests.http.house import Clock

A, B, C = 1001, 1002, 1003


def crowded() -> Turnstile:
    """A turnstile at which there are several users."""
    turnstile = Turnstile()
    assert turnstile.admit(1)
    assert turnstile.admit(2)
    return turnstile


class Rounds:
    """Requests at a turnstile; ``order`` is that in which they were let in, by rounds."""

    def __init__(self) -> None:
        self.turnstile = crowded()
        self.order: list[int] = []
        self._tasks: list[asyncio.Task[None]] = []

    def come(self, uid: int, number: int = 1) -> None:
        for _ in range(number):
            self._tasks.append(asyncio.create_task(self._request(uid)))

    async def _request(self, uid: int) -> None:
        await self.turnstile.enter(uid)
        self.order.append(uid)

    async def all(self) -> list[int]:
        async with asyncio.timeout(10):
            await asyncio.gather(*self._tasks)
        return self.order


class TestTurnstile:
    async def test_who_is_alone_does_not_wait(self) -> None:
        """Not for one round of the loop: the coroutine ends without having been suspended."""
        turnstile = Turnstile()
        with pytest.raises(StopIteration):
            turnstile.enter(A).send(None)

    async def test_a_second_user_does_not_wait_for_a_flood(self) -> None:
        rounds = Rounds()
        rounds.come(A, 100)
        await asyncio.sleep(0)
        rounds.come(B)
        order = await rounds.all()
        assert order.index(B) <= 2
        assert len(order) == 101

    async def test_users_take_turns(self) -> None:
        rounds = Rounds()
        rounds.come(A, 50)
        rounds.come(B, 3)
        rounds.come(C, 3)
        order = await rounds.all()
        assert sorted(order[:3]) == sorted(order[3:6]) == sorted(order[6:9]) == [A, B, C]
        assert order[9:] == [A] * 47

    async def test_who_is_alone_comes_in_groups(self) -> None:
        turnstile = Turnstile()
        assert [turnstile.admit(A) for _ in range(10)] == [True] * 8 + [False] * 2
        assert turnstile.admit(B)
        await turnstile.enter(A)
        assert not turnstile.admit(A), "there is another one now"

    async def test_one_users_requests_keep_their_order(self) -> None:
        turnstile = crowded()
        order: list[int] = []

        async def request(number: int) -> None:
            await turnstile.enter(A)
            order.append(number)

        await asyncio.gather(*(request(number) for number in range(20)))
        assert order == list(range(20))

    async def test_who_goes_away_is_no_turn(self) -> None:
        turnstile = crowded()
        tasks = [asyncio.create_task(turnstile.enter(A)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in tasks[1:9]:
            task.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [False] + [True] * 8 + [False]
        assert len(turnstile._waiting) == 0

    async def test_too_many_that_wait_are_refused(self) -> None:
        turnstile = Turnstile()
        tasks = [asyncio.create_task(turnstile.enter(A)) for _ in range(1100)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [each for each in results if each is not None]
        assert all(isinstance(each, Quota) for each in refused)
        assert 0 < len(refused) < 100

    @given(st.lists(st.integers(0, 3), max_size=60))
    def test_nobody_is_let_in_twice_while_another_waits(self, uids: list[int]) -> None:
        async def run() -> list[int]:
            rounds = Rounds()
            for uid in uids:
                rounds.come(uid)
            return await rounds.all()

        order = asyncio.run(run())
        assert sorted(order) == sorted(uids)
        left = {uid: uids.count(uid) for uid in uids}
        while order:
            turn = [order.pop(0) for _ in range(sum(count > 0 for count in left.values()))]
            assert len(set(turn)) == len(turn)
            for uid in turn:
                left[uid] -= 1


class TestLineBudget:
    async def test_a_flood_is_counted_and_told(self, caplog: pytest.LogCaptureFixture) -> None:
        clock = Clock()
        lines = LineBudget(clock)
        assert sum(lines.take(A) for _ in range(1000)) == 100
        assert lines.take(B), "another user has lines of their own"
        clock.now += 1
        assert sum(lines.take(A) for _ in range(1000)) == 10
        clock.now += 3600
        assert sum(lines.take(A) for _ in range(1000)) == 100
        with caplog.at_level(logging.WARNING, "kpmd.api"):
            lines._tell(A)
        assert [record.fields for record in caplog.records] == [  # type: ignore[attr-defined]
            {"uid": A, "number": 900 + 990 + 900}
        ]

    async def test_users_are_forgotten(self) -> None:
        clock = Clock()
        lines = LineBudget(clock)
        for uid in range(5000):
            lines.take(uid)
            clock.now += 1
        assert len(lines._buckets) < 1100


def _caller(uid: int, limits: Limits | None = None, *, admin: bool = False) -> Caller:
    return Caller(uid, uid, 1, admin, limits=limits or Limits())


class TestGuard:
    @pytest.fixture
    async def guard(self) -> Guard:
        return Guard(Counters(), Clock())

    async def test_bodies_at_once(self, guard: Guard) -> None:
        a = _caller(A, Limits(body_bytes=1000))
        with guard.body(a, 1000), guard.body(a, 1000):
            with pytest.raises(Quota) as raised, guard.body(a, 1):
                pass
            assert raised.value.fields == {
                "limit": "body_bytes",
                "used": 2000,
                "most": 2000,
                "asked": 1,
            }
            with guard.body(replace(a, uid=B), 1000):
                pass
        with guard.body(a, 2000):
            pass
        assert guard._bodies == {}

    async def test_the_daemons_connections(self, guard: Guard) -> None:
        guard._most_connections = 1
        with guard.connection(_caller(A)):
            with pytest.raises(Quota), guard.connection(_caller(B)):
                pass
            with guard.connection(_caller(0, admin=True)):
                pass
        with guard.connection(_caller(B)):
            pass

    async def test_a_users_large_bodies_are_parsed_one_after_the_other(self, guard: Guard) -> None:
        executor = Executor()
        running = 0

        def work() -> int:
            nonlocal running
            running += 1
            seen = running
            running -= 1
            return seen

        try:
            a = _caller(A)
            found = await asyncio.gather(
                *(guard.parse(executor, work, caller=a) for _ in range(10)),
                *(guard.parse(executor, work, caller=_caller(0, admin=True)) for _ in range(2)),
            )
            assert max(found[:10]) == 1
            assert guard._shares[A].rested > 0
            assert list(guard._shares) == [A]
        finally:
            await executor.drain()

    async def test_who_has_parsed_much_rests_where_there_are_others(self, guard: Guard) -> None:
        executor = Executor()
        order: list[str] = []
        try:
            guard._shares[A] = _Share(rested=asyncio.get_running_loop().time() + 0.05)
            await guard.turnstile.enter(A)
            await guard.turnstile.enter(B)
            late = asyncio.create_task(
                guard.parse(executor, order.append, "rested", caller=_caller(A))
            )
            await guard.parse(executor, order.append, "other", caller=_caller(B))
            await executor.run(order.append, "own", lane=Lane.QUICK, uid=A)
            await late
            assert order == ["other", "own", "rested"]
        finally:
            await executor.drain()


class Held:
    """A connection that only tells whether it is read."""

    def __init__(self) -> None:
        self.held = False
        self.released = asyncio.Event()

    def hold_reading(self) -> None:
        self.held = True

    def release_reading(self) -> None:
        self.held = False
        self.released.set()


class TestReadShares:
    async def test_beside_others_a_user_s_connections_are_held_until_the_next_window(self) -> None:
        shares = ReadShares()
        mine, theirs = [Held(), Held(), Held()], Held()
        with ExitStack() as stack:
            for each in mine:
                stack.enter_context(shares.connection(1, each))
            stack.enter_context(shares.connection(2, theirs))
            shares.took(2, 0.001)
            shares.took(1, 0.009)
            assert not any(each.held for each in mine)
            shares.took(1, 0.002)
            assert all(each.held for each in mine)
            assert not theirs.held
            for each in mine:
                await each.released.wait()
            shares.took(1, 0.009)
            assert not any(each.held for each in mine)

    async def test_who_is_alone_is_never_held(self) -> None:
        shares, mine = ReadShares(), Held()
        with shares.connection(1, mine):
            for _ in range(10):
                shares.took(1, 1.0)
            assert not mine.held

    async def test_a_connection_that_closes_is_forgotten(self) -> None:
        shares, first, second = ReadShares(), Held(), Held()
        shares.took(2, 0.001)
        with shares.connection(1, second):
            with shares.connection(1, first):
                shares.took(1, 1.0)
            await second.released.wait()
        assert not first.released.is_set()
