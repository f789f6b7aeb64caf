"""Whose maps may be read and written, and what is put on record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from kpmd.core.policy import Policy
from tests.fakes.kernel import FakeKernel
from tests.fakes.policies import EVERYTHING
from tests.http.actor import NOBODY, Actor
from tests.http.map_samples import (
    KEY_BYTES,
    VALUE_SIZE,
    a_map,
    structs,
)
from tests.http.samples import Gate, elf
from tests.http.serving import Client


@pytest.fixture
def kernel() -> FakeKernel:
    return structs()


async def test_of_others(
    client: Client, kernel: FakeKernel, actor: Callable[..., Awaitable[Actor]]
) -> None:
    kernel.entries = {KEY_BYTES: [bytes(VALUE_SIZE)]}
    map_ = await a_map(client)
    path = f"{map_}/entries/{KEY_BYTES.hex()}"
    stranger = await actor(4001)
    for method, where, body in (
        ("GET", path, None),
        ("PUT", path, {"value": "00" * VALUE_SIZE}),
        ("DELETE", path, None),
        ("GET", f"{map_}/entries", None),
        ("DELETE", f"{map_}/entries?all=true", None),
        ("GET", f"{map_}/dump", None),
        ("POST", f"{map_}/pop", None),
    ):
        answer = await stranger.request(method, where, body)
        assert (answer.status, answer.kind) == (404, "not-found")
    assert len(kernel.entries) == 1


async def test_who_may_read_what_is_others_s(
    serve: Any, kernel: FakeKernel, actor: Callable[..., Awaitable[Actor]]
) -> None:
    kernel.entries = {KEY_BYTES: [bytes(VALUE_SIZE)]}
    readers = replace(
        EVERYTHING, name="readers", everyone=False, users=frozenset({NOBODY}), reads_others=True
    )
    served = await serve(kernel, policy=Policy((readers, EVERYTHING)))
    owner, reader = await actor(NOBODY - 1, served.path), await actor(NOBODY, served.path)
    made = await owner.post("/programs", elf())
    map_, program = f"/maps/{made['maps'][0]['id']}", made["programs"][0]["id"]
    one = f"{map_}/entries/{KEY_BYTES.hex()}"
    value = {"value": "00" * VALUE_SIZE}
    for path in (f"{map_}/entries", one, f"/programs/{program}/globals"):
        await reader.get(path)
    for method, path, body in (
        ("PUT", one, value),
        ("PUT", f"{map_}/entries", {"items": [{"key": KEY_BYTES.hex(), **value}]}),
        ("DELETE", one, None),
        ("DELETE", f"{map_}/entries?all=true", None),
        ("DELETE", f"{map_}/entries", {"keys": []}),
        ("POST", f"{map_}/push", value),
        ("POST", f"{map_}/pop", None),
        ("PUT", f"/programs/{program}/globals/any", {"decoded": 1}),
    ):
        answer = await reader.request(method, path, body)
        assert (answer.status, answer.kind) == (403, "forbidden"), path
    assert len(kernel.entries) == 1
    assert (await owner.request("DELETE", one)).status == 204


async def test_without_the_right(
    serve: Any, kernel: FakeKernel, actor: Callable[..., Awaitable[Actor]]
) -> None:
    without = replace(EVERYTHING, rights=EVERYTHING.rights - {"maps"})
    served = await serve(kernel, policy=Policy((without,)))
    user = await actor(NOBODY, served.path)
    made = await user.post("/programs", elf())
    map_, program = f"/maps/{made['maps'][0]['id']}", made["programs"][0]["id"]
    for method, path in (
        ("GET", f"{map_}/entries"),
        ("GET", f"{map_}/entries/00"),
        ("GET", f"{map_}/dump"),
        ("DELETE", f"{map_}/entries?all=true"),
        ("POST", f"{map_}/pop"),
        ("GET", f"{map_}/peek"),
        ("GET", f"/programs/{program}/globals"),
        ("GET", f"/programs/{program}/globals/any"),
    ):
        answer = await user.request(method, path)
        assert (answer.status, answer.kind) == (403, "forbidden"), path


@pytest.mark.parametrize(
    ("name", "method", "path", "body"),
    [
        ("update", "PUT", f"/entries/{KEY_BYTES.hex()}", {"value": "00" * VALUE_SIZE}),
        (
            "update",
            "PUT",
            "/entries",
            {"items": [{"key": KEY_BYTES.hex(), "value": "00" * VALUE_SIZE}]},
        ),
        ("delete", "DELETE", f"/entries/{KEY_BYTES.hex()}", None),
        ("page", "DELETE", "/entries?all=true", None),
        ("page", "GET", "/dump", None),
    ],
)
async def test_a_map_that_ends_while_it_is_used(
    client: Client, kernel: FakeKernel, name: str, method: str, path: str, body: Any
) -> None:
    made = await client.post("/programs", elf())
    gate = kernel.hooks[name] = Gate()
    asked = asyncio.create_task(
        client.request(method, f"/maps/{made['maps'][0]['id']}{path}", body)
    )
    await asyncio.to_thread(gate.entered.wait, 10)
    for program in made["programs"]:
        await client.delete(f"/programs/{program['id']}")
    gate.open()
    answer = await asked
    assert (answer.status, answer.kind) == (404, "not-found")


async def test_what_is_put_on_record(served: Any, client: Client, kernel: FakeKernel) -> None:
    kernel.entries = {bytes([each] * 20): [bytes(VALUE_SIZE)] for each in range(3)}
    map_ = await a_map(client)
    items = [{"key": "00" * 20, "value": "5e" * VALUE_SIZE}]
    await client.request("PUT", f"{map_}/entries", {"items": items})
    await client.request("DELETE", f"{map_}/entries?all=true")
    written, deleted = served.audit[-2:]
    assert (written.what["entries"], deleted.what["entries"]) == (1, 3)
    assert "5e5e" not in repr(written)
