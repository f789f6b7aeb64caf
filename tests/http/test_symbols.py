"""GET /symbols: what can be traced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from urllib.parse import quote

import pytest

from tests.fakes.kernel import AMBIGUOUS, FUNCTIONS, MODULES, FakeKernel, symbol_files
from tests.http.actor import NOBODY, Actor
from tests.http.samples import Gate, a_link, a_program, link
from tests.http.serving import Client, Served
from tests.http.test_patterns import targets

Serve = Callable[..., Awaitable[Served]]
Actors = Callable[..., Awaitable[Actor]]


async def names(client: Client, query: str = "") -> list[str]:
    page = await client.get(f"/symbols?{query}")
    assert page["next"] is None
    return [each["symbol"] for each in page["items"]]


@pytest.mark.every_loop
async def test_one_symbol(client: Client) -> None:
    assert await client.get("/symbols?pattern=nf_hook") == {
        "items": [
            {
                "symbol": "nf_hook",
                "module": "nf_tables",
                "address": f"0x{FUNCTIONS['nf_hook'][0]:016x}",
                "ambiguous": False,
            }
        ],
        "next": None,
    }


async def test_all_symbols_in_the_order_of_their_addresses(client: Client) -> None:
    page = await client.get("/symbols")
    listed = [each for each in page["items"] if each["symbol"] != "ksys_read_alias"]
    assert [each["symbol"] for each in listed] == [
        "vfs_read",
        "vfs_write",
        "vfs_open",
        "vprintk",
        "inet6_release",
        "cleanup",
        "cleanup",
        "nf_hook",
    ]
    addresses = [int(each["address"], 16) for each in listed]
    assert addresses == sorted(addresses)
    assert [each["symbol"] for each in page["items"] if each["ambiguous"]] == ["cleanup"] * 2
    assert page["next"] is None


async def test_an_ambiguous_one(client: Client) -> None:
    page = await client.get("/symbols?pattern=cleanup")
    assert [(each["address"], each["ambiguous"]) for each in page["items"]] == [
        (f"0x{address:016x}", True) for address in AMBIGUOUS["cleanup"]
    ]


async def test_one_name_in_the_kernel_and_a_module(client: Client, kernel: FakeKernel) -> None:
    kernel.files = symbol_files(added=[("vfs_read", "mod")])
    page = await client.get("/symbols?pattern=vfs_read")
    assert [(each["module"], each["ambiguous"]) for each in page["items"]] == [
        (None, True),
        ("mod", True),
    ]
    page = await client.get("/symbols?pattern=" + quote("vfs_read[mod]"))
    assert [each["address"] for each in page["items"]] == [f"0x{MODULES:016x}"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("vfs_*", ["vfs_read", "vfs_write", "vfs_open"]),
        ("vfs_?????", ["vfs_write"]),
        ("*[nf_tables]", ["nf_hook"]),
        ("* [nf_*]", ["nf_hook"]),
        ("*_hook[vmlinux]", []),
        ("v*[vmlinux]", ["vfs_read", "vfs_write", "vfs_open", "vprintk"]),
        ("no_such*", []),
        ("do_idle_loop", []),
        ("VFS_*", []),
        ("ksys_read_alias", ["ksys_read_alias"]),
    ],
)
async def test_patterns(client: Client, pattern: str, expected: list[str]) -> None:
    assert await names(client, "pattern=" + quote(pattern)) == expected


@pytest.mark.parametrize("pattern", ["spread", "sp*d", "spread.isra.0", "ksys_*", "vfs_*"])
async def test_a_link_by_that_pattern_has_as_many(
    client: Client, kernel: FakeKernel, pattern: str
) -> None:
    """``pattern``: a glob, as in ``patterns`` of a link."""
    kernel.files = symbol_files(added=[("spread.isra.0", "")])
    made = await a_link(client, patterns=[pattern])
    assert len(await names(client, "pattern=" + quote(pattern))) == len(await targets(client, made))


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
@pytest.mark.parametrize(("pattern", "count"), [("many_*", 50), ("many_?", 10), ("*many_*7", 5)])
async def test_pages(
    client: Client, kernel: FakeKernel, pattern: str, count: int, limit: int
) -> None:
    kernel.files = symbol_files(many=50)
    found: list[str] = []
    after = ""
    while True:
        page = await client.get(f"/symbols?pattern={quote(pattern)}&limit={limit}{after}")
        found += [each["symbol"] for each in page["items"]]
        if page["next"] is None:
            break
        assert len(page["items"]) == limit
        after = f"&after={page['next']}"
    assert len(set(found)) == len(found) == count
    assert found == sorted(found, key=lambda name: int(name[5:]))


async def test_a_page_behind_the_end(client: Client) -> None:
    for after in (1000, 2**62):
        assert await client.get(f"/symbols?after={after}") == {"items": [], "next": None}


async def test_hidden_addresses_are_null(client: Client, kernel: FakeKernel) -> None:
    kernel.files = symbol_files(hidden=True)
    page = await client.get("/symbols")
    assert len(page["items"]) == len(FUNCTIONS) + 2
    assert {each["address"] for each in page["items"]} == {None}
    assert {each["symbol"] for each in page["items"] if each["ambiguous"]} == {"cleanup"}


async def test_a_kernel_that_tells_nothing_of_what_can_be_traced(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.files = type(kernel.files)(kernel.files.kallsyms, None, False)
    assert await names(client) == []


async def test_modules_that_come_and_go(client: Client, kernel: FakeKernel) -> None:
    before = kernel.signature
    assert await names(client, "pattern=nf_*") == ["nf_hook"]
    kernel.files, kernel.signature = symbol_files(without=["nf_tables"]), ()
    assert await names(client, "pattern=nf_*") == []
    kernel.files, kernel.signature = symbol_files(), before
    assert await names(client, "pattern=nf_*") == ["nf_hook"]


@pytest.mark.parametrize(
    "pattern",
    ["", "a]", "[a]", "[a-z]*", "a%00", "a%0Ab", "%C3%A9", "a" * 5000, "*" * 5000, "a%20b"],
)
async def test_what_is_no_glob(client: Client, pattern: str) -> None:
    problem = await client.refused("GET", f"/symbols?pattern={pattern}", status=422, kind="invalid")
    assert problem["errors"][0]["loc"][0] == "pattern"
    assert len(problem["detail"]) < 300


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=", "after=x", "after=-1", "name=x", "pattern=a&b=c"]
)
async def test_other_queries(client: Client, query: str) -> None:
    await client.refused("GET", f"/symbols?{query}", status=422, kind="invalid")


async def test_everyone_may_ask(actor: Actors) -> None:
    nobody = await actor(NOBODY)
    page = await nobody.get("/symbols?pattern=vfs_read")
    assert len(page["items"]) == 1


async def test_while_the_index_is_built_others_are_answered(
    client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    gate = kernel.hooks["symbol_files"] = Gate()
    asked = [asyncio.create_task(client.get("/symbols?limit=1")) for _ in range(3)]
    asked.append(asyncio.create_task(client.post("/links", link(program))))
    await asyncio.to_thread(gate.entered.wait, 10)
    await client.get("/healthz")
    await client.get(f"/programs/{program}")
    assert not any(each.done() for each in asked)
    gate.open()
    await asyncio.gather(*asked)
    assert kernel.calls.count("symbol_files") == 1


# Hostile

#: Of each kind that makes a naive matcher try again and again.
WORST = ["*e" * 40 + "*z", "*" + "?" * 500 + "z", "*" + "?e" * 100 + "*z", "*_*_*_*_*_*_*_*_*z"]


def worst(count: int) -> list[str]:
    return [f"{WORST[number % len(WORST)]}{number}" for number in range(count)]


@pytest.fixture
async def large(serve: Serve) -> Served:
    names = [f"{'e_' * 15}{number}" for number in range(4000)]
    dark = [f"{'e_' * 15}dark_{number}" for number in range(4000)]
    kernel = FakeKernel(files=symbol_files(added=[(name, "") for name in names], untraceable=dark))
    return await serve(kernel)


@pytest.mark.alone
@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("dry_run", [False, True])
async def test_the_worst_globs_leave_the_event_loop_free(large: Served, dry_run: bool) -> None:
    async with Client(large.path) as client, Client(large.path) as other:
        program = await a_program(client)
        await client.get("/symbols?limit=1")
        # Each of them matches something, but is tried on all the others first.
        patterns = [f"{'*e' * 14}*_{number}" for number in range(256)]
        body = link(program, patterns=patterns, exclude=worst(256), dry_run=dry_run)
        started = time.monotonic()
        asked = asyncio.create_task(client.request("POST", "/links", body))
        longest = 0.0
        while not asked.done():
            before = time.monotonic()
            await other.get("/healthz")
            longest = max(longest, time.monotonic() - before)
        taken = time.monotonic() - started
        answer = await asked
        assert answer.status == (200 if dry_run else 201)
        assert answer.json["count"] == 256
        assert longest < max(0.25, taken / 3), (longest, taken)
        assert taken < 10


async def test_the_worst_pattern_of_a_list(large: Served) -> None:
    async with Client(large.path) as client:
        for pattern in WORST:
            assert await names(client, "pattern=" + quote(pattern)) == []
