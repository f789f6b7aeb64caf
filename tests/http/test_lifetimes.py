"""What ends what: processes that die, connections that close, requests that are cut."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.fakes.kernel import FakeKernel
from tests.http.actor import Actor
from tests.http.samples import (
    PERSISTENT,
    Gate,
    a_link,
    a_program,
    as_http,
    elf,
    instructions,
    link,
)
from tests.http.serving import Client, Served, read_answer, until

Actors = Callable[..., Awaitable[Actor]]


@pytest.mark.every_loop
async def test_links_of_a_killed_process_are_detached(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    for symbol in ("vfs_read", "vfs_write", "vfs_open"):
        await a_link(child, program, symbols=[symbol])
    assert len(kernel.attached) == 3
    child.kill()
    await until(lambda: not kernel.attached and not kernel.loaded)
    assert (await client.get("/links"))["items"] == []
    assert (await client.get("/programs"))["items"] == []


async def test_a_process_killed_while_its_first_load_blocks(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    gate = kernel.hooks["load_instructions"] = Gate()
    child = await actor()
    child.begin_request("POST", "/programs", instructions())
    await asyncio.to_thread(gate.entered.wait, 10)
    child.kill()
    await client.get("/healthz")  # the loop has seen the connection close
    gate.open()
    await until(lambda: len(kernel.programs) == 1 and not kernel.loaded)


async def test_a_process_killed_while_its_first_link_blocks(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    program = await a_program(client)
    gate = kernel.hooks["create_link"] = Gate()
    child = await actor()
    child.begin_request("POST", "/links", link(program))
    await asyncio.to_thread(gate.entered.wait, 10)
    child.kill()
    await client.get("/healthz")
    gate.open()
    await until(lambda: len(kernel.links) == 1 and not kernel.attached)
    assert (await client.get("/links"))["items"] == []


async def test_a_process_that_hangs_up_while_its_load_blocks_and_then_dies(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    """The connection is gone before the load ends, the process after it: both ends count."""
    await client.get("/healthz")
    gate = kernel.hooks["load_instructions"] = Gate()
    child = await actor()
    await child.do("send", 0, as_http("/programs", instructions()))
    await asyncio.to_thread(gate.entered.wait, 10)
    await child.do("close", 0)
    await until(lambda: served.connections == 1)
    gate.open()
    await until(lambda: kernel.programs)
    child.kill()
    await until(lambda: not kernel.loaded, 3)


async def test_a_process_that_hangs_up_while_its_link_blocks_and_then_dies(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    program = await a_program(client)
    gate = kernel.hooks["create_link"] = Gate()
    child = await actor()
    await child.do("send", 0, as_http("/links", link(program)))
    await asyncio.to_thread(gate.entered.wait, 10)
    await child.do("close", 0)
    await until(lambda: served.connections == 1)
    gate.open()
    await until(lambda: kernel.links)
    child.kill()
    await until(lambda: not kernel.attached, 3)


async def test_what_a_process_made_after_hanging_up_is_still_listed_under_a_client(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    await client.get("/healthz")
    gate = kernel.hooks["load_instructions"] = Gate()
    child = await actor()
    await child.do("send", 0, as_http("/programs", instructions()))
    await asyncio.to_thread(gate.entered.wait, 10)
    await child.do("close", 0)
    await until(lambda: served.connections == 1)
    gate.open()
    await until(lambda: len(served.state.registry.programs) == 1)
    (program,) = (await client.get("/programs"))["items"]
    assert (await client.get(f"/clients/{program['client']}"))["pid"] == child.pid


@pytest.mark.every_loop
async def test_persistent_things_outlive_their_client(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child, lifetime=PERSISTENT)
    kept = await a_link(child, program, lifetime=PERSISTENT)
    await a_link(child, program, symbols=["vfs_open"])
    owner = (await client.get(f"/links/{kept}"))["client"]
    child.kill()
    await until(lambda: len(kernel.attached) == 1)
    assert [each["id"] for each in (await client.get("/links"))["items"]] == [kept]
    assert [each["id"] for each in (await client.get("/programs"))["items"]] == [program]
    await client.refused("GET", f"/clients/{owner}", status=404, kind="not-found")
    await client.delete(f"/links/{kept}")
    await client.delete(f"/programs/{program}")
    assert not kernel.attached
    assert not kernel.loaded


async def test_a_program_outlives_its_client_as_long_as_a_link_needs_it(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    made = await child.post("/programs", elf())
    used, unused = (each["id"] for each in made["programs"])
    (map_,) = (each["id"] for each in made["maps"])
    kept = await a_link(child, used, lifetime=PERSISTENT)
    child.kill()
    await until(lambda: len(kernel.loaded) == 1)
    await client.refused("GET", f"/programs/{unused}", status=404, kind="not-found")
    assert (await client.get(f"/programs/{used}"))["links"] == 1
    assert (await client.get(f"/maps/{map_}"))["programs"] == [used]
    assert len(kernel.open_maps) == 1
    await client.delete(f"/links/{kept}")
    assert not kernel.loaded
    assert not kernel.open_maps
    await client.refused("GET", f"/programs/{used}", status=404, kind="not-found")
    await client.refused("GET", f"/maps/{map_}", status=404, kind="not-found")


async def test_a_program_is_kept_by_another_clients_link(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    mine = await a_link(client, program)
    child.kill()
    await until(lambda: len(kernel.programs) == 1)
    assert (await client.get(f"/links/{mine}"))["program"] == program
    assert len(kernel.attached) == 1
    await client.delete(f"/links/{mine}")
    await until(lambda: not kernel.loaded)


async def test_a_program_whose_client_dies_while_anothers_link_is_made_is_kept(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    gate = kernel.hooks["create_link"] = Gate()
    asked = asyncio.create_task(client.request("POST", "/links", link(program)))
    await asyncio.to_thread(gate.entered.wait, 10)
    child.kill()
    await child_gone(client, child)
    gate.open()
    answer = await asked
    assert answer.status == 201
    assert len(kernel.loaded) == 1
    await client.delete(f"/links/{answer.json['id']}")
    assert not kernel.loaded


async def test_a_program_whose_client_dies_while_anothers_link_fails_ends(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    gate = kernel.hooks["create_link"] = Gate()
    kernel.fail["create_link"] = OSError(errno.ENOMEM, "no memory")
    asked = asyncio.create_task(client.request("POST", "/links", link(program)))
    await asyncio.to_thread(gate.entered.wait, 10)
    child.kill()
    await child_gone(client, child)
    gate.open()
    assert (await asked).status == 500
    await until(lambda: not kernel.loaded)


async def child_gone(client: Client, child: Actor) -> None:
    """Return when the daemon lists no client any more but this process."""
    deadline = time.monotonic() + 10
    while len((await client.get("/clients"))["items"]) > 1:
        assert time.monotonic() < deadline, "the client was not seen to end"
        await asyncio.sleep(0.005)


async def test_two_connections_of_a_process_are_one_client(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    await child.do("connect", 1)
    answer = await child.request("POST", "/links", link(program), connection=1)
    others = [each for each in (await client.get("/clients"))["items"] if each["pid"] == child.pid]
    assert [each["id"] for each in others] == [answer.json["client"]]
    assert (others[0]["links"], others[0]["programs"]) == (1, 1)


async def test_closing_all_connections_keeps_what_a_living_process_has(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    await client.get("/healthz")
    child = await actor()
    made = await a_link(child)
    await child.do("close", 0)
    await until(lambda: served.connections == 1)
    owner = (await client.get(f"/links/{made}"))["client"]
    assert (await client.get(f"/clients/{owner}"))["links"] == 1
    assert len(kernel.attached) == 1
    # It comes back as the same client, and still dies with its process.
    again = await child.request("GET", f"/clients/{owner}", connection=1)
    assert again.json["pid"] == child.pid
    assert len((await client.get("/clients"))["items"]) == 2
    child.kill()
    await until(lambda: not kernel.attached and not kernel.loaded)


async def test_a_process_without_connection_and_holding_is_forgotten(
    client: Client, served: Served, actor: Actors
) -> None:
    child = await actor()
    await child.get("/healthz")
    assert len((await client.get("/clients"))["items"]) == 2
    await child.do("close", 0)
    await until(lambda: served.connections == 1)
    (left,) = (await client.get("/clients"))["items"]
    assert left["pid"] == os.getpid()


async def test_a_body_cut_off_makes_nothing(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    await client.get("/healthz")
    child = await actor()
    await child.do("send", 0, as_http("/programs", instructions())[:-10])
    await until(lambda: served.connections == 2)
    await child.do("close", 0)
    await until(lambda: served.connections == 1)
    assert kernel.programs == []
    assert (await client.get("/programs"))["items"] == []


async def test_a_request_whose_connection_is_cut_is_still_carried_out(
    client: Client, served: Served, kernel: FakeKernel
) -> None:
    """Its process lives: what was made is its own, and listed."""
    program = await a_program(client)
    gate = kernel.hooks["create_link"] = Gate()
    async with Client(served.path) as other:
        asked = asyncio.create_task(other.request("POST", "/links", link(program)))
        await asyncio.to_thread(gate.entered.wait, 10)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await until(lambda: served.connections == 1)
    gate.open()
    await until(lambda: len(served.state.registry.links) == 1)
    (left,) = (await client.get("/links"))["items"]
    assert left["program"] == program
    await client.delete(f"/links/{left['id']}")
    assert not kernel.attached


async def test_a_connection_that_outlives_its_process_can_bind_nothing_to_it(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    """A socket given to another process still speaks for the one that connected."""
    child = await actor()
    await child.get("/healthz")
    connection = await child.give(0)
    with connection:
        child.kill()
        await child_gone(client, child)
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        for path, body in (
            ("/programs", instructions()),
            ("/links", link(await a_program(client))),
        ):
            writer.write(as_http(path, body))
            answer = await read_answer(reader)
            assert (answer.status, answer.kind) == (410, "gone")
        writer.close()
    assert not kernel.attached
    assert len(kernel.loaded) == 1


async def test_deleting_a_link_answers_only_once_it_is_detached(
    client: Client, kernel: FakeKernel
) -> None:
    made = await a_link(client)
    gate = kernel.hooks["close_link"] = Gate()
    asked = asyncio.create_task(client.request("DELETE", f"/links/{made}"))
    await asyncio.to_thread(gate.entered.wait, 10)
    # The loop goes on meanwhile, and says what it is at.
    found = await client.get(f"/links/{made}")
    assert (found["state"], found["reason"]) == ("detaching", "deleted")
    again = asyncio.create_task(client.request("DELETE", f"/links/{made}"))
    await client.get("/healthz")
    assert not asked.done()
    assert not again.done()
    assert len(kernel.attached) == 1
    gate.open()
    assert (await asked).status == (await again).status == 204
    assert not kernel.attached
    await client.refused("GET", f"/links/{made}", status=404, kind="not-found")


async def test_forced_deletion_and_release_answer_only_once_all_is_detached(
    client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    made = await a_link(client, program)
    owner = (await client.get(f"/links/{made}"))["client"]
    for path in (f"/programs/{program}?force=true", f"/clients/{owner}"):
        gate = kernel.hooks["close_link"] = Gate()
        asked = asyncio.create_task(client.request("DELETE", path))
        await asyncio.to_thread(gate.entered.wait, 10)
        await client.get("/healthz")
        assert not asked.done()
        gate.open()
        assert (await asked).status == 204
        assert not kernel.attached
        del kernel.hooks["close_link"]
        program = await a_program(client)
        made = await a_link(client, program)


async def test_a_dying_client_does_not_keep_others_waiting(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    """Its closes queue behind one another; another client's requests do not queue behind them."""
    child = await actor()
    program = await a_program(child)
    for _ in range(20):
        await a_link(child, program)
    mine = await a_program(client)
    gate = kernel.hooks["close_link"] = Gate()
    child.kill()
    await asyncio.to_thread(gate.entered.wait, 10)
    await a_link(client, mine)
    gate.open()
    await until(lambda: len(kernel.attached) == 1)


