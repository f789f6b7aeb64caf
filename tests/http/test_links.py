"""POST, GET, DELETE of links, and what cannot be done with them."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kpmd.bpf.features import Answer as FeatureAnswer
from kpmd.errors import KernelError
from tests.fakes.kernel import AMBIGUOUS, FUNCTIONS, TEXT, FakeKernel, symbol_files
from tests.http.samples import PERSISTENT, Gate, a_link, a_program, link
from tests.http.serving import Client, Served

Serve = Callable[..., Awaitable[Served]]


def start(symbol: str) -> int:
    """Where a function starts."""
    return FUNCTIONS[symbol][0]


def shown(address: int) -> str:
    """An address as the API writes it."""
    return f"0x{address:016x}"


@pytest.mark.every_loop
@pytest.mark.parametrize("kind", ["kprobe", "kretprobe"])
async def test_a_link_by_names(client: Client, kernel: FakeKernel, kind: str) -> None:
    program = await a_program(client)
    body = link(program, kind=kind, symbols=["vfs_write", "nf_hook"], labels={"a": "b"})
    answer = await client.request("POST", "/links", body)
    made = answer.json
    assert answer.status == 201
    assert answer.headers["Location"] == f"/links/{made['id']}"
    assert made["id"].startswith("lnk-")
    assert (made["program"], made["kind"], made["count"]) == (program, kind, 2)
    assert (made["mechanism"], made["skipped"], made["missed"]) == ("kprobe_multi", 0, 0)
    assert made["owner"]["uid"] == os.getuid()
    assert made["labels"] == {"a": "b"}
    assert made["lifetime"] == {"kind": "process"}
    assert (await client.get(f"/clients/{made['client']}"))["pid"] == os.getpid()
    assert await client.get(answer.headers["Location"]) == made
    assert (await client.get("/links"))["items"] == [made]
    (attached,) = kernel.attached
    assert attached.retprobe is (kind == "kretprobe")
    # By address, in the order of the request: that is what cookies go by.
    assert attached.addresses == [start("vfs_write"), start("nf_hook")]
    assert attached.symbols == []
    assert attached.cookies == []


async def test_a_session_link(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client, attach="kprobe_session")
    made = await client.post("/links", link(program, kind="session"))
    assert made["kind"] == "session"
    assert kernel.attached[0].retprobe is False


async def test_the_kernels_counts_are_shown(client: Client, kernel: FakeKernel) -> None:
    made = await a_link(client)
    attached = kernel.attached[0]
    kernel.tell(attached, count=5, missed=2**60)
    found = await client.get(f"/links/{made}")
    assert (found["count"], found["missed"]) == (5, 2**60)
    kernel.tell(attached, count=None, missed=None)
    found = await client.get(f"/links/{made}")
    assert (found["count"], found["missed"]) == (1, None)


async def test_targets_in_the_order_of_the_request_with_cookies(
    client: Client, kernel: FakeKernel
) -> None:
    names = ["nf_hook", "vfs_open", "vfs_read", "vprintk", "inet6_release"]
    cookies = [2**64 - 1, 0, "0xff", "42", 2**53 + 1]
    made = await a_link(client, symbols=names, cookies=cookies)
    values = [2**64 - 1, 0, 255, 42, 2**53 + 1]
    expected = [
        {
            "symbol": name,
            "module": FUNCTIONS[name][2] or None,
            "address": shown(start(name)),
            "cookie": str(cookie),
        }
        for name, cookie in zip(names, values, strict=True)
    ]
    page = await client.get(f"/links/{made}/targets")
    assert page == {"items": expected, "next": None}
    assert kernel.attached[0].cookies == values
    collected, after = [], ""
    while True:
        page = await client.get(f"/links/{made}/targets?limit=2{after}")
        collected += page["items"]
        if page["next"] is None:
            break
        assert len(page["items"]) == 2
        after = f"&after={page['next']}"
    assert collected == expected
    assert (await client.get(f"/links/{made}/targets?after=99999"))["items"] == []
    last = await client.get(f"/links/{made}/targets?limit=5")
    assert last["next"] is None


@pytest.mark.parametrize(
    "form",
    [
        lambda value: value,
        str,
        lambda value: f"0x{value:x}",
        lambda value: f"0X{value:X}",
        lambda value: f"0x{value:016x}",
    ],
)
async def test_addresses_as_numbers_and_strings(
    client: Client, kernel: FakeKernel, form: Callable[[int], Any]
) -> None:
    addresses = [start("vfs_write"), start("vfs_open")]
    made = await a_link(client, addresses=[form(each) for each in addresses])
    found = (await client.get(f"/links/{made}/targets"))["items"]
    assert [each["address"] for each in found] == [shown(each) for each in addresses]
    assert [each["symbol"] for each in found] == ["vfs_write", "vfs_open"]
    assert [each["cookie"] for each in found] == ["0", "0"]
    assert kernel.attached[0].addresses == addresses


async def test_an_address_of_tracefs_becomes_the_functions_start(
    client: Client, kernel: FakeKernel
) -> None:
    """By start + 4 the program would read cookie 0."""
    made = await a_link(
        client, addresses=[start("vfs_read") + 4, start("vfs_open")], cookies=[7, 8]
    )
    found = (await client.get(f"/links/{made}/targets"))["items"]
    assert [(each["address"], each["cookie"]) for each in found] == [
        (shown(start("vfs_read")), "7"),
        (shown(start("vfs_open")), "8"),
    ]
    assert kernel.attached[0].addresses == [start("vfs_read"), start("vfs_open")]
    assert kernel.attached[0].cookies == [7, 8]


async def test_an_ambiguous_name_takes_the_first(client: Client, kernel: FakeKernel) -> None:
    made = await a_link(client, symbols=["cleanup"])
    assert kernel.attached[0].addresses == [AMBIGUOUS["cleanup"][0]]
    (found,) = (await client.get(f"/links/{made}/targets"))["items"]
    assert found["address"] == shown(AMBIGUOUS["cleanup"][0])


@pytest.mark.parametrize("beside", [[], ["cleanup"]])
async def test_an_alias_is_known_by_the_name_that_was_asked_for(
    client: Client, beside: list[str]
) -> None:
    made = await a_link(client, symbols=["ksys_read_alias", *beside])
    found = (await client.get(f"/links/{made}/targets"))["items"][0]
    assert (found["symbol"], found["address"]) == ("ksys_read_alias", shown(start("vfs_read")))


async def refuse(client: Client, kernel: FakeKernel, **fields: Any) -> Any:
    """A link that must be invalid: its problem, after a look that nothing was attached."""
    program = await a_program(client)
    problem = await client.refused(
        "POST", "/links", link(program, **fields), status=422, kind="invalid"
    )
    assert kernel.links == []
    assert (await client.get(f"/programs/{program}"))["links"] == 0
    await client.delete(f"/programs/{program}")  # nothing holds it either
    return problem


@pytest.mark.parametrize(
    "value",
    [
        -1,
        2**64,
        10**400,
        1.0,
        1e3,
        True,
        None,
        "",
        " 1",
        "1 ",
        "+1",
        "-1",
        "1_000",
        "0x",
        "0xg",
        "x10",
        "0b1",
        "0o7",
        "1.0",
        "1e3",
        "ff",
        "0x10000000000000000",
        "18446744073709551616",
        "9" * 5000,
        "\u0663",
        "\u00b2",
        "0x\u0661",
        "1\0",
        [],
        {},
    ],
)
@pytest.mark.parametrize("field", ["addresses", "cookies"])
async def test_values_that_are_no_64_bits(
    client: Client, kernel: FakeKernel, field: str, value: object
) -> None:
    fields: dict[str, Any] = {field: [value]}
    answer = await client.request("POST", "/links", link(await a_program(client), **fields))
    if value == 10**400:
        assert (answer.status, answer.kind) in ((422, "invalid"), (400, "malformed"))
    else:
        assert (answer.status, answer.kind) == (422, "invalid")
        assert answer.json["errors"][0]["loc"] == [field, 0]
    assert kernel.links == []


async def test_both_or_neither_of_symbols_and_addresses(client: Client, kernel: FakeKernel) -> None:
    both = {"symbols": ["vfs_read"], "addresses": [start("vfs_open")]}
    await refuse(client, kernel, **both)
    await refuse(client, kernel, symbols=None)
    await refuse(client, kernel, symbols=None, addresses=None)
    await refuse(client, kernel, symbols=["vfs_read"], patterns=["vfs_*"])
    await refuse(client, kernel, symbols=None, addresses=[start("vfs_open")], patterns=["vfs_*"])
    await refuse(client, kernel, symbols=[], addresses=[])


@pytest.mark.parametrize("which", ["symbols", "addresses", "patterns"])
async def test_no_targets_at_all(client: Client, kernel: FakeKernel, which: str) -> None:
    fields: dict[str, Any] = {"symbols": None, which: []}
    problem = await refuse(client, kernel, **fields)
    assert problem["errors"][0]["loc"] == [which]


@pytest.mark.parametrize("cookies", [[], [1], [1, 2, 3]])
async def test_cookies_of_another_length(
    client: Client, kernel: FakeKernel, cookies: list[int]
) -> None:
    problem = await refuse(client, kernel, symbols=["vfs_read", "vfs_open"], cookies=cookies)
    assert problem["errors"][0]["loc"] == ["cookies"]
    addresses = [start("vfs_read"), start("vfs_open")]
    await refuse(client, kernel, addresses=addresses, cookies=cookies)


@pytest.mark.parametrize(
    "name", ["", "vfs\0read", "vfs_read\0", "\0", "x" * 512, "\u00e9" * 256, "\U0001f600" * 128]
)
async def test_names_that_no_kernel_has(client: Client, kernel: FakeKernel, name: str) -> None:
    problem = await refuse(client, kernel, symbols=["vfs_open", name])
    assert problem["errors"][0]["loc"] == ["symbols", 1]


@pytest.mark.parametrize(
    "name",
    [
        "x" * 511,
        "\u00e9",
        "vfs_read ",
        " vfs_read",
        "vfs_*",
        "VFS_READ",
        "nf_tables:nf_hook",
        "a\nb",
    ],
)
async def test_names_that_this_kernel_does_not_have(
    client: Client, kernel: FakeKernel, name: str
) -> None:
    problem = await client.refused(
        "POST",
        "/links",
        link(await a_program(client), symbols=[name]),
        status=422,
        kind="symbol-not-found",
    )
    assert (problem["symbols"], problem["symbols_total"]) == ([name], 1)


async def test_a_function_named_twice(client: Client, kernel: FakeKernel) -> None:
    problem = await refuse(client, kernel, symbols=["vfs_read", "vfs_open", "vfs_read"])
    assert problem["errors"][0]["loc"] == ["symbols", 2]
    address = start("vfs_read")
    problem = await refuse(client, kernel, addresses=[address, shown(address)])
    assert problem["errors"][0]["loc"] == ["addresses", 1]
    # Two spellings of one function.
    await refuse(client, kernel, symbols=["vfs_read", "ksys_read_alias"])
    await refuse(client, kernel, addresses=[address, address + 4])


@pytest.mark.parametrize("attach", ["kprobe_multi", "kprobe_session"])
@pytest.mark.parametrize("kind", ["kprobe", "kretprobe", "session"])
async def test_programs_fit_their_kind_of_link_only(
    client: Client, kernel: FakeKernel, attach: str, kind: str
) -> None:
    program = await a_program(client, attach=attach)
    answer = await client.request("POST", "/links", link(program, kind=kind))
    if (attach == "kprobe_session") == (kind == "session"):
        assert answer.status == 201
    else:
        assert (answer.status, answer.kind) == (422, "wrong-attach-type")
        assert attach in answer.json["detail"]
        assert kernel.links == []
        await client.delete(f"/programs/{program}")


async def test_missing_symbols_are_all_named_with_the_reason_of_each(
    client: Client, kernel: FakeKernel
) -> None:
    names = ["vfs_read", "no_such", "do_idle_loop", "neither_this"]
    problem = await client.refused(
        "POST",
        "/links",
        link(await a_program(client), symbols=names),
        status=422,
        kind="symbol-not-found",
    )
    assert problem["symbols"] == ["no_such", "do_idle_loop", "neither_this"]
    assert problem["symbols_total"] == 3
    reasons = [each["msg"] for each in problem["errors"]]
    assert [reason.partition(":")[0] for reason in reasons] == problem["symbols"]
    assert ["does not exist" in reason for reason in reasons] == [True, False, True]
    assert "exists, but" in reasons[1]
    assert kernel.links == []


async def test_at_most_a_hundred_missing_symbols_are_named(client: Client) -> None:
    names = [f"no_{number}" for number in range(101)]
    problem = await client.refused(
        "POST",
        "/links",
        link(await a_program(client), symbols=names),
        status=422,
        kind="symbol-not-found",
    )
    assert problem["symbols"] == names[:100]
    assert problem["symbols_total"] == 101
    assert len(problem["errors"]) == 100


@pytest.mark.parametrize(
    "address",
    [0, 1, 4, TEXT, start("vfs_read") + 1, start("vfs_open") + 4, TEXT + 0x8000, 2**64 - 1],
)
async def test_addresses_that_cannot_be_traced(
    client: Client, kernel: FakeKernel, address: int
) -> None:
    addresses = [start("vfs_write"), address]
    problem = await client.refused(
        "POST",
        "/links",
        link(await a_program(client), addresses=addresses),
        status=422,
        kind="address-not-traceable",
    )
    assert (problem["addresses"], problem["addresses_total"]) == ([shown(address)], 1)
    assert kernel.links == []


async def test_symbols_of_a_module_loaded_later(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    body = link(program, symbols=["many_3"])
    await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    kernel.files = symbol_files(many=5)
    kernel.signature = (*kernel.signature, b"many 1 0x2")
    await client.post("/links", body)


async def test_the_index_is_built_once(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    for _ in range(5):
        await a_link(client, program)
    assert kernel.calls.count("symbol_files") == 1


async def test_where_addresses_are_hidden_the_kernel_gets_names(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.files = symbol_files(hidden=True)
    made = await a_link(client, symbols=["vfs_open", "nf_hook"], cookies=[3, 4])
    assert kernel.attached[0].symbols == ["vfs_open", "nf_hook"]
    assert kernel.attached[0].addresses == []
    assert kernel.attached[0].cookies == [3, 4]
    assert (await client.get(f"/links/{made}/targets"))["items"] == [
        {"symbol": "vfs_open", "module": None, "address": None, "cookie": "3"},
        {"symbol": "nf_hook", "module": "nf_tables", "address": None, "cookie": "4"},
    ]


async def test_addresses_are_the_kernels_to_judge_where_it_hides_them(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.files = symbol_files(hidden=True)
    program = await a_program(client)
    made = await a_link(client, program, addresses=[start("vfs_open")])
    assert (await client.get(f"/links/{made}/targets"))["items"] == [
        {"symbol": None, "module": None, "address": shown(start("vfs_open")), "cookie": "0"}
    ]
    problem = await client.refused(
        "POST",
        "/links",
        link(program, addresses=[TEXT + 1]),
        status=422,
        kind="address-not-traceable",
    )
    assert problem["addresses"] == [shown(TEXT + 1)]


ERRNOS = [errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.E2BIG, errno.EFAULT, errno.EBUSY, 524]


@pytest.mark.parametrize("number", ERRNOS)
async def test_other_errnos_are_told_by_name(
    client: Client, kernel: FakeKernel, number: int
) -> None:
    kernel.fail["create_link"] = OSError(number, "no")
    program = await a_program(client)
    problem = await client.refused("POST", "/links", link(program), status=500, kind="kernel")
    assert problem["errno"] == errno.errorcode.get(number, "ENOTSUPP")
    await client.delete(f"/programs/{program}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
async def test_bad_arguments_by_address(client: Client, kernel: FakeKernel, number: int) -> None:
    kernel.fail["create_link"] = OSError(number, "no")
    body = link(await a_program(client), addresses=[start("vfs_read")])
    problem = await client.refused("POST", "/links", body, status=422, kind="address-not-traceable")
    assert problem["errno"] == errno.errorcode[number]
    assert problem["addresses"] == [shown(start("vfs_read"))]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT, errno.ESRCH])
async def test_a_function_that_goes_away_meanwhile(
    client: Client, kernel: FakeKernel, number: int
) -> None:
    kernel.fail["create_link"] = OSError(number, "no")
    problem = await client.refused(
        "POST", "/links", link(await a_program(client)), status=422, kind="symbol-not-found"
    )
    assert problem["errno"] == errno.errorcode[number]


async def test_einval_by_name_is_the_attach_type(client: Client, kernel: FakeKernel) -> None:
    kernel.files = symbol_files(hidden=True)
    kernel.fail["create_link"] = OSError(errno.EINVAL, "no")
    await client.refused(
        "POST", "/links", link(await a_program(client)), status=422, kind="wrong-attach-type"
    )


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOENT])
async def test_a_kernel_without_the_feature_explains_any_errno_but_esrch(
    client: Client, kernel: FakeKernel, number: int
) -> None:
    """The reference library's order: ESRCH, then the feature test, then the errno."""
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(None, "not known yet")
    program = await a_program(client)
    tested = kernel.calls.count("test_feature")

    def find_out() -> None:
        kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(False, "CONFIG_FPROBE")

    kernel.hooks["create_link"] = find_out
    kernel.fail["create_link"] = OSError(number, "no")
    problem = await client.refused(
        "POST", "/links", link(program), status=501, kind="not-supported"
    )
    assert "5.18" in problem["needs"]
    assert "CONFIG_FPROBE" in problem["detail"]
    # Once before the link was tried, and once after.
    assert kernel.calls.count("test_feature") == tested + 2


