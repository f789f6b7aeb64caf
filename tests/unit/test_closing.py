"""What has ended is closed: in a fair order, and first where somebody waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from kpmd.core.changes import Ending
from kpmd.core.model import Connection, Link
from kpmd.core.registry import Registry
from kpmd.runtime import closing as module
from kpmd.runtime.closing import Closing
from kpmd.runtime.executor import Executor
from kpmd.runtime.kernel import Handle
from tests.http.serving import until
from tests.unit.records import PERSISTENT, ROOT, a_link, a_map, a_program

pytestmark = pytest.mark.every_loop


class Kernel:
    """Closes when it is let; knows in which order."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.entered: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.failing: set[str] = set()

    def handle(self, id_: str) -> Handle:
        return _Handle(self, id_)

    def hold(self, link: Link) -> threading.Event:
        """Let the closing of this link take until the event is set."""
        return self.gates.setdefault(link.id, threading.Event())


class _Handle:
    def __init__(self, kernel: Kernel, id_: str) -> None:
        self._kernel = kernel
        self._id = id_

    def close(self) -> None:
        self._kernel.entered.append(self._id)
        if gate := self._kernel.gates.get(self._id):
            assert gate.wait(10)
        self._kernel.closed.append(self._id)
        if self._id in self._kernel.failing:
            raise OSError("no")


class House:
    """A registry with a closing, and things to end."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.registry = Registry()
        self.executor = Executor()
        self.closing = Closing(self.executor, self.registry, self.kernel.handle)

    def connect(self, uid: int) -> Connection:
        return self.registry.connect(uid, uid, uid, uid, "x", 0)

    def links(self, uid: int, count: int) -> list[Link]:
        connection = self.connect(uid)
        program = a_program(connection, PERSISTENT)
        self.registry.add_loaded(ROOT, connection, [program], [], 0)
        made = []
        for _ in range(count):
            self.registry.hold_program(ROOT, program.id)
            made.append(a_link(connection, program, PERSISTENT))
            self.registry.add_link(ROOT, connection, program, made[-1], 0)
        return made

    def end(self, *links: Link) -> Ending:
        ending = Ending()
        for link in links:
            ending.links += self.registry.delete_link(ROOT, link.id).links
        return ending


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    for gate in made.kernel.gates.values():
        gate.set()
    await made.closing.drain()
    await made.executor.drain()


def ids(*links: Link) -> list[str]:
    return [link.id for link in links]


async def test_what_nobody_waits_for_goes_one_at_a_time_and_in_order(house: House) -> None:
    links = house.links(1, 5)
    gate = house.kernel.hold(links[0])
    house.closing.later(house.end(*links))
    await until(lambda: house.kernel.entered)
    assert house.closing.waiting == 5
    assert house.kernel.entered == ids(links[0])
    gate.set()
    await house.closing.drain()
    assert house.kernel.closed == ids(*links)
    assert house.closing.waiting == len(house.registry.links) == 0


async def test_what_a_request_waits_for_overtakes(house: House) -> None:
    dead, other = house.links(1, 5), house.links(2, 1)
    gate = house.kernel.hold(dead[0])
    house.closing.later(house.end(*dead))
    await until(lambda: house.kernel.entered)
    await house.closing.now(house.end(*other))
    assert house.kernel.closed == ids(*other)
    assert list(house.registry.links) == dead
    gate.set()


async def test_what_is_in_the_queue_is_hurried_for_who_asks(house: House) -> None:
    dead = house.links(1, 5)
    gate = house.kernel.hold(dead[0])
    house.closing.later(house.end(*dead))
    await until(lambda: house.kernel.entered)
    await house.closing.now(Ending(), ids(dead[3], dead[4]))
    assert house.kernel.closed == ids(dead[3], dead[4])
    # The one that is under way is waited for, too.
    waiting = asyncio.create_task(house.closing.now(Ending(), ids(dead[0])))
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.set()
    await waiting
    assert dead[0].id in house.kernel.closed


async def test_between_two_closes_others_get_their_turn(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lets nobody attach while it closes; what is waited for does not pause."""
    monkeypatch.setattr(module, "pause_after", lambda seconds: 3600.0)
    dead, other = house.links(1, 3), house.links(2, 2)
    house.closing.later(house.end(*dead))
    await until(lambda: len(house.registry.links) == 4)
    await house.closing.now(house.end(*other))
    await house.closing.now(Ending(), ids(dead[2]))
    assert house.kernel.closed == ids(dead[0], *other, dead[2])
    assert house.closing.waiting == 1
    await house.closing.now(Ending(), ids(dead[1]))


def test_only_a_slow_close_is_followed_by_a_pause() -> None:
    assert module.pause_after(0.01) == 0
    assert module.pause_after(0.05) == 0.05
    assert module.pause_after(3) == 0.06


async def test_each_user_gets_a_turn(house: House) -> None:
    many, few = house.links(1, 4), house.links(2, 2)
    gate = house.kernel.hold(many[0])
    house.closing.later(house.end(*many))
    await until(lambda: house.kernel.entered)
    house.closing.later(house.end(*few))
    gate.set()
    await house.closing.drain()
    assert house.kernel.closed == ids(many[0], many[1], few[0], many[2], few[1], many[3])


async def test_who_waits_is_answered_once_the_program_is_closed_too(house: House) -> None:
    connection = house.connect(1)
    shared = a_map(1)
    program = a_program(connection, PERSISTENT, (shared.id,))
    shared.programs.add(program.id)
    house.registry.add_loaded(ROOT, connection, [program], [shared], 0)
    house.registry.hold_program(ROOT, program.id)
    link = a_link(connection, program)
    house.registry.add_link(ROOT, connection, program, link, 0)
    await house.closing.now(house.registry.delete_program(ROOT, program.id, force=True))
    assert house.kernel.closed == [link.id, program.id, shared.id]


async def test_a_program_without_links_is_closed_at_once(house: House) -> None:
    connection = house.connect(1)
    program = a_program(connection)
    house.registry.add_loaded(ROOT, connection, [program], [], 0)
    await house.closing.now(house.registry.delete_program(ROOT, program.id, force=False))
    assert house.kernel.closed == [program.id]


async def test_a_failed_close_ends_the_link_and_stops_no_other(house: House) -> None:
    links = house.links(1, 3)
    house.kernel.failing = {links[0].id}
    await house.closing.now(house.end(*links))
    assert sorted(house.kernel.closed) == ids(*links)
    assert len(house.registry.links) == 0


async def test_a_waiter_that_gives_up_takes_nothing_along(house: House) -> None:
    (link,) = house.links(1, 1)
    gate = house.kernel.hold(link)
    first = asyncio.create_task(house.closing.now(house.end(link)))
    await until(lambda: house.kernel.entered)
    second = asyncio.create_task(house.closing.now(Ending(), [link.id]))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.set()
    await second
    assert house.kernel.closed == [link.id]


async def test_stopped_it_begins_only_what_is_waited_for(house: House) -> None:
    """The rest stays in the FD store, for the next daemon to detach."""
    links = house.links(1, 3)
    gate = house.kernel.hold(links[0])
    house.closing.later(house.end(*links))
    await until(lambda: house.kernel.entered)
    house.closing.stop()
    gate.set()
    await house.closing.now(Ending(), ids(links[2]))
    await house.closing.drain()
    assert sorted(house.kernel.closed) == ids(links[0], links[2])
    assert house.closing.waiting == 1
