"""Leases: what programs and links can live as long as, without a process that must stay."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest

from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.house import Clock, a_lease, on
from tests.http.samples import (
    a_link,
    a_program,
    elf,
    instructions,
    link,
)
from tests.http.serving import Client, Served

Actors = Callable[..., Awaitable[Actor]]
Serve = Callable[..., Awaitable[Served]]

LONGEST = 30 * 86400

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


@pytest.fixture
async def served(serve: Serve, kernel: FakeKernel, clock: Clock) -> Served:
    return await serve(kernel, clock=clock)


def left(lease: Any) -> float:
    """Seconds from now on until it expires."""
    return datetime.fromisoformat(lease["expires_at"]).timestamp() - time.time()


async def renew(client: Client, id_: str, body: object = None, data: bytes | None = None) -> Any:
    answer = await client.request("PUT", f"/leases/{id_}", body, data=data)
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.every_loop
async def test_making_one(client: Client) -> None:
    answer = await client.request("POST", "/leases", {"ttl": 60, "labels": {"job": "7"}})
    assert answer.status == 201
    made = answer.json
    assert answer.headers["Location"] == f"/leases/{made['id']}"
    assert made["id"].startswith("lse-")
    assert made["owner"]["uid"] == os.getuid()
    assert (made["links"], made["programs"], made["labels"]) == (0, 0, {"job": "7"})
    assert 59 < left(made) <= 60.1
    found = await client.get(answer.headers["Location"])
    assert abs(left(found) - left(made)) < 1
    assert found == made | {"expires_at": found["expires_at"]}
    (me,) = (await client.get("/clients"))["items"]
    assert (me["id"], me["leases"]) == (made["client"], 1)


@pytest.mark.parametrize("ttl", ["60", "0.5", "60.0", "1e3", str(LONGEST), "1e-9"])
async def test_the_time_comes_back_as_it_was_given(client: Client, ttl: str) -> None:
    answer = await client.request("POST", "/leases", data=f'{{"ttl": {ttl}}}'.encode())
    assert answer.status == 201, answer.body
    given, told = json.loads(ttl), answer.json["ttl"]
    assert (type(told), told) == (type(given), given)


BAD = ["0", "0.0", "-1", "-0.5", f"{LONGEST + 1}", f"{LONGEST}.001", "1e999", '"60"', "true"]
BAD += ["false", "[60]", "{}", '""', "1" + "0" * 400]


@pytest.mark.parametrize("ttl", [*BAD, "null"])
async def test_times_that_are_none(client: Client, ttl: str) -> None:
    await client.refused(
        "POST", "/leases", data=f'{{"ttl": {ttl}}}'.encode(), status=422, kind="invalid"
    )
    assert (await client.get("/leases"))["items"] == []


@pytest.mark.parametrize("ttl", BAD)
async def test_renewing_for_a_time_that_is_none(client: Client, ttl: str) -> None:
    made = await client.post("/leases", {"ttl": 60})
    data = f'{{"ttl": {ttl}}}'.encode()
    path = f"/leases/{made['id']}"
    await client.refused("PUT", path, data=data, status=422, kind="invalid")
    assert (await client.get(path))["ttl"] == 60


async def test_what_is_wrong_with_a_body_is_told(client: Client) -> None:
    path = f"/leases/{await a_lease(client)}"
    for method, where in (("POST", "/leases"), ("PUT", path)):
        for data in (b'{"ttl": NaN}', b'{"ttl": Infinity}', b"{", b"ttl"):
            await client.refused(method, where, data=data, status=400, kind="malformed")
        bodies: list[Any] = [[], "60", 60, {"ttl": 60, "lease": "x"}, {"ttl": 60, "links": 0}]
        for body in bodies:
            await client.refused(method, where, body, status=422, kind="invalid")
        await client.refused(f"{method}", f"{where}?x=1", {"ttl": 1}, status=422, kind="invalid")
    await client.refused("POST", "/leases", {}, status=422, kind="invalid")
    await client.refused("POST", "/leases", data=b"", status=400, kind="malformed")
    told = await client.refused("POST", "/leases", {"ttl": True}, status=422, kind="invalid")
    assert {each["loc"][0] for each in told["errors"]} == {"ttl"}
    # Labels are not renewed.
    await client.refused("PUT", path, {"labels": {}}, status=422, kind="invalid")
    for method, where in (("GET", "/leases"), ("GET", path), ("DELETE", path)):
        await client.refused(method, f"{where}?force=true", status=422, kind="invalid")
    await client.get(path)


async def test_renewing(client: Client, clock: Clock) -> None:
    made = await client.post("/leases", {"ttl": 60})
    clock.now += 50
    assert 9 < left(await client.get(f"/leases/{made['id']}")) < 11
    assert 59 < left(await renew(client, made["id"])) < 61
    clock.now += 50
    assert 59 < left(await renew(client, made["id"], {})) < 61
    clock.now += 50
    assert 59 < left(await renew(client, made["id"], data=b'{"ttl": null}')) < 61
    clock.now += 50
    shorter = await renew(client, made["id"], {"ttl": 2.5})
    assert shorter["ttl"] == 2.5
    assert 1.5 < left(shorter) < 3.5
    # It stays with that time.
    clock.now += 2
    assert 1.5 < left(await renew(client, made["id"])) < 3.5
    assert (await client.get("/leases"))["items"][0]["ttl"] == 2.5
    clock.now += 2.5
    await client.refused("PUT", f"/leases/{made['id']}", status=410, kind="gone")


async def test_pages_of_leases(client: Client) -> None:
    ids = [await a_lease(client) for _ in range(5)]
    page = await client.get("/leases?limit=2")
    assert [each["id"] for each in page["items"]] == ids[:2]
    await client.delete(f"/leases/{ids[1]}")
    page = await client.get(f"/leases?limit=2&after={page['next']}")
    assert [each["id"] for each in page["items"]] == ids[2:4]
    page = await client.get(f"/leases?limit=2&after={page['next']}")
    assert ([each["id"] for each in page["items"]], page["next"]) == (ids[4:], None)
    for query in ("limit=0", "limit=1001", "after=x", "lease=x"):
        await client.refused("GET", f"/leases?{query}", status=422, kind="invalid")


@pytest.mark.parametrize("id_", ["lse-", "lse-0", "%00", "x"])
async def test_leases_that_never_were(client: Client, id_: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        await client.refused(method, f"/leases/{id_}", status=404, kind="not-found")
    program = await a_program(client)
    life = {"lifetime": on(id_)}
    await client.refused("POST", "/links", link(program, **life), status=404, kind="not-found")
    await client.refused("POST", "/programs", elf(**life), status=404, kind="not-found")


@root
async def test_another_users_lease_is_not_found(
    client: Client, kernel: FakeKernel, actor: Actors
) -> None:
    lease, ended = await a_lease(client), await a_lease(client)
    mine = await a_link(client, lifetime=on(lease))
    await client.delete(f"/leases/{ended}")
    nobody = await actor(NOBODY)
    program = await a_program(nobody)
    for id_ in (lease, ended):
        for method in ("GET", "PUT", "DELETE"):
            answer = await nobody.request(method, f"/leases/{id_}")
            assert (answer.status, answer.kind) == (404, "not-found"), (method, answer.body)
        for path, body in (
            ("/links", link(program, lifetime=on(id_))),
            ("/programs", instructions(lifetime=on(id_))),
        ):
            answer = await nobody.request("POST", path, body)
            assert (answer.status, answer.kind) == (404, "not-found"), (path, answer.body)
    assert (await nobody.get("/leases"))["items"] == []
    assert (await nobody.get(f"/links?lease={lease}"))["items"] == []
    # The administrator sees his, and may bind to it and end it.
    his = await a_lease(nobody)
    assert [each["id"] for each in (await client.get("/leases"))["items"]] == [lease, his]
    assert (await client.get(f"/leases/{his}"))["owner"] == {"uid": NOBODY, "user": "nobody"}
    bound = await a_link(client, lifetime=on(his))
    assert (await renew(client, his))["links"] == 1
    await client.delete(f"/leases/{his}")
    assert (await nobody.request("GET", f"/leases/{his}")).kind == "gone"
    await client.refused("GET", f"/links/{bound}", status=404, kind="not-found")
    assert [each["id"] for each in (await client.get("/links"))["items"]] == [mine]


async def test_no_lease_is_made_while_the_daemon_stops(served: Served, client: Client) -> None:
    served.state.stopping = True
    await client.refused("POST", "/leases", {"ttl": 1}, status=503, kind="shutting-down")
    served.state.stopping = False
