"""Things that live as long as one HTTP connection, connections that live for them; and ends."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kpmd.api import connection
from tests.fakes.kernel import FakeKernel
from tests.http.actor import Actor
from tests.http.samples import PERSISTENT, Gate, a_link, a_program, as_http, elf, instructions, link
from tests.http.serving import Client, Served, read_answer, until
from tests.http.streaming import Cut, listening

Actors = Callable[..., Awaitable[Actor]]
Serve = Callable[..., Awaitable[Served]]

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

CONNECTION = {"kind": "connection"}


async def made(child: Actor, connection: int, path: str, body: object) -> Any:
    answer = await child.request("POST", path, body, connection=connection)
    assert answer.status == 201, answer.body
    return answer.json


async def a_program_on(child: Actor, connection: int, **fields: Any) -> str:
    loaded = await made(child, connection, "/programs", instructions(**fields))
    id_: str = loaded["programs"][0]["id"]
    return id_


async def a_link_on(child: Actor, connection: int, program: str, **fields: Any) -> str:
    id_: str = (await made(child, connection, "/links", link(program, **fields)))["id"]
    return id_


@pytest.mark.every_loop
async def test_they_end_with_their_connection_and_no_other(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    programs = [await a_program_on(child, each, lifetime=CONNECTION) for each in (0, 1)]
    links = [await a_link_on(child, each, programs[each], lifetime=CONNECTION) for each in (0, 1)]
    found = await client.get(f"/links/{links[0]}")
    assert found["lifetime"] == CONNECTION
    assert (await client.get(f"/programs/{programs[0]}"))["lifetime"] == CONNECTION
    await child.do("close", 0)
    await until(lambda: len(kernel.loaded) == 1)
    assert [each["id"] for each in (await client.get("/links"))["items"]] == links[1:]
    assert [each["id"] for each in (await client.get("/programs"))["items"]] == programs[1:]
    # The process lives, and is the same client.
    assert (await client.get(f"/clients/{found['client']}"))["links"] == 1
    await child.do("close", 1)
    await until(lambda: not kernel.attached and not kernel.loaded)
    await client.refused("GET", f"/clients/{found['client']}", status=404, kind="not-found")


async def test_they_end_with_their_process_too(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    await a_link_on(child, 0, await a_program_on(child, 0), lifetime=CONNECTION)
    child.kill()
    await until(lambda: not kernel.attached and not kernel.loaded)


async def test_a_connection_that_another_process_has_as_well_is_open(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    """It closes with the last copy of it, wherever that is; the process's own things do not."""
    child = await actor()
    program = await a_program_on(child, 0, lifetime=CONNECTION)
    await a_link_on(child, 0, program, lifetime=CONNECTION)
    await a_link_on(child, 0, program, symbols=["vfs_open"])
    copy = await child.give(0)
    with copy:
        child.kill()
        await until(lambda: len(kernel.attached) == 1)
        assert (await client.get("/links"))["items"][0]["lifetime"] == CONNECTION
    await until(lambda: not kernel.attached and not kernel.loaded)


