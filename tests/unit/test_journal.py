"""Events are numbered, kept for a while, and never skipped in silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from kpmd.core.changes import Event
from kpmd.core.model import Client, Connection
from kpmd.errors import Gone, Invalid
from kpmd.runtime import journal as module
from kpmd.runtime.journal import Journal, Listener
from tests.http.serving import until
from tests.unit.records import a_lease, a_link, a_program

pytestmark = pytest.mark.every_loop

NOW = 1_700_000_000.25


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HISTORY", 3)
    monkeypatch.setattr(module, "MOST_BEHIND", 3)
    monkeypatch.setattr(module, "GRACE", 0)


async def trimmed(journal: Journal) -> None:
    """What is too long ago is forgotten in the loop's next rounds."""
    await until(lambda: not any(scope.trimming for scope in journal._scopes.values()))


@pytest.fixture
def journal() -> Journal:
    return Journal(lambda: NOW)


def a_client(uid: int = 1) -> Client:
    return Client(f"cli-{uid}", 7, uid, uid, "x", 0)


def add(journal: Journal, count: int = 1, uid: int = 1) -> None:
    for _ in range(count):
        journal.add(Event("client", "created", a_client(uid)))


def numbers(listener: Listener) -> list[int]:
    return [int(entry.id.partition("-")[2]) for entry in listener.ready()]


def after(journal: Journal, number: int) -> str:
    return f"{journal._boot}-{number}"


async def test_each_kind_of_thing_tells_what_it_is(journal: Journal) -> None:
    listener = journal.listen(None, None)
    client = a_client()
    program = a_program(Connection("con", client))
    link = a_link(Connection("con", client), program)
    lease = a_lease(client, 60, 0)
    journal.add(Event("client", "ended", client, "client-gone"))
    journal.add(Event("program", "created", program))
    journal.add(Event("link", "detaching", link, "deleted"))
    journal.add(Event("lease", "ended", lease, "lease-expired"))
    told = [json.loads(entry.line) for entry in listener.ready()]
    common: dict[str, Any] = {"time": "2023-11-14T22:13:20.250000Z", "uid": 1}
    for each, number in zip(told, range(1, 5), strict=True):
        assert each.pop("seq") == after(journal, number)
        assert {name: each.pop(name) for name in common} == common
    of = {"client": "cli-1"}
    assert told == [
        {
            "what": "client",
            "event": "ended",
            "id": "cli-1",
            "reason": "client-gone",
            "pid": 7,
            "command": "x",
        },
        {"what": "program", "event": "created", "id": program.id, "name": "p"} | of,
        {
            "what": "link",
            "event": "detaching",
            "id": link.id,
            "reason": "deleted",
            "program": program.id,
            "kind": "kprobe",
            "count": 1,
        }
        | of,
        {"what": "lease", "event": "ended", "id": lease.id, "reason": "lease-expired"} | of,
    ]


async def test_no_line_is_more_than_one_line(journal: Journal) -> None:
    """A command is its owner's to choose."""
    listener = journal.listen(None, None)
    client = a_client()
    client.command = "a\nb\r\u2028\x00\udcff"
    journal.add(Event("client", "created", client))
    (entry,) = listener.ready()
    assert len(entry.line.splitlines()) == 1
    assert json.loads(entry.line)["command"] == client.command


async def test_every_user_has_numbers_of_his_own(journal: Journal) -> None:
    one, two, all_ = journal.listen(1, None), journal.listen(2, None), journal.listen(None, None)
    for uid in (1, 2, 2, 1):
        add(journal, uid=uid)
    assert numbers(one) == [1, 2]
    assert numbers(two) == [1, 2]
    assert numbers(all_) == [1, 2, 3, 4]


async def test_who_listens_hears_what_comes_from_then_on(journal: Journal) -> None:
    add(journal, 2)
    listener = journal.listen(1, None)
    assert numbers(listener) == []
    add(journal, 2)
    assert numbers(listener) == [3, 4]
    assert numbers(listener) == []


async def test_resuming(small: None, journal: Journal) -> None:
    assert numbers(journal.listen(1, after(journal, 0))) == []
    add(journal, 5)
    await trimmed(journal)
    assert numbers(journal.listen(1, after(journal, 2))) == [3, 4, 5]
    assert numbers(journal.listen(1, after(journal, 4))) == [5]
    assert numbers(journal.listen(1, after(journal, 5))) == []
    for number in (0, 1, 6):
        with pytest.raises(Gone):
            journal.listen(1, after(journal, number))
    with pytest.raises(Gone):
        journal.listen(1, f"00000000-{3}")
    assert not journal._scope(1).listeners - set(journal._scope(1).listeners)