async def test_esrch_comes_before_the_feature_test(client: Client, kernel: FakeKernel) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(None, "not known")
    kernel.fail["create_link"] = OSError(errno.ESRCH, "no")
    program = await a_program(client)
    tested = kernel.calls.count("test_feature")
    await client.refused("POST", "/links", link(program), status=422, kind="symbol-not-found")
    assert kernel.calls.count("test_feature") == tested + 1


@pytest.mark.parametrize(
    ("attach", "kind", "feature", "needs"),
    [
        ("kprobe_multi", "kprobe", "bpf_link_kprobe_multi", "5.18"),
        ("kprobe_multi", "kretprobe", "bpf_link_kprobe_multi", "5.18"),
        ("kprobe_session", "session", "bpf_link_kprobe_session", "6.10"),
    ],
)
async def test_a_kernel_without_the_feature(
    client: Client, kernel: FakeKernel, attach: str, kind: str, feature: str, needs: str
) -> None:
    kernel.answers[feature] = FeatureAnswer(False, "no CONFIG_FPROBE")
    kernel.answers["kprobe_perf_event"] = FeatureAnswer(False, "no CONFIG_KPROBES")
    program = await a_program(client, attach=attach)
    for _ in range(2):
        problem = await client.refused(
            "POST", "/links", link(program, kind=kind), status=501, kind="not-supported"
        )
        assert needs in problem["needs"]
        assert "no CONFIG_FPROBE" in problem["detail"]
    assert "create_link" not in kernel.calls
    tested = kernel.calls.count("test_feature")
    await client.refused(
        "POST", "/links", link(program, kind=kind), status=501, kind="not-supported"
    )
    assert kernel.calls.count("test_feature") == tested
    other, other_kind = (
        ("kprobe_session", "session") if attach == "kprobe_multi" else ("kprobe_multi", "kprobe")
    )
    await a_link(client, await a_program(client, attach=other), kind=other_kind)


