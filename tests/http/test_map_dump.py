"""GET /maps/{id}/dump: a whole map as a stream."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from kpmd.api import map_dump
from kpmd.errors import KernelError
from tests.fakes.kernel import FakeKernel
from tests.http.contract import NDJSON, OCTETS
from tests.http.samples import elf
from tests.http.serving import Client, Served, until
from tests.http.streaming import Cut, listening

RAW = {"Accept": OCTETS}
NUMBERS = range(1, 3001)


def key(number: int) -> bytes:
    return number.to_bytes(8, "big")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_dump, "_ENTRIES", {NDJSON: 1000, OCTETS: 700})


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel(entries={key(each): [bytes([each % 256]) * 8] for each in NUMBERS})


async def a_map(client: Any) -> str:
    """Load an object: the path of its map's dump."""
    id_: str = (await client.post("/programs", elf()))["maps"][0]["id"]
    return f"/maps/{id_}/dump"


@pytest.mark.parametrize("accept", ["*/*", NDJSON, "application/json", ""])
async def test_lines(client: Client, accept: str) -> None:
    answer = await client.request("GET", await a_map(client), headers={"Accept": accept})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == NDJSON
    lines = [json.loads(line) for line in answer.body.splitlines()]
    assert lines == [{"key": key(each).hex(), "value": f"{each % 256:02x}" * 8} for each in NUMBERS]


async def test_octets(client: Client, kernel: FakeKernel) -> None:
    dump = await a_map(client)
    answer = await client.request("GET", dump, headers=RAW)
    assert answer.headers["Content-Type"] == OCTETS
    assert answer.body == b"".join(each + values[0] for each, values in kernel.entries.items())
    kernel.entries.clear()
    assert (await client.request("GET", dump, headers=RAW)).body == b""
    assert (await client.request("GET", dump)).body == b""


async def test_octets_of_each_cpu(client: Client, kernel: FakeKernel) -> None:
    kernel.map_type, kernel.map_sizes = ("percpu_hash", 5), (8, 5)
    kernel.entries = {key(1): [b"aaaaa", b"bbbbb"], key(2): [b"ccccc", b"ddddd"]}
    answer = await client.request("GET", await a_map(client), headers=RAW)
    assert answer.body == key(1) + b"aaaaabbbbb" + key(2) + b"cccccddddd"


async def test_one_that_fails_is_cut(served: Served, client: Client, kernel: FakeKernel) -> None:
    dump = await a_map(client)
    pages = itertools.count(1)

    def second_fails() -> None:
        if next(pages) == 2:
            raise KernelError("no", 12)

    kernel.hooks["page"] = second_fails
    async with listening(served.path, path=dump) as stream:
        with pytest.raises(Cut):
            await stream.rest()
    await until(lambda: served.state.counters.used(0, "streams") == 0)


async def test_what_fails_at_once_is_told(client: Client, kernel: FakeKernel) -> None:
    dump = await a_map(client)
    kernel.fail["page"] = KernelError("no", 12)
    await client.refused("GET", dump, status=500, kind="kernel")
    await client.refused("GET", "/maps/map-1/dump", status=404, kind="not-found")
    await client.refused("GET", f"{dump}?limit=1", status=422, kind="invalid")


async def test_who_does_not_read_is_cut(
    served: Served, client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for them no more is read of the map than the socket and a piece hold."""
    monkeypatch.setattr(map_dump, "_SECONDS", 0.05)
    kernel.map_sizes = (8, 4096)
    kernel.entries = {key(each): [bytes(4096)] for each in range(4000)}
    async with listening(served.path, path=await a_map(client), headers=RAW):
        await until(lambda: served.state.counters.used(0, "streams") == 0)
    assert kernel.calls.count("page") < 20
