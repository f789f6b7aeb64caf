"""What is in maps, decoded through BTF; stack traces."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from kpmd.core.policy import Policy
from tests.fakes.kernel import FUNCTIONS, UNTRACEABLE, FakeKernel, symbol_files
from tests.fakes.policies import EVERYTHING
from tests.http.actor import NOBODY, Actor
from tests.http.map_samples import (
    BTF,
    KEY,
    KEY_BYTES,
    LEFT,
    LEFT_BYTES,
    VALUE_SIZE,
    a_map,
    by_json,
    percpu_pairs,
    structs,
)
from tests.http.samples import elf
from tests.http.serving import Client
from tests.unit.btf import Types


@pytest.fixture
def kernel() -> FakeKernel:
    return structs()


@pytest.fixture
def pairs() -> FakeKernel:
    return percpu_pairs()


async def test_entries_are_decoded(client: Client, kernel: FakeKernel) -> None:
    kernel.entries = {KEY_BYTES: [b"\xff" + bytes(VALUE_SIZE - 1)]}
    map_ = await a_map(client)
    ((item,), after) = (await client.get(f"{map_}/entries")).values()
    assert after is None
    assert item["key"] == KEY_BYTES.hex()
    assert item["value"] == "ff" + "00" * (VALUE_SIZE - 1)
    assert item["decoded"]["key"] == KEY
    assert item["decoded"]["value"]["s8"] == -1
    assert item["decoded"]["value"]["u64"] == "0"
    assert item["decoded"]["value"]["colour"] == "RED"
    assert item["decoded"]["value"]["pair"] == {"left": 0, "right": "0"}
    for key in (KEY_BYTES.hex(), by_json(KEY)):
        assert await client.get(f"{map_}/entries/{key}") == item
        plain = await client.get(f"{map_}/entries/{key}?decode=false")
        assert plain == {"key": item["key"], "value": item["value"]}
    assert (await client.get(f"{map_}/entries?decode=false"))["items"] == [plain]


async def test_values_of_each_cpu_are_decoded(serve: Any, pairs: FakeKernel) -> None:
    pairs.entries = {KEY_BYTES: [LEFT_BYTES, bytes(16)]}
    async with Client((await serve(pairs)).path) as client:
        (item,) = (await client.get(f"{await a_map(client)}/entries"))["items"]
        assert item["value"] == [LEFT_BYTES.hex(), "00" * 16]
        assert item["decoded"] == {"key": KEY, "value": [LEFT, {"left": 0, "right": "0"}]}


@pytest.mark.parametrize("types", [(0, 0), (0, 4), (3, 3), (1 << 31, 1 << 31)])
async def test_what_the_btf_does_not_tell_is_left_out(
    client: Client, kernel: FakeKernel, types: tuple[int, int]
) -> None:
    """No types, one that has another size, ids that are none."""
    kernel.map_types = types
    kernel.entries = {KEY_BYTES: [bytes(VALUE_SIZE)]}
    expected = {"key": KEY_BYTES.hex(), "value": "00" * VALUE_SIZE}
    assert (await client.get(f"{await a_map(client)}/entries"))["items"] == [expected]


@pytest.mark.parametrize("btf", [b"", b"\0", BTF[:-1], BTF[:24], bytes(1000)])
async def test_broken_btf_is_none(client: Client, kernel: FakeKernel, btf: bytes) -> None:
    kernel.btf = btf
    kernel.entries = {KEY_BYTES: [bytes(VALUE_SIZE)]}
    map_ = await a_map(client)
    assert set((await client.get(f"{map_}/entries"))["items"][0]) == {"key", "value"}
    problem = await client.refused(
        "PUT", f"{map_}/entries/{KEY_BYTES.hex()}", {"decoded": {}}, status=422, kind="invalid"
    )
    assert "give it in hex" in problem["errors"][0]["msg"]
    problem = await client.refused(
        "GET", f"{map_}/entries/{by_json(KEY)}", status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == ["key"]


async def test_little_that_decodes_to_much_is_bounded(client: Client, kernel: FakeKernel) -> None:
    """A union of 4,000 members with long names, in a value of one byte."""
    types = Types()
    number = types.integer("u8", 1)
    members = [(f"{each:0>60}", number, 0) for each in range(4000)]
    kernel.map_types = (0, types.struct("wide", 1, members, kind=5))
    kernel.btf = types.raw()
    kernel.map_sizes = (8, 1)
    kernel.entries = {each.to_bytes(8, "big"): [b"\1"] for each in range(1000)}
    map_ = await a_map(client)
    answer = await client.request("GET", f"{map_}/entries?limit=1000")
    assert len(answer.body) < 4 << 20
    assert answer.json["items"]
    assert answer.json["next"] is not None
    assert len((await client.get(f"{map_}/entries?limit=1000&decode=false"))["items"]) == 1000


async def test_a_page_is_bounded_by_its_bytes(client: Client, kernel: FakeKernel) -> None:
    kernel.map_sizes = (8, 100_000)
    kernel.map_types = (0, 0)
    kernel.entries = {each.to_bytes(8, "big"): [bytes(100_000)] for each in range(5)}
    map_ = await a_map(client)
    page = await client.get(f"{map_}/entries?limit=1000")
    assert len(page["items"]) == 2
    page = await client.get(f"{map_}/entries?after={page['next']}")
    assert [item["key"] for item in page["items"]] == [f"{each:016x}" for each in (2, 3)]


@pytest.mark.parametrize("decode", ["", "2", "null", "truee"])
async def test_decode_is_yes_or_no(client: Client, decode: str) -> None:
    path = f"{await a_map(client)}/entries?decode={decode}"
    await client.refused("GET", path, status=422, kind="invalid")


# Stack traces

VFS_WRITE, IDLE = FUNCTIONS["vfs_write"][0], UNTRACEABLE["do_idle_loop"]
IN_MODULE = FUNCTIONS["nf_hook"][0]


def trace(*addresses: int) -> bytes:
    return b"".join(each.to_bytes(8, "little") for each in addresses).ljust(64, b"\0")


@pytest.fixture
def stacks() -> FakeKernel:
    return FakeKernel(
        map_type=("stack_trace", 7),
        map_sizes=(4, 64),
        entries={
            bytes(4): [trace(VFS_WRITE, IDLE + 0x20, IN_MODULE + 1, 0x7F00DEADBEEF)],
            bytes([1, 0, 0, 0]): [trace(0xFFFFFFFFFFFFFF00)],
        },
    )


def frame(address: int, symbol: str | None, offset: int | None, module: str | None = None) -> Any:
    return {
        "address": f"0x{address:016x}",
        "symbol": symbol,
        "offset": offset,
        "module": module,
    }


async def test_stack_traces_are_told_by_name(serve: Any, stacks: FakeKernel) -> None:
    async with Client((await serve(stacks)).path) as client:
        map_ = await a_map(client)
        first, second = (await client.get(f"{map_}/entries"))["items"]
        assert first["decoded"]["value"]["frames"] == [
            frame(VFS_WRITE, "vfs_write", 0),
            frame(IDLE + 0x20, "do_idle_loop", 0x20),
            frame(IN_MODULE + 1, "nf_hook", 1, "nf_tables"),
            frame(0x7F00DEADBEEF, None, None),
        ]
        assert second["decoded"]["value"]["frames"] == [frame(0xFFFFFFFFFFFFFF00, None, None)]
        assert await client.get(f"{map_}/entries/00000000") == first
        assert "decoded" not in await client.get(f"{map_}/entries/00000000?decode=false")
        problem = await client.refused(
            "PUT",
            f"{map_}/entries/00000000",
            {"decoded": {"frames": []}},
            status=422,
            kind="invalid",
        )
        assert problem["errors"][0]["loc"] == ["decoded"]


async def test_modules_that_come_are_known(serve: Any, stacks: FakeKernel) -> None:
    stacks.files = symbol_files(without=["nf_tables"])
    async with Client((await serve(stacks)).path) as client:
        map_ = await a_map(client)
        path = f"{map_}/entries/00000000"
        shown = (await client.get(path))["decoded"]["value"]["frames"][2]
        assert shown["symbol"] is None
        stacks.files = symbol_files()
        stacks.signature = (b"another",)
        shown = (await client.get(path))["decoded"]["value"]["frames"][2]
        assert shown["symbol"] == "nf_hook"


async def test_hidden_addresses_have_no_names(serve: Any, stacks: FakeKernel) -> None:
    stacks.files = symbol_files(hidden=True)
    async with Client((await serve(stacks)).path) as client:
        entry = await client.get(f"{await a_map(client)}/entries/00000000")
        assert entry["decoded"]["value"]["frames"][0] == frame(VFS_WRITE, None, None)


async def test_names_of_addresses_are_for_who_may_list_functions(
    serve: Any, stacks: FakeKernel, actor: Callable[..., Awaitable[Actor]]
) -> None:
    without = replace(EVERYTHING, rights=EVERYTHING.rights - {"symbols"})
    served = await serve(stacks, policy=Policy((without,)))
    user = await actor(NOBODY, served.path)
    made = await user.post("/programs", elf())
    entry = await user.get(f"/maps/{made['maps'][0]['id']}/entries/00000000")
    assert entry["decoded"]["value"]["frames"][0] == frame(VFS_WRITE, None, None)
    assert "symbol_files" not in stacks.calls