async def test_a_failed_link_lets_its_program_go(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    for _ in range(3):
        kernel.fail["create_link"] = OSError(errno.ENOMEM, "no")
        await client.refused("POST", "/links", link(program), status=500, kind="kernel")
    await client.delete(f"/programs/{program}")
    assert not kernel.loaded


async def test_a_program_is_not_deleted_under_a_link_being_made(
    client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    gate = kernel.hooks["create_link"] = Gate()
    asked = asyncio.create_task(client.request("POST", "/links", link(program)))
    await asyncio.to_thread(gate.entered.wait, 10)
    for force in ("", "?force=true"):
        await client.refused("DELETE", f"/programs/{program}{force}", status=409, kind="conflict")
    gate.open()
    assert (await asked).status == 201
    assert len(kernel.loaded) == 1


async def test_a_link_that_cannot_be_told_of_is_not_left_behind(
    client: Client, kernel: FakeKernel
) -> None:
    """An error answer means that nothing was attached."""
    program = await a_program(client)
    kernel.fail["link_details"] = KernelError("out of file descriptors", errno.EMFILE)
    answer = await client.request("POST", "/links", link(program, lifetime=PERSISTENT))
    assert (answer.status == 201) == (len(kernel.attached) == 1), answer.body


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "program"), ("PUT", "pin"), ("DELETE", "pin")]
)
async def test_links_can_be_neither_updated_nor_pinned(
    client: Client, kernel: FakeKernel, method: str, path: str
) -> None:
    made = await a_link(client)
    await client.refused(method, f"/links/{made}/{path}", status=501, kind="not-supported")
    await client.refused(
        method, f"/links/{made}/{path}", {"a": 1}, status=501, kind="not-supported"
    )
    await client.refused(method, f"/links/lnk-0/{path}", status=404, kind="not-found")
    assert len(kernel.attached) == 1


