"""GET and DELETE of clients, and what one user can see of another."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.contract import Answer
from tests.http.samples import PERSISTENT, Gate, a_link, a_program, as_http, elf, link
from tests.http.serving import Client, Served, until

Actors = Callable[..., Awaitable[Actor]]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


def own_command() -> str:
    """The kernel's name for this process."""
    with open("/proc/self/comm", encoding="utf-8") as file:
        return file.read().rstrip("\n")


@pytest.mark.every_loop
async def test_this_process_as_a_client(client: Client) -> None:
    (me,) = (await client.get("/clients"))["items"]
    assert (me["pid"], me["uid"], me["gid"]) == (os.getpid(), os.getuid(), os.getgid())
    assert me["id"].startswith("cli-")
    assert me["command"] == own_command()
    assert (me["links"], me["programs"]) == (0, 0)
    program = await a_program(client)
    await a_link(client, program)
    found = await client.get(f"/clients/{me['id']}")
    assert (found["links"], found["programs"]) == (1, 1)
    assert found["since"] == me["since"]


async def test_pages_of_clients(client: Client, actor: Actors) -> None:
    await client.get("/healthz")
    children = [await actor() for _ in range(4)]
    for child in children:
        await child.get("/healthz")
    pids = [os.getpid(), *(child.pid for child in children)]
    page = await client.get("/clients?limit=2")
    assert [each["pid"] for each in page["items"]] == pids[:2]
    children[0].kill()
    await until(lambda: not os.path.exists(f"/proc/{pids[1]}"))
    page = await client.get(f"/clients?limit=3&after={page['next']}")
    assert [each["pid"] for each in page["items"]] == pids[2:]
    assert page["next"] is None


