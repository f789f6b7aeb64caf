"""One daemon after the other over one kernel: what the service manager's FD store carries over."""

from __future__ import annotations

import asyncio
import os
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from kpmd.core.changes import Ending
from kpmd.core.model import Client as KpmdClient
from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.house import House, a_lease, on
from tests.http.samples import (
    PERSISTENT,
    PROCESS,
    Gate,
    a_link,
    a_program,
    elf,
    link,
)
from tests.http.serving import Client, Served, until
from tests.http.streaming import listening
from tests.unit.btf import OBJECTS, section

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")

#: How a daemon ends: as systemctl restart does it, and as the OOM killer does.
ENDS = pytest.mark.parametrize("how", ["stop", "kill"])


Actors = Callable[..., Awaitable[Actor]]


@root
@ENDS
@pytest.mark.every_loop
async def test_everything_is_there_again_as_it_was(house: House, process: Actors, how: str) -> None:
    house.kernel.entries = {bytes(8): [b"\x07" + bytes(7)], b"\x01" * 8: [bytes(8)]}
    nobody = await process(NOBODY)
    lease = await a_lease(nobody)
    for client, life in ((nobody, on(lease)), (nobody, PROCESS), (house.client, PERSISTENT)):
        made = await client.post("/programs", elf(lifetime=life, labels={"of": "mine"}))
        for program in made["programs"]:
            body = link(
                program["id"],
                symbols=["vfs_read", "nf_hook", "do_idle_loop", "no_such"],
                cookies=[1, 2**64 - 1, 3, 4],
                on_untraceable="skip",
                lifetime=life,
                labels={"a": "b", "é": "\u2603"},
            )
            assert (await client.post("/links", body))["skipped"] == 2
    (symbol,) = (await house.client.get("/symbols?pattern=vfs_open"))["items"]
    by_address = link(program["id"], addresses=[symbol["address"]], kind="kretprobe")
    await house.client.post("/links", {**by_address, "lifetime": PERSISTENT})
    before, clients = await house.everything(), await house.ids("/clients")
    objects = house.references()
    for _ in range(2):
        await house.again(how)
        after = await house.everything()
        before[lease]["expires_at"] = after[lease]["expires_at"]
        assert after == before
        # This process has come back, and is who it was.
        assert await house.ids("/clients") == clients
        assert house.references() == objects
    # They can be used, and ended, like those that are made anew.
    assert (await house.client.get(f"/links?program={program['id']}"))["items"]
    await a_link(house.client, program["id"])
    await house.client.delete(f"/leases/{lease}")
    nobody.kill()
    await until(lambda: len(house.daemon.state.registry.links) == 4)
    await house.client.delete(f"/programs/{program['id']}?force=true")
    (me,) = await house.ids("/clients")
    await house.client.delete(f"/clients/{me}")
    assert house.references() == Counter()
    assert house.manager.names == [me]
    await house.client.__aexit__(None, None, None)
    await until(lambda: house.manager.store == [])


@ENDS
async def test_records_wait_for_the_next_daemon_and_are_decoded_by_it(
    house: House, how: str
) -> None:
    kernel = house.kernel
    kernel.map_type = ("ringbuf", 27)
    kernel.btf = section(OBJECTS / "events.bpf.o", ".BTF")
    made = await house.client.post("/programs", elf(lifetime=PERSISTENT))
    path = f"/maps/{made['maps'][0]['id']}/records"
    event = struct.pack("<QQII16sq", 1, 2, 3, 1, b"cat", -4)
    async with listening(house.daemon.path, path=path) as stream:
        kernel.ring.write(event)
        assert (await stream.next())["decoded"]["command"] == "cat"
        await house.end(how)
    kernel.ring.write(event)
    await house.start()
    async with listening(house.daemon.path, "?type=event&data=false", path=path) as stream:
        assert (await stream.next())["decoded"]["phase"] == "MIDDLE"
    await until(lambda: kernel.ring.opened == 0)


