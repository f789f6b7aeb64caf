"""While the kernel takes a link apart: what can be seen of it, and who waits for whom."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.samples import Gate, a_link, a_program, link
from tests.http.serving import Client, Served, until

Actors = Callable[..., Awaitable[Actor]]


class Turnstile:
    """A hook that lets one call pass for each ``let``: the others wait."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._free = 0
        self.entered = 0
        self.passed = 0

    def __call__(self) -> None:
        with self._condition:
            self.entered += 1
            assert self._condition.wait_for(lambda: self._free, 30), "nobody let it through"
            self._free -= 1
            self.passed += 1

    def let(self, count: int = 1) -> None:
        """Let that many more through."""
        with self._condition:
            self._free += count
            self._condition.notify_all()


@pytest.fixture
def slow(kernel: FakeKernel) -> Iterator[Turnstile]:
    """A kernel that takes its time for each link."""
    made = kernel.hooks["close_link"] = Turnstile()
    yield made
    made.let(1000)


@pytest.mark.every_loop
async def test_it_is_listed_with_its_reason_while_the_kernel_is_busy(
    client: Client, kernel: FakeKernel, slow: Turnstile
) -> None:
    program = await a_program(client)
    going = await a_link(client, program, symbols=["vfs_read", "vfs_write"], cookies=[1, 2])
    staying = await a_link(client, program)
    before = await client.get(f"/links/{going}")
    assert (before["state"], "reason" in before) == ("attached", False)
    targets = await client.get(f"/links/{going}/targets")
    asked = asyncio.create_task(client.request("DELETE", f"/links/{going}"))
    await until(lambda: slow.entered)
    during = await client.get(f"/links/{going}")
    # The kernel cannot be asked any more how often it was missed; nothing else changes.
    assert during == before | {"state": "detaching", "reason": "deleted", "missed": None}
    for query in ("", f"?program={program}", f"?client={before['client']}"):
        found = (await client.get(f"/links{query}"))["items"]
        assert [(each["id"], each["state"]) for each in found] == [
            (going, "detaching"),
            (staying, "attached"),
        ]
        assert "reason" not in found[1]
    assert await client.get(f"/links/{going}/targets") == targets
    assert (await client.get(f"/links/{going}/skipped"))["items"] == []
    assert (await client.get(f"/programs/{program}"))["links"] == 2
    assert (await client.get(f"/clients/{before['client']}"))["links"] == 2
    slow.let()
    assert (await asked).status == 204
    await client.refused("GET", f"/links/{going}", status=404, kind="not-found")
    assert (await client.get(f"/programs/{program}"))["links"] == 1
    slow.let()


async def test_both_who_delete_it_are_answered_once_it_is_detached(
    client: Client, kernel: FakeKernel, slow: Turnstile
) -> None:
    made = await a_link(client)
    asked = [asyncio.create_task(client.request("DELETE", f"/links/{made}")) for _ in range(2)]
    await until(lambda: slow.entered)
    asked.append(asyncio.create_task(client.request("DELETE", f"/links/{made}")))
    done, _ = await asyncio.wait(asked, timeout=0.1)
    assert not done
    slow.let()
    assert [(await each).status for each in asked] == [204] * 3
    assert slow.entered == 1
    assert not kernel.attached
    await client.refused("DELETE", f"/links/{made}", status=404, kind="not-found")


async def test_no_link_with_a_program_that_is_being_deleted(
    client: Client, kernel: FakeKernel, slow: Turnstile
) -> None:
    program = await a_program(client)
    for _ in range(2):
        await a_link(client, program)
    asked = asyncio.create_task(client.request("DELETE", f"/programs/{program}?force=true"))
    await until(lambda: slow.entered)
    told = await client.refused("POST", "/links", link(program), status=409, kind="conflict")
    assert "deleted" in told["detail"]
    found = (await client.get("/links"))["items"]
    assert {(each["state"], each["reason"]) for each in found} == {("detaching", "program-deleted")}
    # Asked again: the same as the first.
    again = asyncio.create_task(client.request("DELETE", f"/programs/{program}"))
    await client.get("/healthz")
    assert not again.done()
    slow.let(2)
    assert (await asked).status == (await again).status == 204
    assert not kernel.attached
    assert not kernel.loaded
    assert kernel.calls.count("create_link") == 2
    await client.refused("POST", "/links", link(program), status=404, kind="not-found")


