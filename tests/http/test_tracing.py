"""Traces of requests: what gets to a collector, and what never does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.api.tracing import Traces
from kpmd.config import Tracing
from kpmd.errors import VerifierRejected
from kpmd.runtime.executor import Lane
from tests.fakes.collector import Collector, Span
from tests.fakes.kernel import FakeKernel
from tests.http.actor import NOBODY, Actor
from tests.http.conftest import Serve
from tests.http.samples import Gate, a_link, a_program, instructions, link
from tests.http.serving import Client, Served, raw, read_answer, until
from tests.http.streaming import listening

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """A daemon whose requests are traced, and the collector that hears of it."""

    def __init__(
        self, served: Served, client: Client, traces: Traces, collector: Collector
    ) -> None:
        self.served = served
        self.client = client
        self.traces = traces
        self.collector = collector

    async def spans(self) -> Collector:
        """What was told, all of it: tracing ends with this."""
        await self.traces.close(10)
        return self.collector

    async def one(self, name: str) -> Span:
        """The only span of that name."""
        (span,) = (await self.spans()).named(name)
        return span


Start = Callable[..., Awaitable[Traced]]


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with Collector() as made:
        yield made


@pytest.fixture
async def start(serve: Serve, kernel: FakeKernel, collector: Collector) -> AsyncIterator[Start]:
    """Makes a daemon that is configured so."""
    async with AsyncExitStack() as stack:

        async def make(**fields: Any) -> Traced:
            fields.setdefault("endpoint", collector.url)
            traces = Traces(Tracing.model_validate(fields))
            stack.push_async_callback(traces.close, 0.1)
            served = await serve(kernel, traces=traces)
            client = await stack.enter_async_context(Client(served.path))
            return Traced(served, client, traces, collector)

        yield make


def phases(collector: Collector, span: Span) -> list[str]:
    """What is told to have taken time in it; on a busy machine it may have waited for it too."""
    return [each.name for each in collector.inside(span) if each.name != "wait"]


async def test_a_link_and_its_phases(start: Start) -> None:
    traced = await start()
    before = time.time_ns()
    await a_link(traced.client)
    spans = await traced.spans()
    (made,) = spans.named("POST /links")
    assert (made.kind, made.parent, made.failed) == (2, "", False)  # 2: of a server
    assert before < made.begun < made.ended < time.time_ns()
    request_id = made.attributes.pop("kpmd.request.id")
    assert made.attributes == {
        "http.request.method": "POST",
        "http.route": "/links",
        "http.response.status_code": 201,
        "network.transport": "unix",
        "kpmd.peer.uid": 0,
    }
    assert phases(spans, made) == ["body", "resolve", "attach"]
    for each in spans.inside(made):
        assert each.trace == made.trace
        assert made.begun <= each.begun <= each.ended <= made.ended
    (loaded,) = spans.named("POST /programs")
    assert loaded.attributes["kpmd.request.id"] != request_id
    assert phases(spans, loaded) == ["body", "policy", "load"]
    assert loaded.trace != made.trace


async def test_a_detach_is_of_the_request_that_waits_for_it(
    start: Start, kernel: FakeKernel
) -> None:
    traced = await start()
    first, second = await a_link(traced.client), await a_link(traced.client)
    gate = kernel.hooks["close_link"] = Gate()
    async with Client(traced.served.path) as other:
        one = asyncio.create_task(traced.client.delete(f"/links/{first}"))
        await asyncio.to_thread(gate.entered.wait, 10)
        two = asyncio.create_task(other.delete(f"/links/{second}"))
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(one, two)
    spans = await traced.spans()
    deletes = spans.named("DELETE /links/{id}")
    assert len(deletes) == 2
    for each in deletes:
        assert phases(spans, each) == ["detach"]


async def test_work_that_waits_for_a_thread(start: Start, kernel: FakeKernel) -> None:
    traced = await start()
    program = await a_program(traced.client)
    gate = kernel.hooks["create_link"] = Gate()
    async with AsyncExitStack() as stack:
        attaching = []
        for _ in range(5):  # one user has half of the lane's eight threads
            client = await stack.enter_async_context(Client(traced.served.path))
            attaching.append(asyncio.create_task(client.post("/links", link(program))))
        await asyncio.to_thread(gate.entered.wait, 10)
        await until(lambda: traced.served.state.executor.use()[Lane.ATTACH].waiting)
        await asyncio.sleep(0.002)  # less is not told
        gate.open()
        await asyncio.gather(*attaching)
    lane = {"kpmd.pool.lane": "attach"}  # on a busy machine it may have waited for others as well
    waited, *_ = (each for each in (await traced.spans()).named("wait") if each.attributes == lane)
    (made,) = (each for each in traced.collector.spans if each.id == waited.parent)
    assert made.name == "POST /links"
    assert made.begun <= waited.begun <= waited.ended <= made.ended


async def test_errors_by_their_kind(start: Start, kernel: FakeKernel) -> None:
    traced = await start()
    client = traced.client
    kernel.fail["load_instructions"] = VerifierRejected("no: secret", "", truncated=False)
    await client.refused("POST", "/programs", instructions(), status=422, kind="verifier-rejected")
    kernel.fail["create_link"] = ZeroDivisionError("secret")
    program = await a_program(client)
    await client.refused("POST", "/links", link(program), status=500, kind="internal")
    await client.refused("GET", "/links/lnk-secret", status=404, kind="not-found")
    await client.refused("GET", "/secret", status=404, kind="not-found")
    spans = await traced.spans()
    refused, _ = spans.named("POST /programs")
    assert refused.attributes["error.type"] == "verifier-rejected"
    assert not refused.failed  # what a client did wrong is no fault of the server
    (load,) = (each for each in spans.inside(refused) if each.name == "load")
    assert (load.failed, load.attributes["error.type"]) == (True, "verifier-rejected")
    (bug,) = spans.named("POST /links")
    assert (bug.failed, bug.attributes["error.type"]) == (True, "internal")
    (attach,) = (each for each in spans.inside(bug) if each.name == "attach")
    assert attach.attributes["error.type"] == "ZeroDivisionError"
    (gone,) = spans.named("GET /links/{id}")
    assert gone.attributes["http.response.status_code"] == 404
    (nowhere,) = spans.named("GET")
    assert "http.route" not in nowhere.attributes
    for each in spans.spans:
        assert b"secret" not in each.raw


async def test_methods_that_nobody_knows_are_one(start: Start) -> None:
    traced = await start()
    for method in ("PROPFIND", "SUBSCRIBE"):
        await raw(traced.served.path, f"{method} /links HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    spans = (await traced.spans()).named("HTTP")
    assert [each.attributes["http.request.method"] for each in spans] == ["_OTHER", "_OTHER"]


async def test_nothing_that_a_client_sends_is_told(start: Start) -> None:
    traced = await start(parent="honour")
    body = {**link(await a_program(traced.client)), "labels": {"topsecret": "topsecret"}}
    headers = {
        "traceparent": f"00-{TRACE}-{PARENT}-01",
        "tracestate": "topsecret=topsecret",
        "baggage": "topsecret=1",
        "User-Agent": "topsecret",
        "Content-Type": "application/json",
    }
    data = json.dumps(body).encode()
    answer = await traced.client.request("POST", "/links?", data=data, headers=headers)
    assert answer.status == 201
    await traced.client.request("GET", "/symbols?match=topsecret*")
    spans = (await traced.spans()).spans
    assert {each.trace for each in spans} >= {TRACE}
    for each in spans:
        assert b"topsecret" not in each.raw
        assert b"vfs_read" not in each.raw


async def test_a_stream_is_told_of_when_it_begins(start: Start) -> None:
    traced = await start()
    async with listening(traced.served.path):
        span = await traced.one("GET /events")
    assert span.attributes["http.response.status_code"] == 200


async def test_requests_of_one_connection_are_apart(start: Start) -> None:
    traced = await start()
    one = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    await raw(traced.served.path, one * 3, answers=3)
    spans = (await traced.spans()).named("GET /version")
    assert len({each.trace for each in spans}) == 3


async def test_who_asked(start: Start, actor: Callable[..., Awaitable[Actor]]) -> None:
    traced = await start()
    nobody = await actor(NOBODY, traced.served.path)
    await nobody.get("/version")
    span = await traced.one("GET /version")
    assert span.attributes["kpmd.peer.uid"] == NOBODY


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.5, 20, 80), (1.0, 100, 100)])
async def test_so_many_are_traced(start: Start, ratio: float, least: int, most: int) -> None:
    traced = await start(sample_ratio=ratio)
    for _ in range(100):
        await traced.client.get("/healthz")
    assert least <= len((await traced.spans()).spans) <= most


async def test_a_clients_trace_goes_on_where_that_is_configured(start: Start) -> None:
    traced = await start(parent="honour")
    for flags in ("01", "00"):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
        await traced.client.request("GET", "/version", headers=headers)
    span = await traced.one("GET /version")  # the other one's client does not want it
    assert (span.trace, span.parent) == (TRACE, PARENT)
    assert span.attributes["network.transport"] == "unix"


async def test_else_it_does_not(start: Start) -> None:
    traced = await start()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    await traced.client.request("GET", "/version", headers=headers)
    span = await traced.one("GET /version")
    assert (span.trace == TRACE, span.parent) == (False, "")


async def test_no_client_is_traced_more_often_than_others(start: Start) -> None:
    """The id of this one is among those that the SDK traces at any ratio above zero."""
    traced = await start(parent="honour", sample_ratio=0.05)
    headers = {"traceparent": f"00-{'1'.rjust(32, '0')}-{PARENT}-01"}
    for _ in range(200):
        await traced.client.request("GET", "/version", headers=headers)
    assert len((await traced.spans()).spans) < 40


_HEX = st.text("0123456789abcdefABCDEFxyz-", max_size=40)
_HOSTILE = st.one_of(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")),
    st.builds("{}-{}-{}-{}{}".format, _HEX, _HEX, _HEX, _HEX, _HEX),
    st.builds(
        "{}-{}-{}-{}".format,
        st.sampled_from(["00", "01", "ff", "cc"]),
        st.sampled_from([TRACE, "0" * 32, TRACE.upper()]),
        st.sampled_from([PARENT, "0" * 16, "g" * 16]),
        st.sampled_from(["00", "01", "ff", "0", "1 "]),
    ),
    st.just("00-" + "a" * 5000),
)


async def test_hostile_parents(start: Start) -> None:
    """Whatever it is, the request goes on, and what is told of it is whole."""
    traced = await start(parent="honour")
    loop = asyncio.get_running_loop()
    values: list[str] = []

    @given(st.lists(_HOSTILE, min_size=1, max_size=3))
    @settings(max_examples=200, database=None, deadline=None, derandomize=True)
    def collect(given_: list[str]) -> None:
        values.append("\0".join(given_))

    await loop.run_in_executor(None, collect)
    reader, writer = await asyncio.open_unix_connection(str(traced.served.path))
    served = 0
    for value in values:
        lines = b"".join(
            b"traceparent: " + each.encode("latin-1") + b"\r\n" for each in value.split("\0")
        )
        writer.write(b"GET /version HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
        status = (await read_answer(reader)).status
        assert status == 200, lines
        served += 1
    writer.close()
    spans = (await traced.spans()).named("GET /version")
    assert 0 < len(spans) <= served
    for span in spans:
        assert (span.trace == TRACE) == (span.parent == PARENT)
        assert span.parent in ("", PARENT)


async def test_where_they_go_and_of_what_they_are(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer 123")
    traced = await start(service_name="tracer", resource={"deployment.environment.name": "test"})
    await traced.client.get("/version")
    await traced.spans()
    assert (collector.path, collector.headers["Authorization"]) == ("/v1/traces", "Bearer 123")
    assert collector.resource["service.name"] == "tracer"
    assert collector.resource["deployment.environment.name"] == "test"
    assert collector.resource["host.name"]


@pytest.mark.parametrize("trouble", ["hangs", "500", "503", "closed"])
async def test_an_endpoint_in_trouble_holds_up_nobody(
    start: Start, collector: Collector, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With a queue for four: what does not fit in is lost, counted and told."""
    endpoint, threads = collector.url, set(threading.enumerate())
    if trouble == "closed":
        await collector.__aexit__(None, None, None)
    elif trouble == "hangs":
        collector.hangs = True
    else:
        collector.status = int(trouble)
    traced = await start(endpoint=endpoint, queue_spans=4, timeout_seconds=5)
    began = time.monotonic()
    for _ in range(50):
        await traced.client.get("/version")
    await traced.traces.close(0.2)
    await traced.served.stop()
    assert time.monotonic() - began < 2
    told = [vars(each)["fields"] for each in caplog.records if each.message == "spans lost"]
    assert 1 <= len(told) <= 3  # once at the first, once at the end, and not for each
    assert traced.traces.lost == 50 == told[-1]["total"] == sum(each["number"] for each in told)
    assert sum(each.message == "OpenTelemetry" for each in caplog.records) <= 1
    if trouble != "closed":
        await collector.__aexit__(None, None, None)
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("Otel"):  # it still has a connection
            await asyncio.to_thread(thread.join, 10)
