"""Streams take turns: one piece in each round of the loop, and users after each other."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from kpmd.runtime.turns import Gate


async def test_users_take_turns_whoever_has_more_to_do() -> None:
    gate = Gate()
    order: list[int] = []

    async def work(uid: int) -> None:
        for _ in range(3):
            await gate.enter(uid)
            order.append(uid)
            gate.leave()

    await asyncio.gather(*(work(1) for _ in range(4)), work(2))
    assert len(order) == 15
    # The one stream of user 2 has every second turn as long as it wants one.
    first = order.index(2)
    assert order[first : first + 6].count(2) == 3


async def test_others_get_a_round_of_the_loop_in_between() -> None:
    gate = Gate()
    rounds = 0

    def tick() -> None:
        nonlocal rounds
        rounds += 1
        asyncio.get_running_loop().call_soon(tick)

    asyncio.get_running_loop().call_soon(tick)
    await gate.enter(1)
    seen = []
    for _ in range(10):
        gate.leave()
        await gate.enter(1)
        seen.append(rounds)
    assert all(after > before for before, after in itertools.pairwise(seen))


async def test_who_gives_up_waiting_holds_up_nobody() -> None:
    gate = Gate()
    await gate.enter(1)
    waiting = asyncio.create_task(gate.enter(2))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.leave()
    async with asyncio.timeout(5):
        await gate.enter(3)


async def test_who_gives_up_just_as_the_turn_comes_passes_it_on() -> None:
    gate = Gate()
    await gate.enter(1)
    waiting = asyncio.create_task(gate.enter(2))
    last = asyncio.create_task(gate.enter(3))
    await asyncio.sleep(0)
    gate._next()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(5):
        await last
