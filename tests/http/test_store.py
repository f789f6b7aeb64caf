"""An FD store that is full, gone, or holds what nobody can read."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kpmd.core.carried import VERSION
from kpmd.runtime.notify import Notifier
from tests.fakes.kernel import FakeKernel, symbol_files
from tests.fakes.systemd import Manager
from tests.http.actor import NOBODY, Actor
from tests.http.house import House, a_lease, on
from tests.http.samples import PERSISTENT, PROCESS, a_link, a_program, elf, instructions, link
from tests.http.serving import until

Actors = Callable[..., Awaitable[Actor]]

CONNECTION = {"kind": "connection"}

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


async def lasting(house: House) -> list[tuple[str, Any]]:
    """Requests for what must outlive the daemon."""
    program = await a_program(house.client, lifetime=CONNECTION)
    lease = (await house.client.get("/leases"))["items"][0]["id"]
    return [
        ("/links", link(program, lifetime=PERSISTENT)),
        ("/links", link(program, lifetime=on(lease))),
        ("/programs", instructions(lifetime=PERSISTENT)),
        ("/programs", elf(lifetime=on(lease))),
        ("/leases", {"ttl": 60}),
    ]


async def refuse_all(house: House, status: int, kind: str) -> list[Any]:
    """They are all refused so, and nothing comes of any of them: the answers."""
    requests = await lasting(house)
    before, names = house.references(), house.manager.names
    held = [await house.ids(path) for path in ("/links", "/programs", "/maps", "/leases")]
    answers = [
        await house.client.refused("POST", path, body, status=status, kind=kind)
        for path, body in requests
    ]
    await until(lambda: house.references() == before)
    assert held == [await house.ids(path) for path in ("/links", "/programs", "/maps", "/leases")]
    assert house.manager.names == names
    return answers


async def test_a_full_store_refuses_what_must_outlive_the_daemon(
    house: House, process: Actors, caplog: pytest.LogCaptureFixture
) -> None:
    await a_lease(house.client)
    # The client, the lease, and the program that the requests are made with.
    house.daemon.state.carrier._store.capacity = 3  # type: ignore[union-attr]
    for told in await refuse_all(house, 429, "quota"):
        assert "all 3 are taken" in told["detail"]
    # What lives as long as a process works all the same, and says in the log what it lacks.
    with caplog.at_level(logging.WARNING, "kpmd.carrier"):
        made = await a_link(house.client, lifetime=PROCESS)
    assert "the FD store is full" in [record.message for record in caplog.records]
    await house.client.delete(f"/links/{made}")
    # When something has gone there is room again.
    await house.client.delete(f"/leases/{(await house.ids('/leases'))[0]}")
    await until(lambda: len(house.manager.names) == 2)
    await a_lease(house.client)


async def test_what_a_full_store_did_not_take_ends_with_the_daemon(
    house: House, process: Actors
) -> None:
    program = await a_program(house.client)
    house.daemon.state.carrier._store.capacity = 2  # type: ignore[union-attr]
    await a_link(house.client, program)
    await house.again("kill")
    assert await house.ids("/programs") == [program]
    assert await house.ids("/links") == []


async def test_a_client_for_which_there_was_no_room_is_stored_later(
    house: House, process: Actors
) -> None:
    """Else all that it makes from then on ends at the next restart, though its process lives."""
    lease = await a_lease(house.client)
    store = house.daemon.state.carrier._store
    assert store is not None
    store.capacity = 2
    child = await process()
    await a_program(child)
    store.capacity = 512
    made = await a_link(child)
    owner = (await house.client.get(f"/links/{made}"))["client"]
    assert owner in house.manager.names
    await house.again("kill")
    assert await house.ids("/links") == [made]
    await house.client.delete(f"/leases/{lease}")


async def test_a_smaller_store_than_before(house: House) -> None:
    """FileDescriptorStoreMax= was lowered: what is there stays there, and can be ended."""
    made = [await a_link(house.client, lifetime=PERSISTENT) for _ in range(3)]
    house.manager.capacity = 2
    await house.again()
    assert await house.ids("/links") == sorted(made)
    async with asyncio.timeout(3):
        await house.client.delete(f"/links/{made[0]}")
    assert made[0] not in house.manager.names
    assert len(house.references()) == 5


async def test_a_manager_that_is_gone_is_an_error_of_the_kernels(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    await a_lease(house.client)
    await a_program(house.client)
    requests = await lasting(house)
    before = house.references()
    house.manager.hide()
    for path, body in requests:
        told = await house.client.refused("POST", path, body, status=500, kind="kernel")
        assert told["errno"] == "ENOENT"
    await until(lambda: house.references() == before)
    await a_link(house.client, lifetime=PROCESS)
    # What was stored can be ended: it is taken out of what the manager holds.
    for each in await house.ids("/links"):
        await house.client.delete(f"/links/{each}")
    house.manager.show()


BROKEN = ["garbage", "no JSON behind the head", "another version", "no head", "not an object"]


def rewrite(manager: Manager, name: str, how: str) -> None:
    """Break a state where it lies, as nothing that kpmd does could."""
    for fds in manager.messages(name):
        state = fds[0]
        raw = os.pread(state, os.fstat(state).st_size, 0)
        head, body = json.loads(raw[:256]), raw[256:]
        if how == "garbage":
            raw = b"\xff\x00garbage" * 100
        elif how == "no JSON behind the head":
            raw = raw[:256] + body[: len(body) // 2]
        elif how in ("another version", "this version"):
            number = 999 if how == "another version" else VERSION
            raw = json.dumps(head | {"kpmd": number}).encode().ljust(255) + b"\n" + body
        elif how == "no head":
            raw = b""
        elif how == "not an object":
            raw = b"[]".ljust(255) + b"\n" + body
        os.ftruncate(state, 0)
        os.pwrite(state, raw, 0)
        return


@root
@pytest.mark.parametrize("how", BROKEN)
async def test_what_has_a_state_that_cannot_be_read_is_there_for_administrators(
    house: House, process: Actors, how: str
) -> None:
    nobody = await process(NOBODY)
    loaded = await nobody.post("/programs", elf(lifetime=PERSISTENT))
    program, other = (each["id"] for each in loaded["programs"])
    made = await nobody.post("/links", link(program, lifetime=PERSISTENT))
    kernel_id, held = made["kernel_id"], len(house.references())
    for id_ in (program, made["id"]):
        rewrite(house.manager, id_, how)
    await house.again("kill")
    nobody = await process(NOBODY)
    # It is there, under the same ids, and whose it was nobody knows any more.
    found = await house.client.get(f"/links/{made['id']}")
    assert (found["kernel_id"], found["program"], found["count"]) == (kernel_id, program, 1)
    assert (found["owner"]["uid"], found["lifetime"]) == (0, PERSISTENT)
    assert "kpmd" in found["labels"]
    assert (await nobody.request("GET", f"/links/{made['id']}")).status == 404
    for path in (f"/links/{made['id']}/targets", f"/links/{made['id']}/skipped"):
        assert (await house.client.get(path))["items"] == []
    orphan = await house.client.get(f"/programs/{program}")
    assert (orphan["name"], orphan["links"]) == ("count", 1)
    assert "kpmd" in orphan["labels"]
    # Its other program has its state, and its map with it.
    assert (await house.client.get(f"/programs/{other}"))["owner"]["uid"] == NOBODY
    (map_,) = (await house.client.get("/maps"))["items"]
    assert sorted(map_["programs"]) == sorted([program, other])
    assert len(house.references()) == held
    # Again: it does not get lost on the way.
    await house.again("kill")
    assert (await house.client.get(f"/links/{made['id']}"))["program"] == program
    # It can be ended like anything else.
    await house.client.refused("DELETE", f"/programs/{program}", status=409, kind="conflict")
    await house.client.delete(f"/links/{made['id']}")
    assert kernel_id not in house.references()
    for id_ in (program, other):
        await house.client.delete(f"/programs/{id_}")
    assert house.references() == Counter()
    await house.daemon.stop(keep=True)
    assert house.manager.names == []


async def test_a_bare_file_descriptor_can_be_ended_too(house: House, kernel: FakeKernel) -> None:
    """One that is not in a queue: whoever put it there, it must be possible to be rid of it."""
    made = await house.client.post("/links", link(await a_program(house.client)))
    name = "lnk-" + "0" * 24
    house.manager.keep(name, kernel.links[0].fd.fileno())
    await house.again("kill")
    found = await house.client.get(f"/links/{name}")
    assert found["kernel_id"] == made["kernel_id"]
    assert "kpmd" in found["labels"]
    await house.client.delete(f"/links/{name}")
    await house.client.delete(f"/links/{made['id']}")
    assert name not in house.manager.names
    assert made["kernel_id"] not in house.references()


@pytest.mark.parametrize("name", ["lnk-1", "prg-1", "cli-1", "lse-1"])
async def test_what_is_nothing_of_the_kernels_is_thrown_out(house: House, name: str) -> None:
    """A memfd, an empty socket, and a socket with something else in it."""
    memfd = os.memfd_create("x")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(b"what is this")
        house.manager.keep(f"{name}a", memfd)
        house.manager.keep(f"{name}b", ours.fileno())
        house.manager.keep(f"{name}c", theirs.fileno())
    os.close(memfd)
    await house.again("kill")
    for path in ("/links", "/programs", "/leases"):
        assert await house.ids(path) == []
    await until(lambda: house.manager.names == [], 2)


async def test_the_other_state_is_lost(house: House, process: Actors) -> None:
    """A lease's: what is bound to it is kept, since nobody can tell when it was to end."""
    lease = await a_lease(house.client)
    made = await a_link(house.client, lifetime=on(lease))
    rewrite(house.manager, lease, "garbage")
    await house.again("kill")
    found = await house.client.get(f"/links/{made}")
    assert found["lifetime"] == PERSISTENT
    assert "kpmd" in found["labels"]
    await house.client.refused("GET", f"/leases/{lease}", status=404, kind="not-found")
    await until(lambda: lease not in house.manager.names)
    # What was said of it holds for the next daemon, too.
    await house.again("kill")
    assert (await house.client.get(f"/links/{made}"))["lifetime"] == PERSISTENT
    await house.client.delete(f"/links/{made}")


