"""What lives as long as a lease, and what a lease lives as long as."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.house import Clock, a_lease, on
from tests.http.samples import (
    PERSISTENT,
    PROCESS,
    Gate,
    a_link,
    a_program,
    instructions,
    link,
)
from tests.http.serving import Client, Served, until

Actors = Callable[..., Awaitable[Actor]]
Serve = Callable[..., Awaitable[Served]]

LONGEST = 30 * 86400

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


@pytest.fixture
async def served(serve: Serve, kernel: FakeKernel, clock: Clock) -> Served:
    return await serve(kernel, clock=clock)


async def renew(client: Client, id_: str, body: object = None, data: bytes | None = None) -> Any:
    answer = await client.request("PUT", f"/leases/{id_}", body, data=data)
    assert answer.status == 200, answer.body
    return answer.json


async def collect(served: Served) -> None:
    """What the timer does: it goes by the real time, and the tests' clock does not."""
    served.state.lease_timer._due()


async def test_what_is_bound_ends_when_the_time_is_over(
    client: Client, served: Served, kernel: FakeKernel, clock: Clock
) -> None:
    lease = await a_lease(client, 60)
    program = await a_program(client, lifetime=on(lease))
    made = await a_link(client, program, lifetime=on(lease))
    other = await a_link(client)
    assert (await client.get(f"/links/{made}"))["lifetime"] == on(lease)
    assert (await client.get(f"/programs/{program}"))["lifetime"] == on(lease)
    bound = await client.get(f"/leases/{lease}")
    assert (bound["links"], bound["programs"]) == (1, 1)
    clock.now += 59.9
    await collect(served)
    assert len(kernel.attached) == 2
    clock.now += 0.2
    gate = kernel.hooks["close_link"] = Gate()
    await collect(served)
    await asyncio.to_thread(gate.entered.wait, 10)
    found = await client.get(f"/links/{made}")
    assert (found["state"], found["reason"]) == ("detaching", "lease-expired")
    gate.open()
    await until(lambda: len(kernel.attached) == len(kernel.loaded) == 1)
    assert [each["id"] for each in (await client.get("/links"))["items"]] == [other]


async def test_the_timer_ends_leases_by_itself(serve: Serve, kernel: FakeKernel) -> None:
    """By the real clock: the one that is made last ends first, and one is renewed."""
    served = await serve(kernel)
    async with Client(served.path) as client:
        late, renewed, soon = [await a_lease(client, ttl) for ttl in (1.0, 0.5, 0.05)]
        program = await a_program(client, lifetime=PERSISTENT)
        links = [
            await a_link(client, program, lifetime=on(lease)) for lease in (late, renewed, soon)
        ]
        await renew(client, renewed, {"ttl": 60})
        gone: list[str] = []

        def count() -> int:
            for id_ in links:
                if id_ not in gone and served.state.registry.links.get(id_) is None:
                    gone.append(id_)
            return len(gone)

        await until(lambda: count() == 2)
        assert gone == [links[2], links[0]]
        assert [each["id"] for each in (await client.get("/leases"))["items"]] == [renewed]
        assert len(kernel.attached) == 1


async def test_deleting_answers_once_all_that_was_bound_is_detached(
    client: Client, kernel: FakeKernel
) -> None:
    lease = await a_lease(client)
    program = await a_program(client, lifetime=on(lease))
    for symbol in ("vfs_read", "vfs_write"):
        await a_link(client, program, symbols=[symbol], lifetime=on(lease))
    gate = kernel.hooks["close_link"] = Gate()
    asked = asyncio.create_task(client.request("DELETE", f"/leases/{lease}"))
    await asyncio.to_thread(gate.entered.wait, 10)
    found = (await client.get(f"/links?lease={lease}"))["items"]
    assert [(each["state"], each["reason"]) for each in found] == [("detaching", "lease-ended")] * 2
    assert not asked.done()
    # It has ended all the same.
    await client.refused("GET", f"/leases/{lease}", status=410, kind="gone")
    gate.open()
    assert (await asked).status == 204
    assert not kernel.attached
    assert not kernel.loaded


async def test_deleting_waits_for_a_bound_link_that_is_being_detached_already(
    client: Client, kernel: FakeKernel
) -> None:
    """Else the answer would say that all that was bound is detached, while it is not."""
    lease = await a_lease(client)
    made = await a_link(client, lifetime=on(lease))
    gate = kernel.hooks["close_link"] = Gate()
    first = asyncio.create_task(client.request("DELETE", f"/links/{made}"))
    await asyncio.to_thread(gate.entered.wait, 10)
    asked = asyncio.create_task(client.request("DELETE", f"/leases/{lease}"))
    done, _ = await asyncio.wait([asked], timeout=0.2)
    gate.open()
    assert (await first).status == (await asked).status == 204
    assert not done, "DELETE of the lease answered while its link was attached"


@pytest.mark.parametrize("how", ["deleted", "expired", "expired, not collected", "released"])
async def test_an_ended_lease_is_gone(
    client: Client, served: Served, kernel: FakeKernel, clock: Clock, how: str
) -> None:
    lease = await client.post("/leases", {"ttl": 60})
    program = await a_program(client, lifetime=PERSISTENT)
    if how == "deleted":
        await client.delete(f"/leases/{lease['id']}")
    elif how == "released":
        await client.delete(f"/clients/{lease['client']}")
        program = await a_program(client, lifetime=PERSISTENT)
    else:
        clock.now += 60
        if how == "expired":
            await collect(served)
    path = f"/leases/{lease['id']}"
    for method in ("GET", "PUT", "DELETE"):
        await client.refused(method, path, status=410, kind="gone")
    life = {"lifetime": on(lease["id"])}
    await client.refused("POST", "/links", link(program, **life), status=410, kind="gone")
    await client.refused("POST", "/programs", instructions(**life), status=410, kind="gone")
    assert kernel.calls.count("create_link") == 0
    assert len(kernel.loaded) == 1


