"""Calls about the daemon itself: capabilities, health, version, contract."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from kpmd import API_VERSION, __version__
from kpmd.api.daemon import EXTENSIONS
from kpmd.bpf.features import Answer as FeatureAnswer
from tests.fakes.kernel import FakeKernel
from tests.http.contract import contract
from tests.http.samples import Gate, a_link, a_program, link
from tests.http.serving import Client, Served, until

Serve = Callable[..., Awaitable[Served]]


@pytest.mark.every_loop
async def test_capabilities(client: Client, kernel: FakeKernel) -> None:
    found = await client.get("/capabilities")
    assert found["kernel"] == {"release": "6.12.0-fake", "machine": "x86_64"}
    assert set(found["features"]) >= {"bpf_link_kprobe_multi", "bpf_link_kprobe_session"}
    multi = found["features"]["bpf_link_kprobe_multi"]
    assert (multi["supported"], multi["min_kernel"], multi["reason"]) == (True, "5.18", None)
    assert found["features"]["bpf_link_kprobe_session"]["min_kernel"] == "6.10"
    assert found["api"] == {"version": API_VERSION, "extensions": list(EXTENSIONS)}
    assert found["builtins"] == ["count", "latency", "stacks", "trace"]
    assert found["limits"] == {
        "body_bytes": 32 << 20,
        "object_bytes": 16 << 20,
        "targets_per_link": 1 << 20,
        "page": 1000,
        "lease_seconds": 30 * 86400,
        "load_seconds": 10.0,
        **dict.fromkeys(("programs", "links", "targets", "map_bytes", "leases"), None),
        **dict.fromkeys(("streams", "requests", "connections"), None),
    }


async def test_feature_tests_run_once(client: Client, kernel: FakeKernel) -> None:
    answers = [await client.request("GET", "/capabilities") for _ in range(3)]
    assert len({answer.body for answer in answers}) == 1
    assert kernel.calls.count("test_feature") == len(kernel.features)
    await a_link(client)
    assert kernel.calls.count("test_feature") == len(kernel.features)


async def test_feature_tests_run_once_for_all_who_ask_at_once(
    client: Client, kernel: FakeKernel
) -> None:
    gate = kernel.hooks["test_feature"] = Gate()
    asked = [asyncio.create_task(client.get("/capabilities")) for _ in range(5)]
    asked.append(asyncio.create_task(a_link(client)))
    await asyncio.to_thread(gate.entered.wait, 10)
    gate.open()
    await asyncio.gather(*asked)
    assert kernel.calls.count("test_feature") == len(kernel.features)


async def test_the_cached_answer_asks_nothing_of_the_kernel(
    client: Client, kernel: FakeKernel
) -> None:
    await client.get("/capabilities")
    before = list(kernel.calls)
    await client.get("/capabilities")
    assert kernel.calls == before


async def test_no_is_kept_as_well(client: Client, kernel: FakeKernel) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(False, "no CONFIG_FPROBE")
    first = (await client.get("/capabilities"))["features"]["bpf_link_kprobe_multi"]
    assert (first["supported"], first["reason"]) == (False, "no CONFIG_FPROBE")
    kernel.answers.clear()
    assert (await client.get("/capabilities"))["features"]["bpf_link_kprobe_multi"] == first


async def test_what_was_inconclusive_is_tried_again(client: Client, kernel: FakeKernel) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(None, "EPERM")
    every = len(kernel.features)
    for tries in (every, every + 1, every + 2):
        found = (await client.get("/capabilities"))["features"]
        assert found["bpf_link_kprobe_multi"]["supported"] is None
        assert found["bpf_link_kprobe_multi"]["reason"] == "EPERM"
        assert found["bpf_link_kprobe_session"]["supported"] is True
        # Only the one that told nothing is tried again.
        assert kernel.calls.count("test_feature") == tries
    kernel.answers.clear()
    for _ in range(2):
        found = (await client.get("/capabilities"))["features"]
        assert found["bpf_link_kprobe_multi"]["supported"] is True
        assert found["bpf_link_kprobe_multi"]["reason"] is None
        assert kernel.calls.count("test_feature") == every + 3


async def test_an_inconclusive_test_does_not_keep_a_link_from_being_tried(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(None, "EPERM")
    await a_link(client)
    assert len(kernel.attached) == 1


async def test_a_feature_test_that_breaks_is_tried_again(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.fail["test_feature"] = OSError(24, "too many open files")
    answer = await client.request("GET", "/capabilities")
    assert (answer.status, answer.kind) == (500, "internal")
    found = (await client.get("/capabilities"))["features"]
    assert all(each["supported"] for each in found.values())
    kernel.fail["test_feature"] = OSError(24, "too many open files")
    assert (await client.request("GET", "/capabilities?refresh=true")).status == 500
    assert (await client.get("/capabilities"))["features"]["bpf_link_kprobe_multi"]["supported"]


async def test_refresh_runs_all_again(client: Client, kernel: FakeKernel) -> None:
    first = (await client.get("/capabilities"))["features"]
    kernel.answers["bpf_link_kprobe_session"] = FeatureAnswer(False, "gone")
    again = (await client.get("/capabilities?refresh=true"))["features"]
    assert kernel.calls.count("test_feature") == 2 * len(kernel.features)
    assert again["bpf_link_kprobe_session"]["supported"] is False
    assert (
        again["bpf_link_kprobe_multi"]["checked_at"] > first["bpf_link_kprobe_multi"]["checked_at"]
    )
    assert (await client.get("/capabilities"))["features"] == again
    assert kernel.calls.count("test_feature") == 2 * len(kernel.features)


async def test_an_answer_found_by_a_link_is_shown(client: Client, kernel: FakeKernel) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(None, "EPERM")
    kernel.answers["bpf_link_kprobe_session"] = FeatureAnswer(True)
    await client.get("/capabilities")
    kernel.answers.clear()
    await a_link(client)
    assert (await client.get("/capabilities"))["features"]["bpf_link_kprobe_multi"]["supported"]


async def test_times_are_now_and_in_utc(client: Client) -> None:
    made = await client.get(f"/programs/{await a_program(client)}")
    told = datetime.fromisoformat(made["created_at"])
    assert abs(datetime.now(UTC) - told) < timedelta(minutes=1)


async def test_health_and_version(served: Served, client: Client) -> None:
    assert await client.get("/healthz") == {"status": "ok", "warnings": []}
    assert await client.get("/version") == {"version": __version__, "api": API_VERSION}
    served.state.stopping = True
    assert await client.get("/healthz") == {"status": "stopping", "warnings": []}


async def test_the_contract_itself(client: Client) -> None:
    assert await client.get("/openapi.json") == contract()


async def test_nothing_is_made_once_the_daemon_stops(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    made = await a_link(client, program)
    served.state.stopping = True
    body = {"source": {"kind": "builtin", "builtin": "count"}}
    await client.refused("POST", "/programs", body, status=503, kind="shutting-down")
    await client.refused("POST", "/links", link(program), status=503, kind="shutting-down")
    assert len(kernel.programs) == len(kernel.links) == 1
    # What is there can still be read and ended.
    await client.get(f"/links/{made}")
    await client.delete(f"/links/{made}")


async def test_stopping_ends_everything(serve: Serve, kernel: FakeKernel) -> None:
    served = await serve(kernel)
    async with Client(served.path) as client:
        program = await a_program(client, lifetime={"kind": "persistent"})
        await a_link(client, program, lifetime={"kind": "persistent"})
        await served.stop()
    assert not kernel.attached
    assert not kernel.loaded
    assert not kernel.started
    assert not served.path.exists()


async def test_stopping_lets_a_deletion_end(serve: Serve, kernel: FakeKernel) -> None:
    served = await serve(kernel)
    async with Client(served.path) as client:
        made = await a_link(client)
        gate = kernel.hooks["close_link"] = Gate()
        asked = asyncio.create_task(client.request("DELETE", f"/links/{made}"))
        await asyncio.to_thread(gate.entered.wait, 10)
        stopping = asyncio.create_task(served.stop())
        await until(lambda: served.state.stopping)
        gate.open()
        await stopping
        assert (await asked).status == 204
    assert not kernel.attached
