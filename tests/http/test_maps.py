"""GET of maps and of what is in them."""

from __future__ import annotations

import asyncio
import errno

import pytest

from kpmd.errors import KernelError, NotSupported
from tests.fakes.kernel import FakeKernel
from tests.http.samples import Gate, a_program, elf
from tests.http.serving import Client


def key(number: int) -> bytes:
    """A key of the fake kernel's map."""
    return number.to_bytes(8, "big")


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(entries={key(number): [bytes([number]) * 8] for number in range(1, 8)})


async def a_map(client: Client) -> str:
    """Load an object: the id of its map."""
    id_: str = (await client.post("/programs", elf()))["maps"][0]["id"]
    return id_


async def test_a_map(client: Client) -> None:
    made = await client.post("/programs", elf())
    (map_,) = made["maps"]
    assert (map_["name"], map_["type"], map_["max_entries"]) == ("counts", "hash", 16384)
    assert (map_["key_size"], map_["value_size"]) == (8, 8)
    assert await client.get(f"/maps/{map_['id']}") == map_
    assert (await client.get("/maps"))["items"] == [map_]


async def test_pages_of_maps(client: Client) -> None:
    made = [await a_map(client) for _ in range(5)]
    page = await client.get("/maps?limit=2")
    assert [each["id"] for each in page["items"]] == made[:2]
    for program in (await client.get(f"/maps/{made[1]}"))["programs"]:
        await client.delete(f"/programs/{program}")
    page = await client.get(f"/maps?limit=3&after={page['next']}")
    assert [each["id"] for each in page["items"]] == made[2:]
    assert page["next"] is None


async def test_entries_page_by_page(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    everything = [
        {"key": key(number).hex(), "value": f"{number:02x}" * 8} for number in range(1, 8)
    ]
    assert await client.get(f"/maps/{map_}/entries") == {"items": everything, "next": None}
    assert (await client.get(f"/maps/{map_}/entries?limit=7"))["next"] is None
    first = await client.get(f"/maps/{map_}/entries?limit=3")
    assert first == {"items": everything[:3], "next": key(3).hex()}
    del kernel.entries[key(4)]
    second = await client.get(f"/maps/{map_}/entries?limit=3&after={first['next']}")
    assert second["items"] == everything[4:7]
    assert second["next"] is None


async def test_an_empty_map(client: Client, kernel: FakeKernel) -> None:
    kernel.entries.clear()
    assert await client.get(f"/maps/{await a_map(client)}/entries") == {"items": [], "next": None}


async def test_values_of_each_cpu(client: Client, kernel: FakeKernel) -> None:
    kernel.map_type = ("percpu_hash", 5)
    kernel.entries = {key(1): [bytes(8), b"\xff" * 8]}
    map_ = await a_map(client)
    expected = {"key": key(1).hex(), "value": ["00" * 8, "ff" * 8]}
    assert (await client.get(f"/maps/{map_}/entries"))["items"] == [expected]
    assert await client.get(f"/maps/{map_}/entries/{key(1).hex()}") == expected


async def test_one_entry(client: Client) -> None:
    map_ = await a_map(client)
    found = await client.get(f"/maps/{map_}/entries/{key(2).hex()}")
    assert found == {"key": key(2).hex(), "value": "02" * 8}
    assert await client.get(f"/maps/{map_}/entries/{key(2).hex().upper()}") == found
    problem = await client.refused(
        "GET", f"/maps/{map_}/entries/{key(99).hex()}", status=404, kind="not-found"
    )
    assert key(99).hex() in problem["detail"]


@pytest.mark.parametrize(
    "text",
    ["0", "zz", "00", "00" * 7, "00" * 9, "0x" + "00" * 8, "%C3%A9", "%00", "-1", "%20" * 16],
)
async def test_keys_that_are_none(client: Client, text: str) -> None:
    map_ = await a_map(client)
    problem = await client.refused(
        "GET", f"/maps/{map_}/entries/{text}", status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == ["key"]
    problem = await client.refused(
        "GET", f"/maps/{map_}/entries?after={text}", status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == ["after"]


async def test_maps_that_do_not_exist(client: Client) -> None:
    for id_ in ("map-0", "%00", "x" * 3000, await a_program(client)):
        for path in ("", "/entries", f"/entries/{key(1).hex()}"):
            await client.refused("GET", f"/maps/{id_}{path}", status=404, kind="not-found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("page", "/entries"), ("lookup", f"/entries/{key(1).hex()}")],
)
async def test_what_the_kernel_refuses(
    client: Client, kernel: FakeKernel, method: str, path: str
) -> None:
    map_ = await a_map(client)
    kernel.fail[method] = KernelError("no", errno.EPERM)
    problem = await client.refused("GET", f"/maps/{map_}{path}", status=500, kind="kernel")
    assert problem["errno"] == "EPERM"
    kernel.fail[method] = NotSupported("a ring buffer has no keys")
    await client.refused("GET", f"/maps/{map_}{path}", status=501, kind="not-supported")
    await client.get(f"/maps/{map_}{path}")


@pytest.mark.parametrize(
    ("method", "path"),
    [("page", "/entries"), ("lookup", f"/entries/{key(1).hex()}")],
)
async def test_a_map_that_ends_while_it_is_read(
    client: Client, kernel: FakeKernel, method: str, path: str
) -> None:
    made = await client.post("/programs", elf())
    gate = kernel.hooks[method] = Gate()
    asked = asyncio.create_task(client.request("GET", f"/maps/{made['maps'][0]['id']}{path}"))
    await asyncio.to_thread(gate.entered.wait, 10)
    for program in made["programs"]:
        await client.delete(f"/programs/{program['id']}")
    gate.open()
    answer = await asked
    assert (answer.status, answer.kind) == (404, "not-found")


async def test_maps_share_the_fate_of_their_programs(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    first, second = (await client.get(f"/maps/{map_}"))["programs"]
    await client.delete(f"/programs/{first}")
    assert (await client.get(f"/maps/{map_}"))["programs"] == [second]
    await client.delete(f"/programs/{second}")
    assert not kernel.open_maps