@pytest.mark.parametrize("path", ["", "/targets", "/skipped"])
async def test_links_that_do_not_exist(client: Client, path: str) -> None:
    program = await a_program(client)
    for id_ in ("lnk-", program, "%00", "x" * 3000):
        await client.refused("GET", f"/links/{id_}{path}", status=404, kind="not-found")
        await client.refused("DELETE", f"/links/{id_}", status=404, kind="not-found")


@pytest.mark.parametrize("program", ["", "prg-0", "\0", "x" * 10_000, "\U0001f600"])
async def test_a_link_with_a_program_that_does_not_exist(client: Client, program: str) -> None:
    await client.refused("POST", "/links", link(program), status=404, kind="not-found")


async def test_lists_by_program_and_client(client: Client) -> None:
    first, second = await a_program(client), await a_program(client)
    of_first = [await a_link(client, first) for _ in range(3)]
    of_second = [await a_link(client, second) for _ in range(2)]
    owner = (await client.get(f"/links/{of_first[0]}"))["client"]

    async def listed(query: str) -> list[str]:
        return [each["id"] for each in (await client.get(f"/links?{query}"))["items"]]

    assert await listed(f"program={first}") == of_first
    assert await listed(f"program={second}") == of_second
    assert await listed(f"client={owner}") == [*of_first, *of_second]
    assert await listed(f"client={owner}&program={second}") == of_second
    assert await listed("program=prg-0") == []
    assert await listed("client=cli-0") == []
    assert await listed(f"program={first}&client=cli-0") == []