@ENDS
async def test_what_lost_its_owner_meanwhile_ends(house: House, process: Actors, how: str) -> None:
    child = await process()
    lease, long = await a_lease(child, 60), await a_lease(child, 600)
    program = await a_program(house.client, lifetime=PERSISTENT)
    dead = await a_link(child, program)
    expired = await a_link(child, program, lifetime=on(lease))
    lives = await a_link(child, program, lifetime=on(long))
    cut = await a_link(house.client, program, lifetime={"kind": "connection"})
    cut_program = await a_program(house.client, lifetime={"kind": "connection"})
    stays = await a_link(house.client, program)
    owner = (await house.client.get(f"/links/{dead}"))["client"]
    await house.end(how)
    child.kill()
    house.now += 60
    await house.start()
    registry = house.daemon.state.registry
    await until(lambda: len(registry.links) == 2)
    assert await house.ids("/links") == sorted([lives, stays])
    assert await house.ids("/leases") == [long]
    assert await house.ids("/programs") == [program]
    await house.client.refused("GET", f"/leases/{lease}", status=410, kind="gone")
    await house.client.refused("GET", f"/clients/{owner}", status=404, kind="not-found")
    told = await house.history()
    for id_, reason in ((dead, "client-gone"), (expired, "lease-expired")):
        assert [each[1:] for each in told if each[0] == id_] == [
            ("detaching", reason),
            ("ended", reason),
        ]
    assert (lease, "ended", "lease-expired") in told
    # A link cannot outlive its connection, so it was never stored: the kernel has ended it.
    assert cut not in [each[0] for each in told]
    if how == "kill":
        assert (cut_program, "ended", "connection-closed") in told
    assert len(house.references()) == 3


async def test_a_clients_process_is_watched_on(house: House, process: Actors) -> None:
    child = await process()
    made = await a_link(child)
    owner = (await house.client.get(f"/links/{made}"))["client"]
    await house.again()
    assert (await house.client.get(f"/clients/{owner}"))["pid"] == child.pid
    child.kill()
    await until(lambda: not house.references())
    assert await house.ids("/links") == []
    await until(lambda: house.manager.names == [])


async def a_client_that_holds_nothing(house: House, process: Actors) -> Actor:
    """It held something, so it is in the store; then the daemon is started anew."""
    child = await process()
    made = await a_link(child)
    program = (await child.get(f"/links/{made}"))["program"]
    await house.client.delete(f"/programs/{program}?force=true")
    assert len(house.manager.names) == 1
    await house.again("kill")
    return child


async def test_a_client_that_holds_nothing_is_not_taken_over(house: House, process: Actors) -> None:
    await a_client_that_holds_nothing(house, process)
    await until(lambda: house.manager.names == [], 2)
    listed = {each.id for each in house.daemon.state.registry.clients}
    assert house.daemon.state.clients._pidfds.keys() == listed


