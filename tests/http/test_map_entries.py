"""Entries are written, encoded through BTF, and deleted; queues and stacks."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.fakes.content import CPUS
from tests.fakes.kernel import FakeKernel
from tests.http.map_samples import (
    KEY,
    KEY_BYTES,
    LEFT,
    LEFT_BYTES,
    VALUE_SIZE,
    a_map,
    by_json,
    done,
    percpu_pairs,
    structs,
    type_id,
)
from tests.http.serving import Client


@pytest.fixture
def kernel() -> FakeKernel:
    return structs()


@pytest.fixture
def pairs() -> FakeKernel:
    return percpu_pairs()


async def test_put_in_hex(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    path = f"{map_}/entries/{KEY_BYTES.hex()}"
    await done(client, "PUT", path, {"value": "ab" * VALUE_SIZE})
    assert kernel.entries == {KEY_BYTES: [b"\xab" * VALUE_SIZE]}
    assert (await client.get(path))["value"] == "ab" * VALUE_SIZE


async def test_put_in_json(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    value = {"s8": -1, "colour": "GREEN", "names": ["one", "two"], "high": "0xff", "middle": -3}
    await done(client, "PUT", f"{map_}/entries/{by_json(KEY)}", {"decoded": value})
    assert list(kernel.entries) == [KEY_BYTES]
    shown = (await client.get(f"{map_}/entries/{by_json(KEY)}"))["decoded"]["value"]
    assert {name: shown[name] for name in value} == {**value, "high": 255}
    assert shown["u8"] == 0


async def test_what_was_read_can_be_written(client: Client, kernel: FakeKernel) -> None:
    kernel.entries = {KEY_BYTES: [bytes(range(VALUE_SIZE))]}
    path = f"{await a_map(client)}/entries/{KEY_BYTES.hex()}"
    shown = await client.get(path)
    await done(client, "PUT", path, {"value": shown["value"]})
    assert kernel.entries == {KEY_BYTES: [bytes(range(VALUE_SIZE))]}


async def test_put_for_each_cpu(serve: Any, pairs: FakeKernel) -> None:
    async with Client((await serve(pairs)).path) as client:
        path = f"{await a_map(client)}/entries/{KEY_BYTES.hex()}"
        for body, expected in [
            ({"value": LEFT_BYTES.hex()}, [LEFT_BYTES] * CPUS),
            ({"value": [LEFT_BYTES.hex(), "00" * 16]}, [LEFT_BYTES, bytes(16)]),
            ({"decoded": LEFT}, [LEFT_BYTES] * CPUS),
            ({"decoded": [{}, LEFT]}, [bytes(16), LEFT_BYTES]),
        ]:
            await done(client, "PUT", path, body)
            assert pairs.entries == {KEY_BYTES: expected}
        wrong: list[Any] = [{"value": ["00" * 16]}, {"decoded": [{}] * 3}, {"value": []}]
        for given in wrong:
            problem = await client.refused("PUT", path, given, status=422, kind="invalid")
            assert f"{CPUS} possible CPUs" in problem["errors"][0]["msg"]
        problem = await client.refused(
            "PUT", path, {"value": ["00" * 16, "00"]}, status=422, kind="invalid"
        )
        assert problem["errors"][0]["loc"] == ["value", 1]
        problem = await client.refused(
            "PUT", path, {"decoded": [{}, {"left": -1}]}, status=422, kind="invalid"
        )
        assert problem["errors"][0]["loc"] == ["decoded", 1, "left"]


async def test_modes(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    path = f"{map_}/entries/{KEY_BYTES.hex()}"
    zeros = "00" * VALUE_SIZE
    replace, create = ({"value": zeros, "mode": mode} for mode in ("replace", "create"))
    await client.refused("PUT", path, replace, status=404, kind="not-found")
    await done(client, "PUT", path, create)
    await done(client, "PUT", path, replace)
    await client.refused("PUT", path, create, status=409, kind="conflict")
    await client.refused("PUT", path, {**create, "mode": "upsert"}, status=422, kind="invalid")


NESTED: Any = 1
for _ in range(150):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["value"]),
        ({"value": None}, ["value"]),
        ({"value": "00", "decoded": {}}, ["value"]),
        ({"value": ""}, ["value"]),
        ({"value": "00" * (VALUE_SIZE - 1)}, ["value"]),
        ({"value": "0" * (2 * VALUE_SIZE - 1)}, ["value"]),
        ({"value": "zz" * VALUE_SIZE}, ["value"]),
        ({"value": "é" * VALUE_SIZE}, ["value"]),
        ({"value": ["00" * VALUE_SIZE]}, ["value"]),
        ({"decoded": None}, ["decoded"]),
        ({"decoded": []}, ["decoded"]),
        ({"decoded": "text"}, ["decoded"]),
        ({"decoded": NESTED}, ["decoded"]),
        ({"decoded": {"nothing": 1}}, ["decoded", "nothing"]),
        ({"decoded": {"s8": 128}}, ["decoded", "s8"]),
        ({"decoded": {"colour": "PINK"}}, ["decoded", "colour"]),
        ({"decoded": {"grid": [[1, 2, 3], [4, 5, 6, 7]]}}, ["decoded", "grid", 1]),
        ({"decoded": {"names": ["much too long"]}}, ["decoded", "names", 0]),
        ({"decoded": {"pair": {"left": NESTED}}}, ["decoded", "pair", "left"]),
    ],
)
async def test_values_that_do_not_fit(
    client: Client, kernel: FakeKernel, body: dict[str, Any], loc: list[Any]
) -> None:
    path = f"{await a_map(client)}/entries/{KEY_BYTES.hex()}"
    problem = await client.refused("PUT", path, body, status=422, kind="invalid")
    assert problem["errors"][0]["loc"][: len(loc)] == loc
    assert kernel.entries == {}


@pytest.mark.parametrize(
    "text",
    [
        "json:",
        "json:{",
        "json:nan",
        "json:42",
        "json:[]",
        'json:{"pid":-1}',
        'json:{"pid":1,"pid2":1}',
        'json:{"comm":"seventeen letters"}',
        "json:" + "[" * 2000,
        "JSON:{}",
        "json",
        "00" * 19,
    ],
)
async def test_keys_that_do_not_fit(client: Client, kernel: FakeKernel, text: str) -> None:
    map_ = await a_map(client)
    path = f"{map_}/entries/{quote(text, safe='')}"
    for method, body in (("GET", None), ("DELETE", None), ("PUT", {"value": "00" * VALUE_SIZE})):
        problem = await client.refused(method, path, body, status=422, kind="invalid")
        assert problem["errors"][0]["loc"][0] == "key"
    problem = await client.refused(
        "DELETE", f"{map_}/entries", {"keys": [text]}, status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"][:2] == ["keys", 0]


async def test_a_key_with_slashes_in_it(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    key = {"pid": 1, "comm": "kworker/0:1"}
    await done(client, "PUT", f"{map_}/entries/{by_json(key)}", {"value": "00" * VALUE_SIZE})
    assert (await client.get(f"{map_}/entries/{by_json(key)}"))["decoded"]["key"] == key


async def test_put_many(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client)
    items: list[Any] = [
        {"key": each.to_bytes(20, "little").hex(), "value": f"{each:02x}" * VALUE_SIZE}
        for each in range(100)
    ]
    items.append({"key": "json:" + json.dumps(KEY), "decoded": {"u8": 7}})
    answer = await client.request("PUT", f"{map_}/entries", {"items": items})
    assert (answer.status, answer.json) == (200, {"written": 101})
    assert len(kernel.entries) == 101
    shown = await client.get(f"{map_}/entries/{by_json(KEY)}")
    assert shown["decoded"]["value"]["u8"] == 7


async def test_put_many_tells_how_many_were_done(client: Client, kernel: FakeKernel) -> None:
    map_ = await a_map(client, max_entries={"counts": 3})
    zeros = "00" * VALUE_SIZE
    keys = [bytes([each] * 20) for each in range(5)]
    items = [{"key": each.hex(), "value": zeros} for each in keys]
    problem = await client.refused(
        "PUT", f"{map_}/entries", {"items": items}, status=413, kind="too-large"
    )
    assert (problem["done"], problem["errno"]) == (3, "E2BIG")
    assert "max_entries" in problem["detail"]
    assert list(kernel.entries) == keys[:3]
    body = {"items": items[2:3] + items[4:], "mode": "replace"}
    problem = await client.refused("PUT", f"{map_}/entries", body, status=404, kind="not-found")
    assert problem["done"] == 1


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["items"]),
        ({"items": []}, ["items"]),
        ({"items": [{}]}, ["items", 0, "key"]),
        ({"items": [{"key": "00"}]}, ["items", 0, "key"]),
        ({"items": [{"key": "00" * 20}]}, ["items", 0, "value"]),
        ({"items": [{"key": "00" * 20, "decoded": 1}]}, ["items", 0, "decoded"]),
        ({"items": [{"key": "00" * 20, "value": "00"}]}, ["items", 0, "value"]),
        ({"items": [{"key": 1, "value": "00"}]}, ["items", 0, "key"]),
        ({"items": {}}, ["items"]),
        ({"items": [{"key": "00", "value": "00"}] * 4097}, ["items"]),
    ],
)
async def test_many_that_cannot_be_put(
    client: Client, kernel: FakeKernel, body: dict[str, Any], loc: list[Any]
) -> None:
    path = f"{await a_map(client)}/entries"
    problem = await client.refused("PUT", path, body, status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == loc
    assert kernel.entries == {}


# Deleting


async def test_delete(client: Client, kernel: FakeKernel) -> None:
    kernel.entries = {bytes([each] * 20): [bytes(VALUE_SIZE)] for each in range(10)}
    map_ = await a_map(client)
    one = f"{map_}/entries/{'01' * 20}"
    await client.delete(one)
    await client.refused("DELETE", one, status=404, kind="not-found")
    keys = ["02" * 20, "ff" * 20, "03" * 20, "json:" + json.dumps(KEY)]
    answer = await client.request("DELETE", f"{map_}/entries", {"keys": keys})
    assert (answer.status, answer.json) == (200, {"deleted": 2, "missing": 2})
    assert len(kernel.entries) == 7
    answer = await client.request("DELETE", f"{map_}/entries", {"keys": []})
    assert answer.json == {"deleted": 0, "missing": 0}
    answer = await client.request("DELETE", f"{map_}/entries?all=true")
    assert answer.json == {"deleted": 7, "missing": 0}
    assert kernel.entries == {}


async def test_nothing_is_deleted_by_mistake(client: Client, kernel: FakeKernel) -> None:
    kernel.entries = {KEY_BYTES: [bytes(VALUE_SIZE)]}
    path = f"{await a_map(client)}/entries"
    for query, body in (("", None), ("", {}), ("?all=false", None), ("?all=true", {"keys": []})):
        await client.refused("DELETE", path + query, body, status=422, kind="invalid")
    await client.refused("DELETE", f"{path}?all=yesno", status=422, kind="invalid")
    await client.refused("DELETE", path, {"keys": ["00" * 20] * 4097}, status=422, kind="invalid")
    assert len(kernel.entries) == 1


async def test_entries_of_arrays_stay(client: Client, kernel: FakeKernel) -> None:
    kernel.map_type = ("array", 2)
    path = f"{await a_map(client)}/entries"
    for where, body in ((f"{path}/{KEY_BYTES.hex()}", None), (path, {"keys": ["00" * 20]})):
        problem = await client.refused("DELETE", where, body, status=501, kind="not-supported")
        assert "zeros" in problem["detail"]
    await client.refused("DELETE", f"{path}?all=true", status=501, kind="not-supported")


# Queues and stacks


@pytest.mark.parametrize(("type_", "order"), [(("queue", 22), [1, 2]), (("stack", 23), [2, 1])])
async def test_queues(
    client: Client, kernel: FakeKernel, type_: tuple[str, int], order: list[int]
) -> None:
    kernel.map_type = type_
    kernel.map_types, kernel.map_sizes = (0, type_id("pair")), (0, 16)
    map_ = await a_map(client, max_entries={"counts": 2})
    await client.refused("GET", f"{map_}/peek", status=404, kind="not-found")
    await client.refused("POST", f"{map_}/pop", status=404, kind="not-found")
    await done(client, "POST", f"{map_}/push", {"decoded": {"left": 1}})
    await done(client, "POST", f"{map_}/push", {"value": "02" + "00" * 15})
    problem = await client.refused(
        "POST", f"{map_}/push", {"decoded": {}}, status=413, kind="too-large"
    )
    assert "full" in problem["detail"]
    value = {"value": f"{order[0]:02x}" + "00" * 15, "decoded": {"left": order[0], "right": "0"}}
    assert await client.get(f"{map_}/peek") == value
    assert await client.get(f"{map_}/peek?decode=false") == {"value": value["value"]}
    taken = [(await client.request("POST", f"{map_}/pop")).json for _ in order]
    assert taken[0] == value
    assert [each["decoded"]["left"] for each in taken] == order
    for each in (1, 2, 3):
        await done(client, "POST", f"{map_}/push", {"decoded": {"left": each}, "overwrite": True})
    assert [each[0] for each in kernel.queue] == [2, 3]
    for body in ({"value": "00"}, {"decoded": {"x": 1}}, {}, {"value": ["00" * 16]}):
        await client.refused("POST", f"{map_}/push", body, status=422, kind="invalid")
    problem = await client.refused("GET", f"{map_}/entries", status=501, kind="not-supported")
    assert "/pop" in problem["detail"]


async def test_hashes_are_no_queues(client: Client) -> None:
    map_ = await a_map(client)
    value = {"value": "00" * VALUE_SIZE}
    for method, path, body in (
        ("POST", "push", value),
        ("POST", "pop", None),
        ("GET", "peek", None),
    ):
        await client.refused(method, f"{map_}/{path}", body, status=501, kind="not-supported")


@pytest.mark.parametrize(
    ("type_", "words"),
    [
        (("ringbuf", 27), "/records"),
        (("perf_event_array", 4), "/records"),
        (("prog_array", 3), "/fd"),
        (("arena", 33), "/fd"),
    ],
)
async def test_maps_that_cannot_be_read_so(
    client: Client, kernel: FakeKernel, type_: tuple[str, int], words: str
) -> None:
    kernel.map_type = type_
    map_ = await a_map(client)
    key = KEY_BYTES.hex()
    value = {"value": "00" * VALUE_SIZE}
    for method, path, body in (
        ("GET", "entries", None),
        ("GET", f"entries/{key}", None),
        ("PUT", f"entries/{key}", value),
        ("PUT", "entries", {"items": [{"key": key, **value}]}),
        ("DELETE", f"entries/{key}", None),
        ("DELETE", "entries?all=true", None),
        ("GET", "dump", None),
    ):
        problem = await client.refused(
            method, f"{map_}/{path}", body, status=501, kind="not-supported"
        )
        assert words in problem["detail"]
