"""GET /work: what the daemon is doing at this moment, and how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kpmd.bpf.features import Answer as FeatureAnswer
from kpmd.core.policy import Policy
from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.samples import ELF, Gate, a_link, a_program, elf, instructions, link
from tests.http.serving import Client, Served, until
from tests.http.test_detaching import Turnstile

Actors = Callable[..., Awaitable[Actor]]


@pytest.fixture
def steps(kernel: FakeKernel) -> Turnstile:
    """Lets the kernel tell how far it is one step at a time."""
    made = kernel.hooks["progress"] = Turnstile()
    return made


async def work(client: Client | Actor) -> list[dict[str, Any]]:
    found = await client.get("/work")
    assert found["next"] is None
    items: list[dict[str, Any]] = found["items"]
    return items


async def only(client: Client | Actor) -> dict[str, Any]:
    (found,) = await work(client)
    return found


async def at_step(steps: Turnstile, number: int) -> None:
    await until(lambda: steps.entered == number)


def how_far(item: dict[str, Any]) -> tuple[str, int | None, int | None]:
    return item["phase"], item["done"], item["total"]


@pytest.mark.every_loop
async def test_a_load_program_by_program(client: Client, steps: Turnstile) -> None:
    assert await work(client) == []
    loading = asyncio.create_task(client.post("/programs", elf()))
    await until(lambda: steps.entered == 1)
    first = await only(client)
    assert first["id"].startswith("wrk-")
    assert (first["what"], first["own"], first["name"]) == ("load", True, "count")
    assert how_far(first) == ("verifying", 0, None)
    assert not {"link", "program"} & first.keys()
    steps.let()
    await until(lambda: steps.entered == 2)
    second = await only(client)
    assert second == first | {"name": "other", "done": 1}
    steps.let()
    made = await loading
    assert second["client"] == made["programs"][0]["client"]
    assert second["owner"] == made["programs"][0]["owner"]
    assert await work(client) == []


async def test_how_many_programs_where_they_are_named(client: Client, steps: Turnstile) -> None:
    body = {"source": {"kind": "object", "elf": ELF, "programs": ["count"]}}
    loading = asyncio.create_task(client.post("/programs", body))
    await until(lambda: steps.entered)
    assert how_far(await only(client)) == ("verifying", 0, 1)
    steps.let()
    await loading


async def test_functions_attached_one_by_one(
    client: Client, kernel: FakeKernel, steps: Turnstile
) -> None:
    no = FeatureAnswer(False, "no CONFIG_FPROBE")
    kernel.answers.update({"bpf_link_kprobe_multi": no, "bpf_link_kprobe_session": no})
    program = await a_program(client)
    body = link(program, symbols=["vfs_read", "vfs_write", "vfs_open"])
    attaching = asyncio.create_task(client.post("/links", body))
    for done in range(3):
        await at_step(steps, done + 1)
        found = await only(client)
        assert how_far(found) == ("attaching", done, 3)
        assert (found["what"], found["program"], found["name"]) == ("attach", program, "probe")
        steps.let()
    await attaching
    assert await work(client) == []


async def test_of_all_at_once_the_kernel_does_not_tell(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    gate = kernel.hooks["create_link"] = Gate()
    body = link(program, symbols=["vfs_read", "vfs_write"])
    attaching = asyncio.create_task(client.post("/links", body))
    await asyncio.to_thread(gate.entered.wait, 10)
    assert how_far(await only(client)) == ("attaching", None, 2)
    gate.open()
    await attaching


async def test_detaching_and_what_waits_for_its_turn(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    other = await actor()
    program = await a_program(other)
    links = [await a_link(other, program, symbols=["vfs_read", "vfs_open"]) for _ in range(4)]
    owner = (await client.get(f"/links/{links[0]}"))["client"]
    slow = kernel.hooks["close_link"] = Turnstile()
    ending = asyncio.create_task(client.request("DELETE", f"/programs/{program}?force=true"))
    await until(lambda: slow.entered == 2)
    found = await work(client)
    assert {each["link"] for each in found} == set(links)
    # Two at a time; the others are in the queue.
    assert [how_far(each) for each in found] == [
        *[("detaching", None, 2)] * 2,
        *[("queued", None, 2)] * 2,
    ]
    assert {(each["what"], each["program"]) for each in found} == {("detach", program)}
    # It is told of who made them, which is not who asks.
    assert {(each["client"], each["own"]) for each in found} == {(owner, False)}
    page = await client.get("/work?limit=3")
    assert page["items"] == found[:3]
    rest = await client.get(f"/work?limit=3&after={page['next']}")
    assert (rest["items"], rest["next"]) == (found[3:], None)
    slow.let(4)
    assert (await ending).status == 204
    assert await work(client) == []


async def test_waiting_for_a_thread_is_shown(client: Client, kernel: FakeKernel) -> None:
    gate = kernel.hooks["load_instructions"] = Gate()
    asked = [asyncio.create_task(client.post("/programs", instructions())) for _ in range(6)]
    await until(lambda: kernel.calls.count("load_instructions") == 4)
    phases = [each["phase"] for each in await work(client)]
    # A user has half of the threads, however many requests.
    assert (phases.count("parsing"), phases.count("queued")) == (4, 2)
    gate.open()
    await asyncio.gather(*asked)
    assert await work(client) == []


@pytest.mark.parametrize("call", ["load_instructions", "create_link"])
async def test_what_failed_is_over(client: Client, kernel: FakeKernel, call: str) -> None:
    program = await a_program(client)
    kernel.fail[call] = OSError(5, "no")
    body = instructions() if call == "load_instructions" else link(program)
    path = "/programs" if call == "load_instructions" else "/links"
    assert (await client.request("POST", path, body)).status >= 500
    assert await work(client) == []


async def test_users_see_their_own(
    client: Client, kernel: FakeKernel, actor: Actors, served: Served
) -> None:
    his, same_user, other_user = await actor(NOBODY), await actor(NOBODY), await actor(1)
    gate = kernel.hooks["load_instructions"] = Gate()
    loading = asyncio.create_task(his.post("/programs", instructions()))
    await asyncio.to_thread(gate.entered.wait, 10)
    seen = await only(client)
    assert (seen["owner"]["uid"], seen["own"]) == (NOBODY, False)
    assert await only(same_user) == seen
    assert await work(other_user) == []
    gate.open()
    await loading


async def test_one_needs_no_right_to_look(
    serve: Callable[..., Awaitable[Served]], kernel: FakeKernel, actor: Actors
) -> None:
    closed = await serve(kernel, policy=Policy())
    nobody = await actor(NOBODY, closed.path)
    assert await work(nobody) == []
    assert (await nobody.request("POST", "/programs", instructions())).status == 403


async def test_nothing_else_is_a_parameter(client: Client) -> None:
    await client.refused("GET", "/work?what=load", status=422, kind="invalid")
    await client.refused("GET", "/work?after=x", status=422, kind="invalid")
