"""Maps whose keys and values are structs, and what goes into them."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from kpmd.core.btf import Btf, Kind
from tests.fakes.kernel import FakeKernel
from tests.http.samples import elf
from tests.http.serving import Client
from tests.unit.btf import OBJECTS, section

#: The BTF of an object with struct key and struct value, which have something of everything.
BTF = section(OBJECTS / "types.bpf.o", ".BTF")


def type_id(name: str) -> int:
    found = Btf(BTF).find(name, Kind.STRUCT)
    assert found is not None
    return found


KEY = {"pid": 42, "comm": "bash"}
KEY_BYTES = (42).to_bytes(4, "little") + b"bash".ljust(16, b"\0")
VALUE_SIZE = 104
LEFT = {"left": 1, "right": "2"}
LEFT_BYTES = bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0])


def structs() -> FakeKernel:
    """A kernel whose maps are hashes of struct key and struct value."""
    return FakeKernel(
        btf=BTF, map_types=(type_id("key"), type_id("value")), map_sizes=(20, VALUE_SIZE)
    )


def percpu_pairs() -> FakeKernel:
    """One whose maps are per-CPU hashes of struct key and struct pair."""
    return FakeKernel(
        btf=BTF,
        map_type=("percpu_hash", 5),
        map_types=(type_id("key"), type_id("pair")),
        map_sizes=(20, 16),
    )


async def a_map(client: Any, **fields: Any) -> str:
    """Load an object: the path of its map."""
    source = {"kind": "object", "elf": elf()["source"]["elf"], **fields}
    id_: str = (await client.post("/programs", {"source": source}))["maps"][0]["id"]
    return f"/maps/{id_}"


def by_json(value: object) -> str:
    """A key as the path has it."""
    return quote("json:" + json.dumps(value), safe="")


async def done(client: Client, method: str, path: str, body: object = None) -> None:
    answer = await client.request(method, path, body)
    assert answer.status == 204, answer.body
