"""A dry run tells what a request would do, truly, and does nothing."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kpmd.bpf.features import Answer as FeatureAnswer
from tests.fakes.kernel import AMBIGUOUS, FUNCTIONS, TEXT, FakeKernel, symbol_files
from tests.http.actor import NOBODY, Actor
from tests.http.samples import a_program, link
from tests.http.serving import Client, Served
from tests.http.test_patterns import collect

Serve = Callable[..., Awaitable[Served]]
Actors = Callable[..., Awaitable[Actor]]

READ = FUNCTIONS["vfs_read"][0]
DENY = "vfs_write too many\n"


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(
        files=symbol_files(
            untraceable=["vfs_hidden", "vfs_black"],
            blacklist=["vfs_black"],
            added=[("vfs_read", "mod"), ("spread.isra.0", "")],
        )
    )


@pytest.fixture
async def served(serve: Serve, kernel: FakeKernel) -> Served:
    return await serve(kernel, deny=DENY, max_targets=8)


async def dry_run(client: Client, program: str, **fields: Any) -> Any:
    answer = await client.request("POST", "/links", link(program, dry_run=True, **fields))
    assert answer.status == 200, answer.body
    assert "Location" not in answer.headers
    assert answer.json["dry_run"] is True
    return answer.json


async def test_it_tells_all_and_does_nothing(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    found = await dry_run(client, program, patterns=["vfs_*", "clean*"], exclude=["*open"])
    assert found["program"] == program
    assert (found["kind"], found["mechanism"], found["count"]) == ("kprobe", "kprobe_multi", 2)
    assert found["attachable"] is True
    assert found["targets"] == [
        {
            "symbol": "vfs_read",
            "module": None,
            "address": f"0x{READ:016x}",
            "cookie": "0",
        },
        {
            "symbol": "cleanup",
            "module": None,
            "address": f"0x{AMBIGUOUS['cleanup'][0]:016x}",
            "cookie": "0",
        },
    ]
    told = {(each["symbol"], each["module"]): each["reason"] for each in found["skipped"]}
    assert told == {
        ("vfs_write", None): "denied",
        ("cleanup", None): "ambiguous",
        ("vfs_read", "mod"): "ambiguous",
        ("vfs_hidden", None): "untraceable",
        ("vfs_black", None): "blacklisted",
    }
    assert all(each["detail"] for each in found["skipped"])
    assert "create_link" not in kernel.calls
    assert "create_perf_links" not in kernel.calls
    assert kernel.links == []
    assert (await client.get("/links"))["items"] == []
    assert (await client.get(f"/programs/{program}"))["links"] == 0
    # Nothing holds the program either.
    await client.delete(f"/programs/{program}")


async def test_symbols_and_cookies_as_they_would_be(client: Client) -> None:
    program = await a_program(client)
    found = await dry_run(
        client,
        program,
        kind="kretprobe",
        symbols=["nf_hook", "no_such", "vfs_hidden", "vfs_read"],
        cookies=[1, 2, 3, 2**64 - 1],
    )
    assert found["kind"] == "kretprobe"
    assert [(each["symbol"], each["module"], each["cookie"]) for each in found["targets"]] == [
        ("nf_hook", "nf_tables", "1"),
        ("vfs_read", None, str(2**64 - 1)),
    ]
    reasons = {each["symbol"]: each["reason"] for each in found["skipped"]}
    assert reasons["no_such"] == "unknown"
    assert reasons["vfs_hidden"] == "untraceable"
    assert found["attachable"] is False


SPECS: list[dict[str, Any]] = [
    {"symbols": ["vfs_read"]},
    {"symbols": ["vfs_open"]},
    {"symbols": ["vfs_open", "no_such"]},
    {"symbols": ["vfs_open", "no_such"], "on_untraceable": "skip"},
    {"symbols": ["vfs_open", "vfs_hidden"]},
    {"symbols": ["vfs_open", "vfs_black"], "on_untraceable": "error"},
    {"symbols": ["no_such"], "on_untraceable": "skip"},
    {"symbols": ["cleanup"]},
    {"symbols": ["cleanup"], "on_ambiguous": "all"},
    {"symbols": ["cleanup"], "on_ambiguous": "error"},
    {"symbols": ["cleanup", "vfs_open"], "on_ambiguous": "error", "on_untraceable": "skip"},
    {"symbols": ["spread"]},
    {"symbols": ["ksys_read_alias"]},
    {"symbols": ["vfs_write"]},
    {"addresses": [READ, READ + 1]},
    {"addresses": [READ, TEXT], "on_untraceable": "skip"},
    {"addresses": [TEXT], "on_untraceable": "skip"},
    {"addresses": [READ + 4]},
    {"patterns": ["vfs_*"]},
    {"patterns": ["vfs_*"], "on_untraceable": "skip"},
    {"patterns": ["vfs_*"], "on_untraceable": "error"},
    {"patterns": ["vfs_*"], "on_untraceable": "error", "exclude": ["*hidden", "*black"]},
    {"patterns": ["vfs_*"], "on_ambiguous": "all"},
    {"patterns": ["vfs_*"], "on_ambiguous": "error"},
    {"patterns": ["vfs_*[mod]"], "on_ambiguous": "error"},
    {"patterns": ["vfs_write"]},
    {"patterns": ["vfs_*"], "exclude": ["*"]},
    {"patterns": ["no_such*"]},
    {"patterns": ["vfs_*", "no_such*"]},
    {"patterns": ["vfs_*", "vfs_hidden"]},
    {"patterns": ["*"]},
    {"patterns": ["*"], "on_ambiguous": "all"},
]


@pytest.mark.parametrize("wanted", SPECS, ids=json.dumps)
async def test_it_tells_the_truth(
    client: Client, kernel: FakeKernel, wanted: dict[str, Any]
) -> None:
    """``attachable`` if and only if the same request without it succeeds; and the same targets."""
    program = await a_program(client)
    found = await dry_run(client, program, **wanted)
    answer = await client.request("POST", "/links", link(program, **wanted))
    assert found["attachable"] is (answer.status == 201), answer.body
    assert found["count"] == len(found["targets"])
    if answer.status == 201:
        made = answer.json
        assert found["mechanism"] == made["mechanism"]
        assert found["count"] == made["count"]
        assert await collect(client, f"/links/{made['id']}/targets") == found["targets"]
        left_out = await collect(client, f"/links/{made['id']}/skipped")
        assert [each for each in found["skipped"] if each in left_out] == left_out
    else:
        # And where it would not succeed it tells of what stands in the way.
        assert answer.json["kind"] in (
            "symbol-not-found",
            "address-not-traceable",
            "invalid",
            "quota",
        )
        named = {*answer.json.get("symbols", []), *answer.json.get("addresses", [])}
        told = {each["symbol"] for each in found["skipped"]}
        if "patterns" not in wanted:
            assert named <= told


@pytest.mark.parametrize(
    ("wrong", "status", "kind"),
    [
        ({"program": "prg-0"}, 404, "not-found"),
        ({"kind": "session"}, 422, "wrong-attach-type"),
        ({"symbols": []}, 422, "invalid"),
        ({"symbols": ["vfs_read", "vfs_read"]}, 422, "invalid"),
        ({"symbols": ["vfs_read", "ksys_read_alias"], "on_ambiguous": "first"}, 422, "invalid"),
        ({"symbols": ["a\0"]}, 422, "invalid"),
        ({"patterns": ["["]}, 422, "invalid"),
        ({"patterns": ["a" * 10_000]}, 422, "invalid"),
        ({"patterns": ["a"], "cookies": [1]}, 422, "invalid"),
    ],
)
async def test_what_makes_no_sense_makes_none_in_a_dry_run(
    client: Client, wrong: dict[str, Any], status: int, kind: str
) -> None:
    body = {**link(await a_program(client)), "dry_run": True}
    if wrong.keys() & {"symbols", "patterns"}:
        del body["symbols"]
    body |= wrong
    await client.refused("POST", "/links", body, status=status, kind=kind)


async def test_anothers_program_is_not_found(client: Client, actor: Actors) -> None:
    program = await a_program(client)
    nobody = await actor(NOBODY)
    answer = await nobody.request("POST", "/links", link(program, dry_run=True))
    assert (answer.status, answer.kind) == (404, "not-found")


async def test_a_kernel_without_the_feature(client: Client, kernel: FakeKernel) -> None:
    for name in ("bpf_link_kprobe_multi", "kprobe_perf_event"):
        kernel.answers[name] = FeatureAnswer(False, "no CONFIG")
    body = link(await a_program(client), dry_run=True)
    await client.refused("POST", "/links", body, status=501, kind="not-supported")


async def test_kprobes_one_by_one(client: Client, kernel: FakeKernel) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(False, "no CONFIG_FPROBE")
    program = await a_program(client)
    assert (await dry_run(client, program))["mechanism"] == "perf_event"
    body = link(program, dry_run=True, mechanism="kprobe_multi")
    await client.refused("POST", "/links", body, status=501, kind="not-supported")


@pytest.mark.alone
@pytest.mark.usefixtures("no_garbage")
async def test_a_large_one_leaves_the_event_loop_free(serve: Serve) -> None:
    many = 50_000
    served = await serve(FakeKernel(files=symbol_files(many=many)))
    async with Client(served.path) as client, Client(served.path) as other:
        program = await a_program(client)
        await client.get("/symbols?limit=1")
        names = [f"many_{number}" for number in range(many)]
        body = link(program, dry_run=True, symbols=[*names, "no_such"])
        data = io.BytesIO(json.dumps(body).encode())
        started = time.monotonic()
        # Not with ``client``: its check of the answer against the contract takes longer than all.
        asked = asyncio.create_task(unchecked(client, data))
        longest = 0.0
        while not asked.done():
            before = time.monotonic()
            await other.get("/healthz")
            longest = max(longest, time.monotonic() - before)
        taken = time.monotonic() - started
        answer = json.loads(await asked)
        assert (answer["count"], len(answer["skipped"])) == (many, 1)
        assert longest < max(0.25, taken / 3), (longest, taken)


async def unchecked(client: Client, data: io.BytesIO) -> bytes:
    """POST /links, and the answer's bytes."""
    assert client._session is not None
    async with client._session.post("http://localhost/links", data=data) as response:
        assert response.status == 200
        return await response.read()
