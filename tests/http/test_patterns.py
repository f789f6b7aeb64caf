"""Links by pattern: what they match, what is left out, and why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes.kernel import AMBIGUOUS, FUNCTIONS, MODULES, FakeKernel, symbol_files
from tests.http.samples import a_link, a_program, link
from tests.http.serving import Client, Served

Serve = Callable[..., Awaitable[Served]]

FIRST, SECOND = AMBIGUOUS["cleanup"]


async def collect(client: Client, path: str, limit: int = 1000) -> list[Any]:
    """All items of a list."""
    items: list[Any] = []
    after = ""
    while True:
        page = await client.get(f"{path}?limit={limit}{after}")
        items += page["items"]
        assert len(page["items"]) <= limit
        if page["next"] is None:
            return items
        assert len(page["items"]) == limit
        after = f"&after={page['next']}"


async def targets(client: Client, made: str) -> list[str]:
    return [each["symbol"] for each in await collect(client, f"/links/{made}/targets")]


async def skipped(client: Client, made: str) -> list[tuple[str, str]]:
    found = await collect(client, f"/links/{made}/skipped")
    assert (await client.get(f"/links/{made}"))["skipped"] == len(found)
    return [(each["symbol"], each["reason"]) for each in found]


@pytest.mark.parametrize(
    ("patterns", "exclude", "names"),
    [
        (["vfs_*"], [], ["vfs_read", "vfs_write", "vfs_open"]),
        (["vfs_?????", "vfs_open"], [], ["vfs_write", "vfs_open"]),
        (["*_read", "vfs_*"], [], ["vfs_read", "vfs_write", "vfs_open"]),
        (["vfs_*"], ["*_r*", "*te"], ["vfs_open"]),
        (["*[nf_tables]"], [], ["nf_hook"]),
        (["nf_* [nf_*]"], [], ["nf_hook"]),
        (["*[vmlinux]"], ["vfs_*", "cleanup"], ["vprintk", "inet6_release"]),
        (["*"], ["*[vmlinux]"], ["nf_hook"]),
        (["vfs_read"], [], ["vfs_read"]),
        (["ksys_read_al*"], [], ["vfs_read"]),
    ],
)
async def test_patterns(
    client: Client, kernel: FakeKernel, patterns: list[str], exclude: list[str], names: list[str]
) -> None:
    program = await a_program(client)
    made = await client.post("/links", link(program, patterns=patterns, exclude=exclude))
    assert (made["count"], made["skipped"]) == (len(names), 0)
    assert await targets(client, made["id"]) == names
    (attached,) = kernel.attached
    assert attached.addresses == [FUNCTIONS[name][0] for name in names]
    assert attached.cookies == []
    assert await skipped(client, made["id"]) == []


async def test_targets_of_patterns_in_full(client: Client) -> None:
    made = await a_link(client, patterns=["nf_*", "vfs_open"])
    assert await collect(client, f"/links/{made}/targets") == [
        {
            "symbol": name,
            "module": FUNCTIONS[name][2] or None,
            "address": f"0x{FUNCTIONS[name][0]:016x}",
            "cookie": "0",
        }
        for name in ("vfs_open", "nf_hook")
    ]


async def test_functions_of_one_name_in_a_module_and_the_kernel(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.files = symbol_files(added=[("vfs_read", "mod")])
    await a_link(client, patterns=["vfs_read[mod]"])
    await a_link(client, patterns=["vfs_read[vmlinux]"])
    await a_link(client, patterns=["vfs_read"], on_ambiguous="all")
    assert [each.addresses for each in kernel.attached] == [
        [MODULES],
        [FUNCTIONS["vfs_read"][0]],
        [FUNCTIONS["vfs_read"][0], MODULES],
    ]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ({"symbols": ["spread"]}, "spread.isra.0"),
        ({"patterns": ["spread"]}, "spread.isra.0"),
        ({"patterns": ["spr*d"]}, "spread.isra.0"),
        ({"symbols": ["folded"]}, "folded.constprop.0.isra.1"),
        ({"symbols": ["lto"]}, "lto.llvm.123"),
        ({"symbols": ["split.cold"]}, "split.cold"),
    ],
)
async def test_variants_of_the_compiler(
    client: Client, kernel: FakeKernel, wanted: dict[str, Any], name: str
) -> None:
    kernel.files = symbol_files(
        added=[
            ("spread.isra.0", ""),
            ("folded.constprop.0.isra.1", ""),
            ("lto.llvm.123", ""),
            ("split.cold", ""),
        ]
    )
    made = await a_link(client, **wanted)
    assert await targets(client, made) == [name]


@pytest.mark.parametrize("wanted", [{"symbols": ["split"]}, {"patterns": ["split"]}])
async def test_a_piece_of_a_function_is_not_the_function(
    client: Client, kernel: FakeKernel, wanted: dict[str, Any]
) -> None:
    kernel.files = symbol_files(added=[("split.cold", ""), ("split.part.0", "")])
    problem = await client.refused(
        "POST",
        "/links",
        link(await a_program(client), **wanted),
        status=422,
        kind="symbol-not-found",
    )
    assert problem["symbols"] == ["split"]


# What is not there


@pytest.mark.parametrize(
    ("patterns", "wrong", "said"),
    [
        (["no_such_*"], "no_such_*", "matches no function"),
        (["vfs_*", "no_such", "nor_*"], "no_such", "matches no function"),
        (["vfs_*[nf_tables]"], "vfs_*[nf_tables]", "matches no function"),
        (["vfs_*[no_such]"], "vfs_*[no_such]", "matches no function"),
        (["do_idle*"], "do_idle*", "none of which the kernel can trace"),
        (["VFS_*"], "VFS_*", "matches no function"),
    ],
)
async def test_a_pattern_that_matches_nothing_is_named(
    client: Client, kernel: FakeKernel, patterns: list[str], wrong: str, said: str
) -> None:
    program = await a_program(client)
    problem = await client.refused(
        "POST", "/links", link(program, patterns=patterns), status=422, kind="symbol-not-found"
    )
    assert repr(wrong) in problem["detail"]
    assert problem["symbols"] == [wrong]
    assert said in problem["errors"][0]["msg"]
    assert kernel.links == []
    await client.delete(f"/programs/{program}")


async def test_everything_excluded(client: Client, kernel: FakeKernel) -> None:
    body = link(await a_program(client), patterns=["vfs_*", "nf_*"], exclude=["*"])
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert "excluded" in problem["detail"]
    assert kernel.links == []


async def test_patterns_need_to_know_what_can_be_traced(client: Client, kernel: FakeKernel) -> None:
    files = symbol_files()
    kernel.files = type(files)(files.kallsyms, None, False)
    program = await a_program(client)
    for dry_run in (False, True):
        body = link(program, patterns=["vfs_*"], dry_run=dry_run)
        problem = await client.refused("POST", "/links", body, status=422, kind="invalid")
        assert problem["errors"][0]["loc"] == ["patterns"]
    assert kernel.links == []


# What makes no sense


@pytest.mark.parametrize(
    ("wrong", "loc"),
    [
        ({"patterns": [""]}, ["patterns", 0]),
        ({"patterns": ["vfs_*", "a]"]}, ["patterns", 1]),
        ({"patterns": ["[nf_tables]"]}, ["patterns", 0]),
        ({"patterns": ["[a-z]*"]}, ["patterns", 0]),
        ({"patterns": ["vfs_*\0"]}, ["patterns", 0]),
        ({"patterns": ["vfs_*\n"]}, ["patterns", 0]),
        ({"patterns": ["\u00e9*"]}, ["patterns", 0]),
        ({"patterns": ["a" * 10_000]}, ["patterns", 0]),
        ({"patterns": ["*" * 10_000]}, ["patterns", 0]),
        ({"patterns": ["vfs_*", "nf_*", "vfs_*"]}, ["patterns", 2]),
        ({"patterns": ["vfs_*"], "exclude": ["vfs_read", "["]}, ["exclude", 1]),
        ({"patterns": ["vfs_*"], "exclude": ["?" * 10_000]}, ["exclude", 0]),
        ({"patterns": [f"a{each}" for each in range(257)]}, ["patterns"]),
        ({"patterns": ["a"], "exclude": ["a"] * 257}, ["exclude"]),
        ({"patterns": ["vfs_*"], "cookies": [1]}, ["cookies"]),
        ({"patterns": ["vfs_*"], "cookies": []}, ["cookies"]),
        ({"symbols": ["vfs_read"], "exclude": ["vfs_read"]}, ["exclude"]),
        ({"addresses": [1], "exclude": ["vfs_read"]}, ["exclude"]),
        ({"patterns": ["vfs_*"], "on_ambiguous": "none"}, ["on_ambiguous"]),
        ({"patterns": ["vfs_*"], "on_ambiguous": None}, ["on_ambiguous"]),
        ({"patterns": ["vfs_*"], "on_untraceable": "fail"}, ["on_untraceable"]),
        ({"patterns": ["vfs_*"], "mechanism": "perf_event"}, ["mechanism"]),
        ({"patterns": ["vfs_*"], "exclude": None}, ["exclude"]),
        ({"patterns": "vfs_*"}, ["patterns"]),
        ({"patterns": ["vfs_*"], "dry_run": 1}, ["dry_run"]),
    ],
)
async def test_what_makes_no_sense(
    client: Client, kernel: FakeKernel, wrong: dict[str, Any], loc: list[str | int]
) -> None:
    program = await a_program(client)
    problem = await client.refused(
        "POST", "/links", link(program, **wrong), status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == loc
    assert len(problem["detail"]) < 300
    assert kernel.links == []
    await client.delete(f"/programs/{program}")


# The deny list


@pytest.fixture
async def denying(serve: Serve, kernel: FakeKernel) -> Served:
    return await serve(kernel, deny="*_read   read all day\nnf_*[nf_tables]   in every packet\n")


async def test_denied_functions_are_left_out_and_told_of(
    denying: Served, kernel: FakeKernel
) -> None:
    async with Client(denying.path) as client:
        made = await a_link(client, patterns=["vfs_*", "nf_*"])
        assert await targets(client, made) == ["vfs_write", "vfs_open"]
        found = await collect(client, f"/links/{made}/skipped")
        assert [(each["symbol"], each["module"], each["reason"]) for each in found] == [
            ("vfs_read", None, "denied"),
            ("nf_hook", "nf_tables", "denied"),
        ]
        assert "read all day" in found[0]["detail"]
        assert "in every packet" in found[1]["detail"]
        assert FUNCTIONS["vfs_read"][0] not in kernel.attached[0].addresses


@pytest.mark.parametrize("on_untraceable", ["error", "skip", None])
async def test_everything_denied(
    denying: Served, kernel: FakeKernel, on_untraceable: str | None
) -> None:
    async with Client(denying.path) as client:
        program = await a_program(client)
        body = link(program, patterns=["*_read", "nf_*"], on_untraceable=on_untraceable)
        problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
        assert problem["symbols"] == ["vfs_read", "nf_hook"]
        assert "read all day" in problem["errors"][0]["msg"]
        assert kernel.links == []


async def test_who_names_a_denied_function_gets_it(denying: Served, kernel: FakeKernel) -> None:
    async with Client(denying.path) as client:
        await a_link(client, symbols=["vfs_read"])
        await a_link(client, addresses=[FUNCTIONS["vfs_read"][0]])
        assert [each.addresses for each in kernel.attached] == [[FUNCTIONS["vfs_read"][0]]] * 2


# Ambiguous names


@pytest.mark.parametrize("wanted", [{"symbols": ["cleanup"]}, {"patterns": ["clean*"]}])
@pytest.mark.parametrize(
    ("on_ambiguous", "addresses"),
    [(None, [FIRST]), ("first", [FIRST]), ("all", [FIRST, SECOND])],
)
async def test_ambiguous_names(
    client: Client,
    kernel: FakeKernel,
    wanted: dict[str, Any],
    on_ambiguous: str | None,
    addresses: list[int],
) -> None:
    fields = wanted if on_ambiguous is None else {**wanted, "on_ambiguous": on_ambiguous}
    made = await a_link(client, **fields)
    assert kernel.attached[0].addresses == addresses
    assert await targets(client, made) == ["cleanup"] * len(addresses)
    found = await collect(client, f"/links/{made}/skipped")
    assert [(each["symbol"], each["reason"]) for each in found] == (
        [] if on_ambiguous == "all" else [("cleanup", "ambiguous")]
    )
    assert all(f"0x{FIRST:016x}" in each["detail"] for each in found)


@pytest.mark.parametrize("wanted", [{"symbols": ["vfs_read", "cleanup"]}, {"patterns": ["*"]}])
async def test_ambiguous_names_as_an_error(
    client: Client, kernel: FakeKernel, wanted: dict[str, Any]
) -> None:
    program = await a_program(client)
    body = link(program, on_ambiguous="error", **wanted)
    problem = await client.refused("POST", "/links", body, status=422, kind="invalid")
    assert (problem["symbols"], problem["symbols_total"]) == (["cleanup"], 1)
    assert kernel.links == []
    await client.delete(f"/programs/{program}")


async def test_all_functions_of_a_name_get_its_cookie(client: Client, kernel: FakeKernel) -> None:
    names = ["vfs_read", "cleanup", "vfs_write"]
    made = await a_link(client, symbols=names, cookies=[1, 2, 3], on_ambiguous="all")
    assert kernel.attached[0].cookies == [1, 2, 2, 3]
    found = await collect(client, f"/links/{made}/targets")
    assert [(each["symbol"], each["cookie"]) for each in found] == [
        ("vfs_read", "1"),
        ("cleanup", "2"),
        ("cleanup", "2"),
        ("vfs_write", "3"),
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        {"symbols": ["cleanup"], "on_ambiguous": "all"},
        {"patterns": ["clean*"], "on_ambiguous": "all", "on_untraceable": "error"},
        {"patterns": ["vfs_read[mod]"]},
    ],
)
async def test_where_addresses_are_hidden_no_other_function_is_taken_for_it(
    client: Client, kernel: FakeKernel, wanted: dict[str, Any]
) -> None:
    """By name the kernel takes the first of that name, and does not take it twice."""
    kernel.files = symbol_files(hidden=True, added=[("vfs_read", "mod")])
    answer = await client.request("POST", "/links", link(await a_program(client), **wanted))
    assert answer.status == 422, kernel.attached[0].symbols
    assert kernel.links == []


async def test_where_addresses_are_hidden_patterns_leave_the_others_out(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.files = symbol_files(hidden=True)
    made = await a_link(client, patterns=["clean*"], on_ambiguous="all")
    assert kernel.attached[0].symbols == ["cleanup"]
    assert await skipped(client, made) == [("cleanup", "ambiguous")]


# What cannot be traced


@pytest.fixture
def darker(kernel: FakeKernel) -> FakeKernel:
    kernel.files = symbol_files(
        untraceable=["vfs_hidden", "vfs_black"], blacklist=["vfs_black", "vfs_read"]
    )
    return kernel


async def test_symbols_that_are_skipped(client: Client, darker: FakeKernel) -> None:
    names = ["no_such", "vfs_read", "vfs_hidden", "vfs_black", "vfs_open"]
    made = await a_link(client, symbols=names, cookies=[1, 2, 3, 4, 5], on_untraceable="skip")
    assert await targets(client, made) == ["vfs_read", "vfs_open"]
    assert darker.attached[0].cookies == [2, 5]
    assert await skipped(client, made) == [
        ("no_such", "unknown"),
        ("vfs_hidden", "untraceable"),
        ("vfs_black", "blacklisted"),
    ]
    details = {each["detail"] for each in await collect(client, f"/links/{made}/skipped")}
    assert len(details) == 3


@pytest.mark.parametrize("on_untraceable", ["error", None])
async def test_symbols_that_are_an_error(
    client: Client, darker: FakeKernel, on_untraceable: str | None
) -> None:
    names = ["no_such", "vfs_read", "vfs_hidden", "vfs_black"]
    body = link(await a_program(client), symbols=names, on_untraceable=on_untraceable)
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert problem["symbols"] == ["no_such", "vfs_hidden", "vfs_black"]
    first, second, third = [each["msg"] for each in problem["errors"]]
    assert "does not exist" in first
    assert "cannot trace" in second
    assert "blacklist" in third
    assert darker.links == []


async def test_addresses_that_are_skipped(client: Client, kernel: FakeKernel) -> None:
    read = FUNCTIONS["vfs_read"][0]
    made = await a_link(
        client, addresses=[read + 1, read, 0], cookies=[1, 2, 3], on_untraceable="skip"
    )
    assert kernel.attached[0].addresses == [read]
    assert kernel.attached[0].cookies == [2]
    assert await skipped(client, made) == [
        (f"0x{read + 1:016x}", "untraceable"),
        ("0x0000000000000000", "untraceable"),
    ]


async def test_nothing_but_skipped_symbols_is_an_error(client: Client, darker: FakeKernel) -> None:
    names = ["no_such", "vfs_hidden", "vfs_black"]
    body = link(await a_program(client), symbols=names, on_untraceable="skip")
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert problem["symbols"] == names
    assert darker.links == []


async def test_nothing_but_skipped_addresses_is_an_error(
    client: Client, kernel: FakeKernel
) -> None:
    body = link(await a_program(client), addresses=[1, 2], on_untraceable="skip")
    problem = await client.refused("POST", "/links", body, status=422, kind="address-not-traceable")
    assert problem["addresses"] == ["0x0000000000000001", "0x0000000000000002"]
    assert kernel.links == []


@pytest.mark.parametrize("on_untraceable", ["skip", None])
async def test_what_patterns_cannot_trace_is_left_out(
    client: Client, darker: FakeKernel, on_untraceable: str | None
) -> None:
    made = await a_link(client, patterns=["vfs_*"], on_untraceable=on_untraceable)
    assert await targets(client, made) == ["vfs_read", "vfs_write", "vfs_open"]


async def test_what_patterns_cannot_trace_as_an_error(client: Client, darker: FakeKernel) -> None:
    program = await a_program(client)
    body = link(program, patterns=["vfs_*"], on_untraceable="error")
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert problem["symbols"] == ["vfs_hidden", "vfs_black"]
    first, second = [each["msg"] for each in problem["errors"]]
    assert "cannot trace" in first
    assert "blacklist" in second
    assert darker.links == []
    body["exclude"] = ["*_hidden", "*_black"]
    assert (await client.post("/links", body))["count"] == 3


# GET /links/{id}/skipped


@pytest.mark.parametrize("limit", [1, 3, 10, 1000])
async def test_pages_of_what_is_skipped(client: Client, limit: int) -> None:
    names = [f"no_such_{number}" for number in range(10)]
    made = await a_link(client, symbols=["vfs_read", *names], on_untraceable="skip")
    found = await collect(client, f"/links/{made}/skipped", limit)
    assert [each["symbol"] for each in found] == names
    assert await client.get(f"/links/{made}/skipped?after=10") == {"items": [], "next": None}
    assert await client.get(f"/links/{made}/skipped?after={2**62}") == {"items": [], "next": None}
    assert (await client.get(f"/links/{made}"))["skipped"] == 10
    assert (await client.get("/links"))["items"][0]["skipped"] == 10


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "after=x", "after=-1", "a=1"]
)
async def test_queries_for_what_is_skipped(client: Client, query: str) -> None:
    made = await a_link(client)
    await client.refused("GET", f"/links/{made}/skipped?{query}", status=422, kind="invalid")