@root
async def test_rolled_back_and_upgraded_again(house: House, process: Actors) -> None:
    """An older daemon leaves what it cannot read as it was: the newer one finds all of it again."""
    nobody = await process(NOBODY)
    program = (await nobody.post("/programs", instructions(lifetime=PERSISTENT)))["programs"][0]
    made = await nobody.post("/links", link(program["id"], lifetime=PERSISTENT))
    bound = await nobody.post("/links", link(program["id"], lifetime=PROCESS))
    stored = set(house.manager.names)
    for name in stored:
        rewrite(house.manager, name, "another version")
    await house.again()
    # Held all the while, by administrators alone; what it was bound to is not known here.
    held = {each["id"]: each for each in (await house.client.get("/links"))["items"]}
    assert set(held) == {made["id"], bound["id"]}
    assert {each["owner"]["uid"] for each in held.values()} == {0}
    assert {each["lifetime"]["kind"] for each in held.values()} == {"persistent"}
    for name in held | {program["id"]: None}:
        rewrite(house.manager, name, "this version")
    await house.again()
    found = await house.client.get(f"/links/{made['id']}")
    assert (found["owner"]["uid"], found["labels"]) == (NOBODY, made["labels"])
    assert (found["kernel_id"], found["count"]) == (made["kernel_id"], made["count"])
    # The older one could not know this one's client: it ends with the upgrade.
    await until(lambda: bound["id"] not in house.manager.names)
    assert await house.ids("/links") == [made["id"]]
    await house.client.delete(f"/programs/{program['id']}?force=true")