async def test_many_processes_killed_at_once(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    children = [await actor() for _ in range(4)]
    for child in children:
        program = await a_program(child)
        await a_link(child, program)
        child.begin_request("POST", "/links", link(program, symbols=["vfs_write"]))
    for child in children:
        child.kill()
    await until(lambda: not kernel.attached and not kernel.loaded)
    assert (await client.get("/links"))["items"] == []


async def test_stopping_while_a_link_is_made_leaves_nothing_open(
    served: Served, kernel: FakeKernel
) -> None:
    async with Client(served.path) as client:
        program = await a_program(client)
        await a_link(client, program)
        gate = kernel.hooks["create_link"] = Gate()
        asked = asyncio.create_task(client.request("POST", "/links", link(program)))
        await asyncio.to_thread(gate.entered.wait, 10)
        stopping = asyncio.create_task(served.stop())
        await until(lambda: served.state.stopping)
        gate.open()
        await stopping
        answer = await asked
    assert (answer.status, answer.kind) == (503, "shutting-down")
    assert not kernel.attached
    assert not kernel.loaded
    assert not kernel.started


@pytest.mark.parametrize("what", ["create_link", "load_instructions"])
async def test_stopping_does_not_wait_for_ever_and_still_leaves_nothing_open(
    serve: Callable[..., Awaitable[Served]], kernel: FakeKernel, what: str
) -> None:
    """The request outlasts the time that stopping gives it: it is cancelled, its FD closed."""
    served = await serve(kernel, shutdown_seconds=0.05)
    async with Client(served.path) as client:
        program = await a_program(client)
        gate = kernel.hooks[what] = Gate()
        call: dict[str, tuple[str, object]] = {
            "create_link": ("/links", link(program)),
            "load_instructions": ("/programs", instructions()),
        }
        asked = asyncio.create_task(client.request("POST", *call[what]))
        await asyncio.to_thread(gate.entered.wait, 10)
        stopping = asyncio.create_task(served.stop())
        # It waits in vain, gives the request up, and closes what else there is.
        await until(lambda: not kernel.loaded)
        await asyncio.wait([stopping], timeout=0.05)
        assert not stopping.done()
        gate.open()
        await stopping
        await asyncio.gather(asked, return_exceptions=True)
    assert not kernel.attached
    assert not kernel.loaded