async def test_what_is_on_it_can_be_deleted_like_all_else(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program_on(child, 0, lifetime=CONNECTION)
    id_ = await a_link_on(child, 0, program, lifetime=CONNECTION)
    await client.delete(f"/links/{id_}")
    assert not kernel.attached
    await client.delete(f"/programs/{program}")
    await child.do("close", 0)
    await until(lambda: not kernel.loaded)


async def test_two_clients(client: Client, kernel: FakeKernel, actor: Actors) -> None:
    """A program of one connection is kept by a link of another client's connection."""
    first, second = await actor(), await actor()
    program = await a_program_on(first, 0, lifetime=CONNECTION)
    own = await a_link_on(first, 0, program, lifetime=CONNECTION)
    lent = await a_link_on(second, 0, program, lifetime=CONNECTION)
    await first.do("close", 0)
    await until(lambda: len(kernel.attached) == 1)
    await client.refused("GET", f"/links/{own}", status=404, kind="not-found")
    assert (await client.get(f"/links/{lent}"))["program"] == program
    assert (await client.get(f"/programs/{program}"))["links"] == 1
    await second.do("close", 0)
    await until(lambda: not kernel.attached and not kernel.loaded)


async def test_a_persistent_link_keeps_a_program_whose_connection_has_closed(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    loaded = await made(child, 0, "/programs", elf(lifetime=CONNECTION))
    used, unused = (each["id"] for each in loaded["programs"])
    kept = await a_link_on(child, 0, used, lifetime=PERSISTENT)
    await child.do("close", 0)
    await until(lambda: len(kernel.loaded) == 1)
    await client.refused("GET", f"/programs/{unused}", status=404, kind="not-found")
    assert len((await client.get("/maps"))["items"]) == 1
    await client.delete(f"/links/{kept}")
    assert not kernel.loaded
    assert not kernel.open_maps


CALLS = {
    "create_link": ("/links", "vfs_read"),
    "load_instructions": ("/programs", ""),
    "load_object": ("/programs", ""),
}


@pytest.mark.parametrize("what", CALLS)
async def test_a_request_whose_connection_is_cut_meanwhile_keeps_nothing(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors, what: str
) -> None:
    child = await actor()
    program = await a_program_on(child, 1)
    bodies: dict[str, tuple[str, Any]] = {
        "create_link": ("/links", link(program, lifetime=CONNECTION)),
        "load_instructions": ("/programs", instructions(lifetime=CONNECTION)),
        "load_object": ("/programs", elf(lifetime=CONNECTION)),
    }
    gate = kernel.hooks[what] = Gate()
    await child.do("send", 0, as_http(*bodies[what]))
    await asyncio.to_thread(gate.entered.wait, 10)
    open_ = served.connections
    await child.do("close", 0)
    await until(lambda: served.connections == open_ - 1)
    gate.open()
    made_ = kernel.links if what == "create_link" else kernel.programs[1:]
    await until(lambda: (kernel.links or kernel.programs[1:]) and not kernel.attached)
    await until(lambda: len(kernel.loaded) == 1 and not kernel.open_maps)
    assert made_ or kernel.links or kernel.programs[1:]
    assert (await client.get("/links"))["items"] == []
    assert [each["id"] for each in (await client.get("/programs"))["items"]] == [program]
    assert (await client.get("/maps"))["items"] == []


async def test_a_link_that_fails_on_a_connection_leaves_nothing_bound_to_it(
    client: Client, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program_on(child, 0)
    kernel.fail["create_link"] = OSError(errno.ENOMEM, "no memory")
    answer = await child.request("POST", "/links", link(program, lifetime=CONNECTION))
    assert answer.status == 500
    assert set(served.state.registry._bound) == {
        (await client.get(f"/programs/{program}"))["client"]
    }


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle connections are closed soon."""
    monkeypatch.setattr(connection, "KEEPALIVE", 0.05)
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)


@pytest.mark.every_loop
async def test_an_idle_connection_is_closed_but_not_one_that_things_live_as_long_as(
    impatient: None, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program_on(child, 0, lifetime=CONNECTION)
    id_ = await a_link_on(child, 0, program, lifetime=CONNECTION)
    for number in (1, 2):
        await child.do("connect", number)
    # One that has asked, and one that never has.
    await child.request("GET", "/healthz", connection=1)
    assert served.connections == 3
    await until(lambda: served.connections == 1)
    # Many times over, the one with the link is not closed.
    await asyncio.sleep(0.2)
    assert served.connections == 1
    assert len(kernel.attached) == 1
    # It still answers; and once nothing lives as long as it, it is idle like any other.
    assert (await child.request("GET", f"/links/{id_}")).status == 200
    assert (await child.request("DELETE", f"/links/{id_}")).status == 204
    await asyncio.sleep(0.1)
    assert served.connections == 1, "the program is there yet"
    assert (await child.request("DELETE", f"/programs/{program}")).status == 204
    await until(lambda: served.connections == 0)


async def test_who_waits_for_a_slow_answer_is_not_idle(
    impatient: None, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program_on(child, 0)
    gate = kernel.hooks["create_link"] = Gate()
    child.begin_request("POST", "/links", link(program))
    await asyncio.to_thread(gate.entered.wait, 10)
    await asyncio.sleep(0.15)
    gate.open()
    assert (await child.result()).status == 201


async def test_two_idle_clients_with_and_without(
    impatient: None, served: Served, kernel: FakeKernel, actor: Actors
) -> None:
    holder, idle = await actor(), await actor()
    await a_link_on(holder, 0, await a_program_on(holder, 0), lifetime=CONNECTION)
    # What lives as long as its process needs no connection.
    await a_link_on(idle, 0, await a_program_on(idle, 0))
    await until(lambda: served.connections == 1)
    assert len(kernel.attached) == 2
    holder.kill()
    await until(lambda: len(kernel.attached) == 1 and served.connections == 0)


async def test_what_was_asked_behind_one_another_ends_with_the_connection(
    served: Served, kernel: FakeKernel
) -> None:
    """Pipelined: two links asked for at once, and the connection closed after the first answer."""
    async with Client(served.path) as client:
        program = await a_program(client)
        reader, writer = await asyncio.open_unix_connection(str(served.path))
        body = link(program, lifetime=CONNECTION)
        writer.write(as_http("/links", body) * 2)
        assert (await read_answer(reader)).status == 201
        writer.close()
        await until(lambda: served.connections == 1)
        await until(lambda: kernel.links and not kernel.attached)
        await until(lambda: not served.state.registry.links)
        await a_link(client, program)


@contextmanager
def few_fds(spare: int) -> Iterator[None]:
    """So many file descriptors are left to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/dev/null", os.O_RDONLY)
    os.close(probe)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, hard))
    try:
        while len(fillers) < highest:
            try:
                fd = os.open("/dev/null", os.O_RDONLY)
            except OSError:
                break
            if fd > highest:
                os.close(fd)
                break
            fillers.append(fd)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)