async def test_pages_of_filtered_links(client: Client) -> None:
    first, second = await a_program(client), await a_program(client)
    made = [await a_link(client, (first, second)[number % 2]) for number in range(9)]
    wanted = made[::2]
    page = await client.get(f"/links?program={first}&limit=2")
    assert [each["id"] for each in page["items"]] == wanted[:2]
    for id_ in (wanted[1], wanted[2]):
        await client.delete(f"/links/{id_}")
    page = await client.get(f"/links?program={first}&limit=2&after={page['next']}")
    assert [each["id"] for each in page["items"]] == wanted[3:]
    assert page["next"] is None
    everything = [made[number] for number in range(9) if made[number] not in wanted[1:3]]
    collected: list[str] = []
    after = ""
    while True:
        page = await client.get(f"/links?limit=3{after}")
        collected += [each["id"] for each in page["items"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert collected == everything


async def test_a_link_that_is_being_detached_does_not_spoil_a_list(
    client: Client, kernel: FakeKernel
) -> None:
    """It goes between being found and its details being read."""
    program = await a_program(client)
    made = [await a_link(client, program) for _ in range(3)]
    gate = kernel.hooks["link_details"] = Gate()
    listing = asyncio.create_task(client.get("/links"))
    await asyncio.to_thread(gate.entered.wait, 10)
    await client.delete(f"/links/{made[1]}")
    gate.open()
    assert {each["id"] for each in (await listing)["items"]} >= {made[0], made[2]}


async def test_more_targets_than_one_link_takes(client: Client, kernel: FakeKernel) -> None:
    names = ",".join(f'"f{number}"' for number in range((1 << 20) + 1))
    program = await a_program(client)
    data = f'{{"program":"{program}","kind":"kprobe","symbols":[{names}]}}'.encode()
    problem = await client.refused(
        "POST", "/links", data=io.BytesIO(data), status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == ["symbols"]
    assert kernel.links == []


@pytest.mark.alone
@pytest.mark.usefixtures("no_garbage")
async def test_many_targets_leave_the_event_loop_free(serve: Serve) -> None:
    """Others are answered meanwhile, within a part of the time that the large request takes."""
    many = 100_000
    kernel = FakeKernel(files=symbol_files(many=many))
    served = await serve(kernel)
    async with Client(served.path) as client, Client(served.path) as other:
        program = await a_program(client)
        await client.get("/links")
        body = link(program, symbols=[f"many_{number}" for number in range(many)])
        data = io.BytesIO(json.dumps(body).encode())
        started = time.monotonic()
        asked = asyncio.create_task(client.request("POST", "/links", data=data))
        longest = 0.0
        while not asked.done():
            before = time.monotonic()
            await other.get("/healthz")
            longest = max(longest, time.monotonic() - before)
        taken = time.monotonic() - started
        answer = await asked
        assert answer.status == 201, answer.body[:300]
        assert answer.json["count"] == many
        # The test's own checks run in this loop as well.
        assert longest < max(0.25, taken / 3), (longest, taken)
        page = await client.get(f"/links/{answer.json['id']}/targets?limit=1000&after=99500")
        assert len(page["items"]) == 500
        assert page["items"][-1]["symbol"] == f"many_{many - 1}"