@pytest.mark.parametrize("since", ["", "x", "-", "1", "a-", "a-b", "a-1-2", "a- 1", "a-\u0661"])
async def test_what_is_no_seq(journal: Journal, since: str) -> None:
    with pytest.raises(Invalid):
        journal.listen(1, since)
    assert not journal._scope(1).listeners


async def test_who_falls_behind_is_lost_and_told_once(small: None, journal: Journal) -> None:
    slow, other, far = (journal.listen(1, None) for _ in range(3))
    lost: list[str] = []
    slow.on_lost = lambda: lost.append("slow")
    other.on_lost = lambda: lost.append("other")
    far.on_lost = lambda: lost.append("far")
    add(journal, 3)
    await trimmed(journal)
    assert lost == []
    assert numbers(other) == [1, 2, 3]
    add(journal)
    await trimmed(journal)
    assert sorted(lost) == ["far", "slow"]
    assert journal._scope(1).listeners == {other}
    assert not await slow.wait(10)
    add(journal, 2)
    await trimmed(journal)
    assert numbers(other) == [4, 5, 6]
    assert sorted(lost) == ["far", "slow"]


async def test_a_burst_cuts_off_nobody_who_reads(
    small: None, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a client's death brings about is told in one go: nobody can read in between."""
    monkeypatch.setattr(module, "GRACE", 0.05)
    listener = journal.listen(1, None)
    waiting = asyncio.create_task(listener.wait(10))
    await asyncio.sleep(0)
    add(journal, 100)
    assert await waiting
    assert numbers(listener) == list(range(1, 101))
    await trimmed(journal)
    assert journal._scope(1).listeners == {listener}
    assert len(journal._scope(1).entries) == module.HISTORY


async def test_another_users_events_push_nothing_out(small: None, journal: Journal) -> None:
    listener, admin = journal.listen(1, None), journal.listen(None, None)
    lost: list[bool] = []
    listener.on_lost = lambda: lost.append(True)
    add(journal)
    add(journal, 50, uid=2)
    await trimmed(journal)
    assert not lost
    assert numbers(listener) == [1]
    assert not await admin.wait(10)
    assert numbers(journal.listen(1, after(journal, 0))) == [1]


async def ends(what: asyncio.Task[bool]) -> bool:
    async with asyncio.timeout(5):
        return await what


Wake = Callable[[Journal, Listener], object]
WAKES: dict[str, tuple[Wake, bool]] = {
    "an event": (lambda journal, _: add(journal), True),
    "its close": (lambda _, listener: listener.close(), False),
    "the journal's close": (lambda journal, _: journal.close(), False),
}


@pytest.mark.parametrize("what", WAKES)
async def test_what_ends_a_wait(journal: Journal, what: str) -> None:
    wake, more = WAKES[what]
    listeners = [journal.listen(1, None) for _ in range(3)]
    waits = [asyncio.create_task(each.wait(60)) for each in listeners]
    await asyncio.sleep(0)
    wake(journal, listeners[0])
    assert await ends(waits[0]) is more
    if what == "its close":
        # The others are woken for nothing, and say so.
        add(journal)
        more = True
    assert [await ends(each) for each in waits[1:]] == [more] * 2


async def test_a_wait_that_nothing_ends_ends_with_its_time(journal: Journal) -> None:
    listener = journal.listen(1, None)
    assert await listener.wait(0.001)
    assert listener.ready() == []


async def test_an_event_before_the_wait_ends_it(journal: Journal) -> None:
    """Another listener's wait must not take it away."""
    first, second = journal.listen(1, None), journal.listen(1, None)
    add(journal)
    assert await first.wait(60)
    assert numbers(first) == [1]
    waiting = asyncio.create_task(first.wait(60))
    await asyncio.sleep(0)
    assert await ends(asyncio.create_task(second.wait(60)))
    assert numbers(second) == [1]
    add(journal)
    assert await ends(waiting)


async def test_what_has_happened_is_told_before_the_end(journal: Journal) -> None:
    listener = journal.listen(1, None)
    add(journal, 2)
    journal.close()
    assert journal.closed
    assert await listener.wait(60)
    assert numbers(listener) == [1, 2]
    assert not await listener.wait(60)
    # What still happens while the daemon stops: told as far as somebody is there to hear it.
    add(journal)
    assert await listener.wait(60)
    assert numbers(listener) == [3]
    late = journal.listen(1, None)
    assert not await late.wait(60)


async def test_a_closed_listener_costs_nothing(small: None, journal: Journal) -> None:
    listener = journal.listen(1, None)
    lost: list[bool] = []
    listener.on_lost = lambda: lost.append(True)
    listener.close()
    listener.close()
    add(journal, 10)
    await trimmed(journal)
    assert not lost
    assert not journal._scope(1).listeners
