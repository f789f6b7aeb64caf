"""Global variables of programs by name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kpmd.core.btf import Btf, Kind
from tests.fakes.kernel import FakeKernel
from tests.http.actor import Actor
from tests.http.samples import Gate, elf
from tests.http.serving import Client
from tests.unit.btf import Types

PERCENT = "%25"


def made() -> tuple[bytes, list[tuple[str, bytes, int]]]:
    """BTF with sections of variables, and their values."""
    types = Types()
    u32 = types.integer("__u32", 4)
    u64 = types.integer("__u64", 8)
    text = types.array(types.char(), 8)
    nothing = types.record(Kind.FWD, "unknown")
    data = types.section(
        ".data", 16, [(types.var("count", u32), 0, 4), (types.var("total", u64), 8, 8)]
    )
    bss = types.section(
        ".bss",
        24,
        [
            (types.var("name", text), 0, 8),
            (types.var("odd", nothing), 8, 8),
            (types.var("short", u64), 16, 4),
            (types.var("count", u32), 20, 4),
        ],
    )
    constants = types.section(".rodata", 4, [(types.var("limit", u32), 0, 4)])
    variables = [
        (".data", bytes([42]) + bytes(7) + bytes([1, 1]) + bytes(6), data),
        (".bss", b"bash".ljust(24, b"\0"), bss),
        (".rodata", bytes([3, 0, 0, 0]), constants),
    ]
    return types.raw(), variables


@pytest.fixture
def kernel() -> FakeKernel:
    btf, variables = made()
    return FakeKernel(btf=btf, variables=variables)


async def a_program(client: Any) -> str:
    """Load an object: the path of its variables."""
    id_: str = (await client.post("/programs", elf()))["programs"][0]["id"]
    return f"/programs/{id_}/globals"


async def test_all(client: Client) -> None:
    path = await a_program(client)
    page = await client.get(path)
    found = [(each["section"], each["name"]) for each in page["items"]]
    assert found == [
        (".data", "count"),
        (".data", "total"),
        (".bss", "name"),
        (".bss", "odd"),
        (".bss", "short"),
        (".bss", "count"),
        (".rodata", "limit"),
    ]
    assert page["next"] is None
    maps = {each["name"]: each["id"] for each in (await client.get("/maps"))["items"]}
    assert page["items"][1] == {
        "name": "total",
        "section": ".data",
        "map": maps[".data"],
        "type": "__u64",
        "size": 8,
        "writable": True,
        "value": "0101000000000000",
        "decoded": "257",
    }
    assert page["items"][2]["decoded"] == "bash"
    assert page["items"][6]["writable"] is False
    for odd in page["items"][3:5]:
        assert odd["type"] is None
        assert "decoded" not in odd
    assert await client.get(f"{path}/total") == page["items"][1]
    # Of two of a name, as static variables may be, the first.
    assert (await client.get(f"{path}/count"))["section"] == ".data"


async def test_pages(client: Client) -> None:
    path = await a_program(client)
    first = await client.get(f"{path}?limit=3")
    assert [each["name"] for each in first["items"]] == ["count", "total", "name"]
    rest = await client.get(f"{path}?after={first['next']}")
    assert [each["name"] for each in rest["items"]] == ["odd", "short", "count", "limit"]
    assert (await client.get(f"{path}?after=99"))["items"] == []
    await client.refused("GET", f"{path}?after=x", status=422, kind="invalid")


async def test_a_page_takes_its_time(client: Client, kernel: FakeKernel) -> None:
    """Each variable is of a type that is found to be too much only at its end."""
    types = Types()
    u8 = types.integer("u8", 1)
    wide = types.struct("wide", 5000, [("", u8, 8 * each) for each in range(5000)])
    listed = [(types.var(f"v{each}", wide), 0, 5000) for each in range(1000)]
    kernel.variables = [(".bss", bytes(5000), types.section(".bss", 5000, listed))]
    kernel.btf = types.raw()
    path = await a_program(client)
    began = time.monotonic()
    page = await client.get(f"{path}?limit=1000")
    assert time.monotonic() - began < 5
    assert page["items"][0]["type"] is None
    assert page["next"] == str(len(page["items"]))


@pytest.mark.parametrize(
    ("name", "body", "section", "expected"),
    [
        ("count", {"decoded": 7}, ".data", bytes([7]) + bytes(7) + bytes([1, 1]) + bytes(6)),
        ("total", {"decoded": "0xff"}, ".data", bytes([42]) + bytes(7) + b"\xff" + bytes(7)),
        ("name", {"decoded": "sh"}, ".bss", b"sh".ljust(24, b"\0")),
        ("odd", {"value": "aa" * 8}, ".bss", b"bash\0\0\0\0" + b"\xaa" * 8 + bytes(8)),
    ],
)
async def test_only_its_own_bytes_are_written(
    client: Client,
    kernel: FakeKernel,
    name: str,
    body: dict[str, object],
    section: str,
    expected: bytes,
) -> None:
    path = await a_program(client)
    answer = await client.request("PUT", f"{path}/{name}", body)
    assert (answer.status, answer.body) == (204, b"")
    assert kernel.sections[section] == {bytes(4): [expected]}
    shown = await client.get(f"{path}/{name}")
    assert bytes.fromhex(shown["value"]) in expected


@pytest.mark.parametrize(
    ("name", "body", "loc"),
    [
        ("count", {}, ["value"]),
        ("count", {"value": "00", "decoded": 1}, ["value"]),
        ("count", {"value": "00"}, ["value"]),
        ("count", {"value": "0000000x"}, ["value"]),
        ("count", {"value": ["00000000"]}, ["value"]),
        ("count", {"decoded": -1}, ["decoded"]),
        ("count", {"decoded": 1 << 32}, ["decoded"]),
        ("count", {"decoded": None}, ["decoded"]),
        ("name", {"decoded": "much too long"}, ["decoded"]),
        ("odd", {"decoded": 1}, ["decoded"]),
        ("short", {"decoded": "1"}, ["decoded"]),
        ("count", {"decoded": 1, "mode": "any"}, ["mode"]),
    ],
)
async def test_values_that_do_not_fit(
    client: Client, kernel: FakeKernel, name: str, body: dict[str, object], loc: list[str]
) -> None:
    path = await a_program(client)
    problem = await client.refused("PUT", f"{path}/{name}", body, status=422, kind="invalid")
    assert problem["errors"][0]["loc"][: len(loc)] == loc
    assert "write_at" not in kernel.calls


async def test_constants_are_given_at_load(client: Client, kernel: FakeKernel) -> None:
    path = await a_program(client)
    problem = await client.refused(
        "PUT", f"{path}/limit", {"decoded": 1}, status=501, kind="not-supported"
    )
    assert "source.globals" in problem["detail"]


@pytest.mark.parametrize("name", ["nothing", "", "coun", "Count", f"{PERCENT}00", ".data"])
async def test_names_that_are_none(client: Client, name: str) -> None:
    path = await a_program(client)
    await client.refused("GET", f"{path}/{name}", status=404, kind="not-found")


@pytest.mark.parametrize("btf", [b"", b"x" * 100])
async def test_without_btf(client: Client, kernel: FakeKernel, btf: bytes) -> None:
    kernel.btf = btf
    path = await a_program(client)
    for where in (path, f"{path}/count"):
        problem = await client.refused("GET", where, status=501, kind="not-supported")
        assert "/entries" in problem["detail"]


async def test_a_program_without_maps(client: Client) -> None:
    from tests.http.samples import a_program as instructions

    assert await client.get(f"/programs/{await instructions(client)}/globals") == {
        "items": [],
        "next": None,
    }


async def test_sections_of_another_size(client: Client, kernel: FakeKernel) -> None:
    """What the BTF says lies outside of the map is not there."""
    kernel.variables = [(name, value[:8], type_) for name, value, type_ in kernel.variables]
    names = [each["name"] for each in (await client.get(await a_program(client)))["items"]]
    assert names == ["count", "name", "limit"]


async def test_of_others(client: Client, actor: Callable[..., Awaitable[Actor]]) -> None:
    path = await a_program(client)
    stranger = await actor(4001)
    for method, where, body in (
        ("GET", path, None),
        ("GET", f"{path}/count", None),
        ("PUT", f"{path}/count", {"decoded": 1}),
    ):
        answer = await stranger.request(method, where, body)
        assert (answer.status, answer.kind) == (404, "not-found")


async def test_a_program_that_ends_meanwhile(client: Client, kernel: FakeKernel) -> None:
    loaded = await client.post("/programs", elf())
    gate = kernel.hooks["lookup"] = Gate()
    path = f"/programs/{loaded['programs'][0]['id']}/globals"
    asked = asyncio.create_task(client.request("GET", path))
    await asyncio.to_thread(gate.entered.wait, 10)
    for program in loaded["programs"]:
        await client.delete(f"/programs/{program['id']}")
    gate.open()
    answer = await asked
    assert (answer.status, answer.kind) == (404, "not-found")


def test_the_btf_is_what_it_should_be() -> None:
    btf, variables = made()
    assert [Btf(btf).kind(type_) for _, _, type_ in variables] == [Kind.DATASEC] * 3