async def a_large_link(house: House) -> Any:
    """A link of so many parts that its file descriptors are in two messages."""
    house.kernel.most_targets = 1
    program = await a_program(house.client, lifetime=PERSISTENT)
    house.kernel.files = symbol_files(many=300)
    body = link(program, patterns=["many_*"], lifetime=PERSISTENT)
    made = await house.client.post("/links", body)
    assert made["count"] == 300
    assert len(house.manager.entries(made["id"])) == 2
    return made


async def test_a_link_of_many_parts(house: House) -> None:
    made = await a_large_link(house)
    held = house.references()
    await house.again()
    assert house.references() == held
    found = await house.client.get(f"/links/{made['id']}")
    assert found == made
    await house.client.delete(f"/links/{made['id']}")
    assert len(house.references()) == 1
    assert len(house.manager.names) == 2


@pytest.mark.parametrize("which", [0, 1])
async def test_a_link_of_which_only_a_part_was_stored_is_dropped(house: House, which: int) -> None:
    """The daemon was killed in the middle: nobody was told that it was made, or it was ended."""
    made = await a_large_link(house)
    await house.end("kill")
    house.manager.forget(house.manager.entries(made["id"])[which])
    await house.start()
    assert await house.ids("/links") == []
    await until(lambda: len(house.references()) == 1)
    await until(lambda: made["id"] not in house.manager.names)


async def test_a_store_without_room_for_all_parts_takes_none(house: House) -> None:
    store = house.daemon.state.carrier._store
    assert store is not None
    store.capacity = 3  # the client, the program, and one of two
    house.kernel.most_targets = 1
    house.kernel.files = symbol_files(many=300)
    program = await a_program(house.client, lifetime=PERSISTENT)
    body = link(program, patterns=["many_*"], lifetime=PERSISTENT)
    await house.client.refused("POST", "/links", body, status=429, kind="quota")
    await until(lambda: len(house.references()) == 1)
    assert len(house.manager.store) == 2


async def test_the_manager_holds_no_more_than_it_says(house: House) -> None:
    """It drops what is over its limit without a word: kpmd counts, and must not count too low."""
    house.manager.capacity = 4
    await house.again()
    made = []
    while True:
        answer = await house.client.request("POST", "/leases", {"ttl": 60})
        if answer.status != 201:
            break
        made.append(answer.json["id"])
    assert (answer.status, answer.kind) == (429, "quota")
    assert len(house.manager.store) == 4
    assert set(made) <= set(house.manager.names)
    for id_ in made:
        await house.client.delete(f"/leases/{id_}")
    await until(lambda: len(house.manager.store) == 1)
    assert len([await a_lease(house.client) for _ in range(3)]) == 3


async def test_a_hung_up_socket_is_kept_only_because_kpmd_says_so(manager: Manager) -> None:
    """The fake does as systemd does: or no test here would show that FDPOLL=0 is needed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours:
        notifier = Notifier(manager.address)
        notifier.send("FDSTORE=1", "FDNAME=a", fds=[ours.fileno()])
        notifier.send("FDSTORE=1", "FDNAME=b", "FDPOLL=0", fds=[ours.fileno()])
        assert manager.names == ["b"]
        notifier.send("FDSTOREREMOVE=1", "FDNAME=b")
        assert manager.names == []