async def test_the_loop_does_not_spin_on_a_process_that_is_gone(
    house: House, process: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pidfd that nobody stops watching is readable for ever."""
    child = await a_client_that_holds_nothing(house, process)
    registry = house.daemon.state.registry
    calls: list[KpmdClient] = []
    end_client = registry.end_client

    def counted(client: KpmdClient) -> Ending:
        calls.append(client)
        return end_client(client)

    monkeypatch.setattr(registry, "end_client", counted)
    child.kill()
    await asyncio.sleep(0.05)
    assert len(calls) <= 1


async def test_a_client_whose_last_thing_ends_with_the_restart_is_let_go(
    house: House, process: Actors
) -> None:
    child = await process()
    await a_program(child, lifetime={"kind": "connection"})
    await house.again("kill")
    assert await house.ids("/programs") == []
    registry = house.daemon.state.registry
    assert set(house.daemon.state.clients._pidfds) == {each.id for each in registry.clients}
    child.kill()
    await until(lambda: house.manager.names == [], 2)


@ENDS
async def test_a_link_that_was_being_detached_goes_on(
    house: House, process: Actors, how: str
) -> None:
    child = await process()
    program = await a_program(child)
    made = [await child.post("/links", link(program)) for _ in range(3)]
    gate = Gate()
    house.kernel.hooks[f"close_link {made[0]['kernel_id']}"] = gate
    child.kill()
    await asyncio.to_thread(gate.entered.wait, 10)
    rest = [each["id"] for each in made[1:]]
    ending = asyncio.create_task(house.end(how))
    await until(lambda: house.daemon.state.closing._stopped)
    gate.open()
    await ending
    # The one that had begun is through; the rest is for the next daemon, and attached as yet.
    assert set(house.references()) >= {each["kernel_id"] for each in made[1:]}
    assert made[0]["kernel_id"] not in house.references()
    assert [each for each in house.manager.names if each.startswith("lnk-")] == sorted(rest)
    await house.start()
    await until(lambda: not house.references())
    told = await house.history()
    for id_ in rest:
        assert [each[1:] for each in told if each[0] == id_] == [
            ("detaching", "client-gone"),
            ("ended", "client-gone"),
        ]
    assert (program, "ended", "client-gone") in told
    assert not [each for each in house.manager.names if each.startswith(("lnk", "prg"))]


async def test_a_deleted_program_is_not_usable_after_the_restart(house: House) -> None:
    """Its deletion was under way: the next daemon carries it through."""
    program = await a_program(house.client, lifetime=PERSISTENT)
    made = [await house.client.post("/links", link(program, lifetime=PERSISTENT)) for _ in range(2)]
    gates = [Gate(), Gate()]
    for each, gate in zip(made, gates, strict=True):
        house.kernel.hooks[f"close_link {each['kernel_id']}"] = gate
    registry = house.daemon.state.registry
    caller_ = next(iter(registry.clients))
    ending = registry.release_client(caller_)
    house.daemon.state.closing.later(ending)
    await until(lambda: any(gate.entered.is_set() for gate in gates))
    stopping = asyncio.create_task(house.end("kill"))
    await until(lambda: house.daemon.state.closing._stopped)
    for gate in gates:
        gate.open()
    await stopping
    await house.start()
    await until(lambda: not house.references())
    assert await house.ids("/programs") == []
    reasons = {each[2] for each in await house.history() if each[0].startswith(("lnk", "prg"))}
    assert reasons == {"client-released"}


@ENDS
async def test_leases_keep_their_deadlines(house: House, how: str) -> None:
    renewed, shortened, kept = [await a_lease(house.client, 60) for _ in range(3)]
    house.now += 50
    for id_, body in ((renewed, {}), (shortened, {"ttl": 20.5})):
        assert (await house.client.request("PUT", f"/leases/{id_}", body)).status == 200
    await house.end(how)
    house.now += 15
    await house.start()
    assert await house.ids("/leases") == sorted([renewed, shortened])
    await house.client.refused("GET", f"/leases/{kept}", status=410, kind="gone")
    found = await house.client.get(f"/leases/{shortened}")
    assert found["ttl"] == 20.5
    house.now += 5.5
    await house.client.refused("GET", f"/leases/{shortened}", status=410, kind="gone")
    assert (await house.client.request("PUT", f"/leases/{renewed}")).json["ttl"] == 60
    # And the timer of the next daemon runs for them.
    await house.again(how)
    house.daemon.state.lease_timer._due()
    assert await house.ids("/leases") == [renewed]
    house.now += 60
    house.daemon.state.lease_timer._due()
    assert await house.ids("/leases") == []


async def test_nothing_stays_in_the_store_of_what_has_ended(house: House, process: Actors) -> None:
    child = await process()
    lease = await a_lease(child)
    for life in (PROCESS, PERSISTENT, on(lease)):
        await a_link(child, await a_program(child, lifetime=life), lifetime=life)
    assert len(house.manager.names) == 8
    for each in [*await house.ids("/links")]:
        await house.client.delete(f"/links/{each}")
    assert [each[:3] for each in house.manager.names] == ["cli", "lse", "prg", "prg", "prg"]
    await house.client.delete(f"/leases/{lease}")
    for each in await house.ids("/programs"):
        await house.client.delete(f"/programs/{each}")
    await until(lambda: [each[:3] for each in house.manager.names] == ["cli"])
    child.kill()
    await until(lambda: house.manager.names == [])
    assert house.daemon.state.carrier._bundles == {}


async def test_a_deleted_link_is_detached_however_busy_the_manager_is(house: House) -> None:
    """The real one closes what it is told to remove when it finds the time: it must not matter."""
    program = await a_program(house.client, lifetime=PERSISTENT)
    made = await house.client.post("/links", link(program, lifetime=PERSISTENT))
    assert house.references()[made["kernel_id"]] == 2
    house.manager.pump()
    house.manager.busy = True
    await house.client.delete(f"/links/{made['id']}")
    assert made["kernel_id"] not in house.references()
    house.manager.busy = False
    await house.again("kill")
    assert await house.ids("/links") == []


async def test_a_removal_that_the_manager_never_got_leaves_nothing_behind(house: House) -> None:
    made = await a_link(house.client, lifetime=PERSISTENT)
    (entry,) = [each for each in house.manager.store if each.name == made]
    copy = os.dup(entry.fd)
    await house.client.delete(f"/links/{made}")
    house.manager.keep(made, copy)
    os.close(copy)
    await house.again("kill")
    assert await house.ids("/links") == []
    await until(lambda: made not in house.manager.names)


async def test_without_a_manager_nothing_survives_and_all_works(kernel: FakeKernel) -> None:
    served = await Served.start(kernel)
    try:
        async with Client(served.path) as client:
            assert (await client.get("/capabilities"))["survives_restart"] is False
            for life in (PROCESS, PERSISTENT):
                await a_link(client, lifetime=life)
            lease = await a_lease(client)
            await a_link(client, lifetime=on(lease))
    finally:
        await served.stop()
    assert not kernel.attached
    assert not kernel.loaded


async def test_with_one_it_says_so_and_a_real_stop_ends_everything(house: House) -> None:
    assert (await house.client.get("/capabilities"))["survives_restart"] is True
    lease = await a_lease(house.client)
    await a_link(house.client, lifetime=PERSISTENT)
    await a_link(house.client, lifetime=on(lease))
    await house.daemon.stop()
    assert house.references() == Counter()
    assert house.manager.names == []