async def test_out_of_file_descriptors_it_refuses_and_goes_on(
    served: Served, client: Client, actor: Actors
) -> None:
    await client.get("/healthz")
    child = await actor()
    await child.get("/healthz")
    with few_fds(1):
        for number in range(1, 30):
            await child.do("connect", number)
        # Those that are connected are served as before.
        assert (await child.request("GET", "/healthz")).status == 200
        answer = await child.request("POST", "/programs", instructions())
        assert answer.status in (201, 429, 500), answer.body
    for number in range(1, 30):
        await child.do("close", number)
    await child.do("connect", 99)
    assert (await child.request("GET", "/healthz", connection=99)).status == 200


class TestHalfClosed:
    """``printf … | nc -UN``: a client that shuts down its side and reads."""

    async def ask(self, path: Path, data: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(data)
        writer.write_eof()
        try:
            async with asyncio.timeout(10):
                return await reader.read()
        finally:
            writer.close()

    @pytest.mark.every_loop
    async def test_it_gets_its_answers(self, served: Served, client: Client) -> None:
        program = await a_program(client)
        for data, answers in ((GET, 1), (GET * 5, 5), (as_http("/links", link(program)) + GET, 2)):
            got = await self.ask(served.path, data)
            assert got.count(b"HTTP/1.1 20") == answers, got
        await until(lambda: served.connections == 1)

    async def test_what_is_not_whole_is_dropped(self, served: Served) -> None:
        assert await self.ask(served.path, b"") == b""
        assert await self.ask(served.path, GET[:20]) == b""
        await self.ask(served.path, as_http("/links", {"a": 1})[:-1])
        await until(lambda: served.connections == 0)

    async def test_a_stream_ends(self, served: Served) -> None:
        async with listening(served.path) as stream:
            stream._writer.write_eof()
            with pytest.raises((EOFError, Cut)):
                await stream.next()
        await until(lambda: served.connections == 0)