async def test_releasing_a_client_ends_all_it_holds(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor(NOBODY)
    program = await a_program(child, lifetime=PERSISTENT)
    await a_link(child, program, lifetime=PERSISTENT)
    await a_link(child, symbols=["vfs_open"])
    mine = await a_link(client)
    owner = next(
        each for each in (await client.get("/clients"))["items"] if each["pid"] == child.pid
    )
    await client.delete(f"/clients/{owner['id']}")
    assert [each["id"] for each in (await client.get("/links"))["items"]] == [mine]
    assert len(kernel.attached) == len(kernel.loaded) == 1
    # It is still there, and can begin anew.
    assert (await child.get(f"/clients/{owner['id']}"))["links"] == 0
    await a_link(child)
    child.kill()
    await until(lambda: len(kernel.attached) == len(kernel.loaded) == 1)


async def test_releasing_oneself(client: Client, kernel: FakeKernel) -> None:
    made = await a_link(client)
    me = (await client.get(f"/links/{made}"))["client"]
    await client.delete(f"/clients/{me}")
    assert not kernel.attached
    assert not kernel.loaded
    await client.delete(f"/clients/{me}")


async def test_a_release_keeps_a_program_that_another_clients_link_needs(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    mine = await a_link(client, program)
    owner = (await client.get(f"/programs/{program}"))["client"]
    await client.delete(f"/clients/{owner}")
    assert len(kernel.attached) == len(kernel.loaded) == 1
    await client.delete(f"/links/{mine}")
    assert not kernel.loaded


@pytest.mark.parametrize("id_", ["cli-", "cli-0", "%00", "me"])
async def test_clients_that_do_not_exist(client: Client, id_: str) -> None:
    await client.refused("GET", f"/clients/{id_}", status=404, kind="not-found")
    await client.refused("DELETE", f"/clients/{id_}", status=404, kind="not-found")


async def test_the_identity_is_the_kernels_not_the_requests(client: Client, actor: Actors) -> None:
    child = await actor(NOBODY)
    program = await a_program(child)
    found = await client.get(f"/programs/{program}")
    assert found["owner"]["uid"] == NOBODY
    owner = await client.get(f"/clients/{found['client']}")
    assert (owner["pid"], owner["uid"], owner["gid"]) == (child.pid, NOBODY, NOBODY)


def shape(answer: Answer, *ids: str) -> tuple[int, bytes, dict[str, str]]:
    """An answer without the ids in it and what differs from request to request."""
    body = answer.body
    for id_ in ids:
        body = body.replace(id_.encode(), b"ID")
    kept = {
        name.lower(): value
        for name, value in answer.headers.items()
        if name.lower() not in ("x-request-id", "date", "content-length")
    }
    return answer.status, body, kept


async def mine(client: Client) -> dict[str, str]:
    """One of everything of this user (an administrator), by the path's first part."""
    made = await client.post("/programs", elf())
    program = made["programs"][0]["id"]
    linked = await client.post("/links", link(program))
    return {
        "programs": program,
        "maps": made["maps"][0]["id"],
        "links": linked["id"],
        "clients": linked["client"],
    }


CALLS = [
    ("GET", "programs", ""),
    ("DELETE", "programs", ""),
    ("DELETE", "programs", "?force=true"),
    ("GET", "maps", ""),
    ("GET", "maps", "/entries"),
    ("GET", "maps", "/entries?limit=0"),
    ("GET", "maps", "/entries?after=00"),
    ("GET", "maps", "/entries?after=zz"),
    ("GET", "maps", "/entries/" + "00" * 8),
    ("GET", "maps", "/entries/zz"),
    ("GET", "maps", "/entries/00"),
    ("GET", "links", ""),
    ("GET", "links", "/targets"),
    ("GET", "links", "/targets?after=x"),
    ("GET", "links", "/targets?after=999"),
    ("DELETE", "links", ""),
    ("PUT", "links", "/program"),
    ("PUT", "links", "/pin"),
    ("DELETE", "links", "/pin"),
    ("GET", "clients", ""),
    ("DELETE", "clients", ""),
]


async def test_what_is_anothers_looks_like_what_is_not_there(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    ids = await mine(client)
    nobody = await actor(NOBODY)
    for method, what, rest in CALLS:
        id_ = ids[what]
        missing = id_[:4] + "0" * (len(id_) - 4)
        his = await nobody.request(method, f"/{what}/{id_}{rest}")
        none = await nobody.request(method, f"/{what}/{missing}{rest}")
        assert shape(his, id_) == shape(none, missing), (method, what, rest)
        assert his.status in (404, 422)
    body = link(ids["programs"])
    his = await nobody.request("POST", "/links", body)
    none = await nobody.request("POST", "/links", {**body, "program": "prg-" + "0" * 24})
    assert shape(his, ids["programs"]) == shape(none, "prg-" + "0" * 24)
    assert his.status == 404
    # And nothing of it happened.
    assert len(kernel.attached) == 1
    assert len(kernel.loaded) == 2


async def test_lists_have_only_the_callers_own(client: Client, actor: Actors) -> None:
    ids = await mine(client)
    nobody = await actor(NOBODY)
    his_program = await a_program(nobody)
    his_link = await a_link(nobody, his_program)

    async def listed(of: Any, path: str) -> list[str]:
        return [each["id"] for each in (await of.get(path))["items"]]

    assert await listed(nobody, "/programs") == [his_program]
    assert await listed(nobody, "/links") == [his_link]
    assert await listed(nobody, "/maps") == []
    (him,) = (await nobody.get("/clients"))["items"]
    assert him["pid"] == nobody.pid
    for query in (f"program={ids['programs']}", f"client={ids['clients']}"):
        assert await listed(nobody, f"/links?{query}") == []
    assert len(await listed(client, "/programs")) == 3
    assert await listed(client, "/links") == [ids["links"], his_link]
    assert await listed(client, f"/links?program={his_program}") == [his_link]
    assert len(await listed(client, "/clients")) == 2


async def test_pages_do_not_show_how_much_others_have(client: Client, actor: Actors) -> None:
    nobody = await actor(NOBODY)
    own = []
    for _ in range(3):
        own.append(await a_program(nobody))
        for _ in range(3):
            await a_program(client)
    page = await nobody.get("/programs?limit=2")
    assert [each["id"] for each in page["items"]] == own[:2]
    page = await nobody.get(f"/programs?limit=2&after={page['next']}")
    assert [each["id"] for each in page["items"]] == own[2:]
    assert page["next"] is None


async def test_processes_of_one_user_share_what_they_have(actor: Actors) -> None:
    first, second = await actor(NOBODY), await actor(NOBODY)
    program = await a_program(first)
    made = await a_link(second, program)
    assert (await first.get(f"/links/{made}"))["owner"]["uid"] == NOBODY
    assert (await first.request("DELETE", f"/links/{made}")).status == 204


async def test_users_other_than_those_two_are_strangers_too(
    client: Client, actor: Actors, kernel: FakeKernel
) -> None:
    nobody, another = await actor(NOBODY), await actor(NOBODY - 1)
    made = await a_link(nobody)
    answer = await another.request("DELETE", f"/links/{made}")
    assert answer.status == 404
    assert (await another.get("/links"))["items"] == []
    assert (await client.get(f"/links/{made}"))["owner"] == {
        "uid": NOBODY,
        "user": "nobody",
    }
    his = await a_program(another)
    assert (await client.get(f"/programs/{his}"))["owner"]["uid"] == NOBODY - 1
    await client.delete(f"/links/{made}")
    assert not kernel.attached


async def test_an_administrator_may_link_anothers_program(
    client: Client, actor: Actors, kernel: FakeKernel
) -> None:
    nobody = await actor(NOBODY)
    program = await a_program(nobody)
    made = await a_link(client, program)
    assert (await client.get(f"/links/{made}"))["owner"]["uid"] == 0
    # It is the administrator's link: the program's owner does not see it.
    assert (await nobody.get("/links"))["items"] == []
    assert (await nobody.get(f"/links?program={program}"))["items"] == []


async def test_only_administrators_refresh(served: Served, client: Client, actor: Actors) -> None:
    nobody = await actor(NOBODY)
    answer = await nobody.request("GET", "/capabilities?refresh=true")
    assert (answer.status, answer.kind) == (403, "forbidden")
    assert "administrators" in answer.json["detail"]
    assert served.kernel.calls.count("test_feature") == 0
    assert re.fullmatch(rb'\{"kernel".*\}', (await nobody.request("GET", "/capabilities")).body)
    assert served.kernel.calls.count("test_feature") == len(served.kernel.features)
    await nobody.get("/capabilities?refresh=false")
    await client.get("/capabilities?refresh=true")
    assert served.kernel.calls.count("test_feature") == 2 * len(served.kernel.features)


async def test_ids_cannot_be_guessed(client: Client) -> None:
    made = [await a_program(client) for _ in range(3)]
    assert len(set(made)) == 3
    assert all(re.fullmatch(r"prg-[0-9a-f]{24,}", each) for each in made)


async def test_one_users_slow_loads_do_not_stop_others(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    """A load can take seconds; any number of them must leave room for others' requests."""
    made = await a_link(client)
    nobody = await actor(NOBODY)
    gate = kernel.hooks["load_object"] = Gate()
    for connection in range(20):
        await nobody.do("send", connection, as_http("/programs", elf()))
    await asyncio.to_thread(gate.entered.wait, 10)
    try:
        async with asyncio.timeout(2):
            await client.get(f"/links/{made}")
            await client.delete(f"/links/{made}")
    finally:
        gate.open()
