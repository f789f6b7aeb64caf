"""What goes on record: what changes something, and what is refused; and nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kpmd.core.policy import Policy
from kpmd.runtime.audit import Record
from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.conftest import Serve
from tests.http.samples import a_program, elf, instructions, link
from tests.http.serving import Client, Served, raw

Start = Callable[..., Awaitable[Actor]]


async def test_what_changes_something(served: Served, actor: Start) -> None:
    user = await actor(NOBODY)
    made = await user.post("/programs", elf())
    program = made["programs"][0]["id"]
    attached = await user.post("/links", link(program, symbols=["vfs_read", "vfs_open"]))
    await user.request("DELETE", f"/links/{attached['id']}")
    loaded, linked, detached = served.audit
    for each in served.audit:
        assert (each.audit, each.outcome, each.rule) == ("request", "ok", "everything")
        assert (each.uid, each.gid, each.pid) == (NOBODY, NOBODY, user.pid)
        assert each.request
        assert each.command
    assert (loaded.call, loaded.status) == ("POST /programs", 201)
    assert loaded.user == "nobody"
    assert loaded.what["source"] == "object"
    assert len(str(loaded.what["sha256"])) == 64
    assert loaded.what["programs"] == [each["id"] for each in made["programs"]]
    assert (linked.call, linked.what["link"]) == ("POST /links", attached["id"])
    assert linked.what["symbols"] == ["vfs_read", "vfs_open"]
    assert linked.what["program"] == program
    assert (detached.call, detached.status) == (f"DELETE /links/{attached['id']}", 204)
    assert detached.what == {"id": attached["id"]}


async def test_what_is_refused(served: Served, client: Client) -> None:
    await client.refused("GET", "/links/lnk-none", status=404, kind="not-found")
    await client.refused("POST", "/programs", {"source": 3}, status=422, kind="invalid")
    program = await a_program(client)
    await client.refused(
        "POST", "/links", link(program, symbols=["no_such"]), status=422, kind="symbol-not-found"
    )
    refused = [each for each in served.audit if each.refused]
    assert [(each.outcome, each.status) for each in refused] == [
        ("not-found", 404),
        ("invalid", 422),
        ("symbol-not-found", 422),
    ]
    assert refused[2].what["symbols"] == ["no_such"]
    assert "no_such" in str(refused[2].detail)
    assert all(each.rule == "administrators" for each in refused)


async def test_the_rule_that_refused(serve: Serve, kernel: FakeKernel, actor: Start) -> None:
    served = await serve(kernel, policy=Policy())
    user = await actor(NOBODY, served.path)
    assert (await user.request("POST", "/programs", instructions())).status == 403
    (record,) = served.audit
    assert (record.outcome, record.rule, record.uid) == ("forbidden", "no rule", NOBODY)


async def test_what_only_asks_is_not(served: Served, client: Client) -> None:
    program = await a_program(client)
    before = len(served.audit)
    await client.get("/links")
    dry = await client.request("POST", "/links", link(program, dry_run=True))
    explained = await client.request("POST", "/policy/explain", {"call": "load"})
    assert (dry.status, explained.status) == (200, 200)
    assert served.audit[before:] == []


async def test_what_is_no_http(served: Served) -> None:
    await raw(served.path, b"\x16\x03\x01 hello\r\n\r\n")
    records: list[Record] = served.audit
    assert [each.outcome for each in records] == ["malformed"]