async def test_releasing_a_client_waits_for_what_is_going_already(
    client: Client, kernel: FakeKernel, slow: Turnstile
) -> None:
    first, second = await a_link(client), await a_link(client)
    owner = (await client.get(f"/links/{first}"))["client"]
    deleting = asyncio.create_task(client.request("DELETE", f"/links/{first}"))
    await until(lambda: slow.entered)
    releasing = asyncio.create_task(client.request("DELETE", f"/clients/{owner}"))
    await until(lambda: slow.entered == 2)
    found = {each["id"]: each["reason"] for each in (await client.get("/links"))["items"]}
    assert found == {first: "deleted", second: "client-released"}
    slow.let()
    done, _ = await asyncio.wait([releasing], timeout=0.1)
    assert not done
    slow.let()
    assert (await deleting).status == (await releasing).status == 204
    assert not kernel.attached
    assert not kernel.loaded


async def test_a_client_with_many_links_dies_and_nobody_waits_for_it(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    child, nobody = await actor(), await actor(NOBODY)
    program = await a_program(child)
    dead = [await child.post("/links", link(program)) for _ in range(50)]
    ids = [each["id"] for each in dead]
    gates = []
    for each in dead:
        gates.append(Gate())
        kernel.hooks[f"close_link {each['kernel_id']}"] = gates[-1]
    his = await a_program(nobody)
    going, staying = await a_link(nobody, his), await a_link(nobody, his)
    child.kill()
    await asyncio.to_thread(gates[0].entered.wait, 10)
    owner = dead[0]["client"]
    found = (await client.get("/links"))["items"]
    assert [(each["id"], each["reason"]) for each in found if each["state"] == "detaching"] == [
        (id_, "client-gone") for id_ in ids
    ]
    assert [each["id"] for each in found if each["state"] == "attached"] == [going, staying]
    page = await client.get(f"/links?client={owner}&limit=30")
    assert [each["id"] for each in page["items"]] == ids[:30]
    await client.refused("GET", f"/clients/{owner}", status=404, kind="not-found")
    # None of the dead one's links is through yet: another's attach and detach are at once.
    await a_link(nobody, his)
    assert (await nobody.request("DELETE", f"/links/{going}")).status == 204
    assert len(served.state.registry.links) == 52
    # The rest go one at a time, in their order.
    for number in range(3):
        assert not gates[number + 1].entered.is_set()
        gates[number].open()
        await asyncio.to_thread(gates[number + 1].entered.wait, 10)
    rest = (await client.get(f"/links?client={owner}"))["items"]
    assert [each["id"] for each in rest] == ids[3:]
    # One that somebody asks for is taken out of its turn; it alone is waited for.
    gates[-1].open()
    await client.delete(f"/links/{ids[-1]}")
    rest = (await client.get(f"/links?client={owner}"))["items"]
    assert [each["id"] for each in rest] == ids[3:-1]
    # Why it ended stays what it was.
    assert {each["reason"] for each in rest} == {"client-gone"}
    for gate in gates:
        gate.open()
    await until(lambda: len(kernel.attached) == 2)
    await until(lambda: len(kernel.loaded) == 1)
    await client.refused("GET", f"/programs/{program}", status=404, kind="not-found")


async def test_the_dead_ones_links_do_not_hold_up_a_lease(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    dead = [await child.post("/links", link(program)) for _ in range(5)]
    gates = [kernel.hooks.setdefault(f"close_link {each['kernel_id']}", Gate()) for each in dead]
    lease = (await client.post("/leases", {"ttl": 60}))["id"]
    await a_link(client, lifetime={"kind": "lease", "lease": lease})
    child.kill()
    await until(lambda: kernel.calls.count("close_link") == 1)
    await client.delete(f"/leases/{lease}")
    assert len(kernel.attached) == len(gates)


async def test_a_failed_close_is_an_end_too(client: Client, kernel: FakeKernel) -> None:
    """close(2) frees the FD before it fails: there is nothing left to be tried again."""
    made = await a_link(client)

    def fail() -> None:
        raise OSError(5, "no")

    kernel.hooks["close_link"] = fail
    try:
        await client.delete(f"/links/{made}")
    finally:
        del kernel.hooks["close_link"]
        for each in kernel.attached:
            each.fd.close()  # the fake's close failed before it did anything
    await client.refused("GET", f"/links/{made}", status=404, kind="not-found")


async def test_a_gate_for_one_does_not_stop_reads(client: Client, kernel: FakeKernel) -> None:
    """A link that is listed while it goes is never asked for by a number that was closed."""
    links = [await a_link(client) for _ in range(5)]
    gate = kernel.hooks["link_details"] = Gate()
    reading = asyncio.create_task(client.get("/links"))
    await asyncio.to_thread(gate.entered.wait, 10)
    deleting = [asyncio.create_task(client.request("DELETE", f"/links/{id_}")) for id_ in links]
    await until(lambda: not kernel.attached)
    gate.open()
    assert [each["id"] for each in (await reading)["items"]] == links
    assert [(await each).status for each in deleting] == [204] * 5