@pytest.mark.parametrize("what", ["create_link", "load_instructions"])
async def test_a_lease_that_ends_while_something_is_made_for_it_keeps_nothing(
    client: Client, kernel: FakeKernel, what: str
) -> None:
    lease = await a_lease(client)
    program = await a_program(client)
    bodies: dict[str, tuple[str, Any]] = {
        "create_link": ("/links", link(program, lifetime=on(lease))),
        "load_instructions": ("/programs", instructions(lifetime=on(lease))),
    }
    gate = kernel.hooks[what] = Gate()
    asked = asyncio.create_task(client.request("POST", *bodies[what]))
    await asyncio.to_thread(gate.entered.wait, 10)
    await client.delete(f"/leases/{lease}")
    gate.open()
    answer = await asked
    assert (answer.status, answer.kind) == (410, "gone")
    assert not kernel.attached
    assert len(kernel.loaded) == 1


async def test_a_lease_outlives_the_client_that_made_it(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    lease = await a_lease(child)
    kept = await a_link(child, lifetime=on(lease))
    ended = await a_link(child, lifetime=PROCESS)
    owner = (await client.get(f"/links/{kept}"))["client"]
    child.kill()
    await until(lambda: len(kernel.attached) == 1)
    found = await client.get(f"/leases/{lease}")
    # Its program ended with the process, and lives on for the link.
    assert (found["client"], found["links"], found["programs"]) == (owner, 1, 0)
    await client.refused("GET", f"/links/{ended}", status=404, kind="not-found")
    await renew(client, lease, {"ttl": 3600})
    again = await a_link(client, lifetime=on(lease))
    assert [each["id"] for each in (await client.get(f"/links?lease={lease}"))["items"]] == [
        kept,
        again,
    ]
    await client.delete(f"/leases/{lease}")
    assert not kernel.attached


@root
async def test_releasing_a_client_ends_its_leases(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor(NOBODY)
    lease = await child.post("/leases", {"ttl": 60})
    await a_link(child, lifetime=on(lease["id"]))
    # One of another client, bound to it; and one that is not.
    await a_link(client, lifetime=on(lease["id"]))
    mine = await a_link(client)
    await client.delete(f"/clients/{lease['client']}")
    assert [each["id"] for each in (await client.get("/links"))["items"]] == [mine]
    await client.refused("GET", f"/leases/{lease['id']}", status=410, kind="gone")
    assert "released" in (await child.request("GET", f"/leases/{lease['id']}")).json["detail"]
    assert (await child.get(f"/clients/{lease['client']}"))["leases"] == 0


@pytest.fixture
async def things(client: Client) -> tuple[str, str]:
    """Two leases."""
    return await a_lease(client), await a_lease(client)


async def test_links_by_their_lease(client: Client, things: tuple[str, str]) -> None:
    first, second = things
    program = await a_program(client)
    other = await a_program(client)
    made = {
        lease: [await a_link(client, each, lifetime=on(lease)) for each in (program, other)]
        for lease in things
    }
    await a_link(client, program)

    async def listed(query: str) -> list[str]:
        return [each["id"] for each in (await client.get(f"/links?{query}"))["items"]]

    assert await listed(f"lease={first}") == made[first]
    assert await listed(f"lease={second}&program={other}") == made[second][1:]
    page = await client.get(f"/links?lease={second}&limit=1")
    assert [each["id"] for each in page["items"]] == made[second][:1]
    assert await listed(f"lease={second}&limit=1&after={page['next']}") == made[second][1:]
    assert await listed("lease=lse-none") == []


async def test_a_program_lives_on_for_a_link_with_a_longer_life(
    client: Client, kernel: FakeKernel, things: tuple[str, str]
) -> None:
    short, long = things
    program = await a_program(client, lifetime=on(short))
    kept = await a_link(client, program, lifetime=on(long))
    await client.delete(f"/leases/{short}")
    assert (await client.get(f"/programs/{program}"))["links"] == 1
    assert len(kernel.attached) == len(kernel.loaded) == 1
    # As long as it is there, it can be used.
    more = await a_link(client, program, lifetime=on(long))
    await client.delete(f"/links/{more}")
    await client.delete(f"/links/{kept}")
    assert not kernel.loaded
    assert (await client.get(f"/leases/{long}"))["links"] == 0


async def test_a_link_with_a_shorter_life_than_its_program(
    client: Client, kernel: FakeKernel, things: tuple[str, str]
) -> None:
    short, long = things
    program = await a_program(client, lifetime=on(long))
    await a_link(client, program, lifetime=on(short))
    kept = await a_link(client, program, lifetime=PERSISTENT)
    await client.delete(f"/leases/{short}")
    assert [each["id"] for each in (await client.get("/links"))["items"]] == [kept]
    assert (await client.get(f"/programs/{program}"))["links"] == 1
    await client.delete(f"/links/{kept}")
    assert len(kernel.loaded) == 1
    await client.delete(f"/leases/{long}")
    assert not kernel.loaded
