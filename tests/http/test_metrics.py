"""GET /metrics: each number moves when what it is about does, and no client adds a label."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from kpmd.api import metrics
from kpmd.api.metric_table import METRICS
from kpmd.bpf.features import Answer
from kpmd.core.policy import RIGHTS, USUAL, Functions, Policy
from kpmd.core.quotas import Limits
from kpmd.errors import BadObject, VerifierRejected
from kpmd.runtime import journal, missed
from kpmd.runtime import records as records_runtime
from kpmd.runtime.executor import Lane
from tests.fakes.kernel import FakeKernel, symbol_files
from tests.fakes.policies import EVERYTHING, OPEN
from tests.http.actor import NOBODY, Actor
from tests.http.conftest import Serve
from tests.http.house import House, a_lease
from tests.http.samples import Gate, a_link, a_program, elf, instructions, link
from tests.http.serving import Client, Served, raw, until
from tests.http.streaming import listening

Actors = Callable[..., Awaitable[Actor]]

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


@pytest.fixture(autouse=True)
def _never_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FRESH", 0.0)


class Numbers:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.families = {each.name: each for each in text_string_to_metric_families(text)}
        self._samples = [one for each in self.families.values() for one in each.samples]

    def get(self, name: str, **labels: str) -> float | None:
        """The one sample of that name with these labels, and maybe others; None: there is none."""
        found = [
            each.value
            for each in self._samples
            if each.name == name and labels.items() <= each.labels.items()
        ]
        assert len(found) <= 1, (name, labels)
        return found[0] if found else None

    def values(self, name: str, label: str) -> set[str]:
        return {each.labels[label] for each in self._samples if each.name == name}


async def scrape(client: Any) -> Numbers:
    answer = await client.request("GET", "/metrics")
    assert answer.status == 200, answer.body
    return Numbers(answer.body.decode())


async def test_everything_in_the_table_is_told(client: Client) -> None:
    await client.get("/healthz")
    numbers = await scrape(client)
    assert numbers.families.keys() >= {
        f"{each.name}_info" if each.kind == "info" else each.name
        for each in METRICS
        # What has not happened, and was not tested, has no labels to be told with.
        if each.name not in ("kpmd_events", "kpmd_feature_supported")
    }
    assert all(each.documentation for each in numbers.families.values())


async def test_requests_by_route_and_outcome(client: Client) -> None:
    for _ in range(3):
        await client.get("/version")
    await client.request("GET", "/links/lnk-1")
    await client.request("GET", "/links/lnk-2")
    await client.request("POST", "/links", {"program": 5})
    numbers = await scrape(client)
    total = "kpmd_http_requests_total"
    assert numbers.get(total, route="/version", method="GET", code="200", kind="") == 3
    assert numbers.get(total, route="/links/{id}", code="404", kind="not-found") == 2
    assert numbers.get(total, route="/links", method="POST", code="422", kind="invalid") == 1
    seconds = "kpmd_http_request_duration_seconds"
    assert numbers.get(f"{seconds}_count", route="/version") == 3
    assert numbers.get(f"{seconds}_bucket", route="/version", le="+Inf") == 3
    assert 0 < (numbers.get(f"{seconds}_sum", route="/version") or 0) < 3
    assert numbers.get(total, route="/metrics") is None  # this one has not been answered yet
    assert (await scrape(client)).get(total, route="/metrics", code="200") == 1


async def test_no_client_makes_a_label(served: Served, client: Client) -> None:
    await scrape(client)
    before = len((await scrape(client))._samples)
    for number in range(30):
        await client.request("GET", f"/no/such/{number}")
        await client.request("GET", f"/links/{number}%22%0A")
        odd = f"X{number}"
        data = f"{odd} /version HTTP/1.1\r\nHost: {odd}\r\nUser-Agent: {odd}\r\n\r\n".encode()
        await raw(served.path, data)
        await raw(served.path, f"GET /version HTTP/{number}\r\n\r\n".encode())
        await client.request("GET", f"/links?label.{odd}=1", headers={"Accept": odd})
        await client.request("PATCH", "/version")
    numbers = await scrape(client)
    assert numbers.values("kpmd_http_requests_total", "route") == {
        "/metrics",
        "/links/{id}",
        "/links",
        "none",
    }
    assert numbers.values("kpmd_http_requests_total", "method") <= {"GET", "none"}
    assert numbers.get("kpmd_http_requests_total", route="none", kind="not-found") == 30
    assert numbers.get("kpmd_http_requests_total", route="none", kind="method-not-allowed") == 30
    # Four routes with a histogram, and one outcome or two of each; not thirty of anything.
    assert len(numbers._samples) < before + 4 * 25


async def test_what_is_under_way(served: Served, client: Client, kernel: FakeKernel) -> None:
    gate = kernel.hooks["load_instructions"] = Gate()
    async with Client(served.path) as other:
        loading = asyncio.create_task(other.post("/programs", instructions()))
        await asyncio.to_thread(gate.entered.wait, 10)
        numbers = await scrape(client)
        assert numbers.get("kpmd_http_requests_in_flight") == 2
        assert numbers.get("kpmd_http_connections") == 2
        assert numbers.get("kpmd_pool_busy_threads", lane="load") == 1
        assert numbers.get("kpmd_pool_threads", lane="load") == 8
        assert numbers.get("kpmd_pool_waiting", lane="load") == 0
        gate.open()
        await loading
    await until(lambda: served.connections == 1)
    numbers = await scrape(client)
    assert numbers.get("kpmd_http_requests_in_flight") == 1
    assert numbers.get("kpmd_http_connections") == 1
    assert numbers.get("kpmd_pool_busy_threads", lane="load") == 0


async def test_work_that_waits_for_a_thread(
    served: Served, client: Client, kernel: FakeKernel
) -> None:
    gate = kernel.hooks["load_instructions"] = Gate()
    async with Client(served.path) as other:
        # One user has half of a lane's eight threads.
        loads = [asyncio.create_task(other.post("/programs", instructions())) for _ in range(6)]
        await until(lambda: served.state.executor.use()[Lane.LOAD].waiting == 2)
        numbers = await scrape(client)
        assert numbers.get("kpmd_pool_busy_threads", lane="load") == 4
        assert numbers.get("kpmd_pool_waiting", lane="load") == 2
        gate.open()
        await asyncio.gather(*loads)


async def test_what_there_is(client: Client, kernel: FakeKernel) -> None:
    made = await client.post("/programs", elf())
    program = made["programs"][0]["id"]
    await a_link(client, program, symbols=["vfs_read", "vfs_write"])
    ends = await a_link(client, program, kind="kretprobe")
    await a_lease(client)
    numbers = await scrape(client)
    multi = {"mechanism": "kprobe_multi"}
    assert numbers.get("kpmd_links", kind="kprobe", **multi) == 1
    assert numbers.get("kpmd_link_targets", kind="kprobe", **multi) == 2
    assert numbers.get("kpmd_link_targets", kind="kretprobe", **multi) == 1
    assert numbers.get("kpmd_links", kind="kprobe", mechanism="perf_event") == 0
    assert numbers.get("kpmd_programs") == 2
    assert numbers.get("kpmd_maps") == 1
    assert numbers.get("kpmd_maps_lent") == 0
    assert numbers.get("kpmd_clients") == 1
    assert numbers.get("kpmd_leases") == 1
    await client.delete(f"/links/{ends}")
    numbers = await scrape(client)
    assert numbers.get("kpmd_links", kind="kretprobe", **multi) == 0
    assert numbers.get("kpmd_link_targets", kind="kretprobe", **multi) == 0
    events = "kpmd_events_total"
    assert numbers.get(events, what="link", event="created") == 2
    assert numbers.get(events, what="link", event="ended", reason="deleted") == 1
    assert numbers.get(events, what="lease", event="created", reason="") == 1


async def test_links_of_an_old_kernel(serve: Serve) -> None:
    kernel = FakeKernel(answers={"bpf_link_kprobe_multi": Answer(False, "too old")})
    served = await serve(kernel)
    async with Client(served.path) as client:
        await a_link(client, symbols=["vfs_read", "vfs_write"])
        numbers = await scrape(client)
    old = {"kind": "kprobe", "mechanism": "perf_event"}
    assert numbers.get("kpmd_links", **old) == 1
    assert numbers.get("kpmd_link_targets", **old) == 2


async def test_missed_calls_only_grow(client: Client, kernel: FakeKernel) -> None:
    total = "kpmd_link_missed_calls_total"
    first, second = await a_link(client), await a_link(client, kind="kretprobe")
    for one, number in zip(kernel.attached, (7, 3), strict=True):
        kernel.tell(one, count=1, missed=number)
    numbers = await scrape(client)
    assert (numbers.get(total, kind="kprobe", mechanism="kprobe_multi")) == 7
    assert (numbers.get(total, kind="kretprobe", mechanism="kprobe_multi")) == 3
    kernel.tell(kernel.attached[0], count=1, missed=9)
    await client.delete(f"/links/{second}")
    numbers = await scrape(client)
    assert (numbers.get(total, kind="kprobe", mechanism="kprobe_multi")) == 9
    assert (numbers.get(total, kind="kretprobe", mechanism="kprobe_multi")) == 3
    # Where the kernel does not tell it, nothing is added.
    kernel.tell(kernel.attached[0], count=None, missed=None)
    assert (await scrape(client)).get(total, kind="kprobe", mechanism="kprobe_multi") == 9
    await client.delete(f"/links/{first}")
    assert (await scrape(client)).get(total, kind="kprobe", mechanism="kprobe_multi") == 9


async def test_links_are_asked_in_turns(
    client: Client, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missed, "_LINKS", 2)
    program = await a_program(client)
    for _ in range(5):
        await a_link(client, program)
    for one in kernel.attached:
        kernel.tell(one, count=1, missed=1)
    found = [
        (await scrape(client)).get(
            "kpmd_link_missed_calls_total", kind="kprobe", mechanism="kprobe_multi"
        )
        for _ in range(4)
    ]
    assert found == [2, 4, 5, 5]


async def test_loads_by_outcome(client: Client, kernel: FakeKernel) -> None:
    await a_program(client)
    failures = [
        VerifierRejected("no", "log", truncated=False),
        BadObject("it is none"),
        BadObject.after("crashed", "it crashed"),
        BadObject.after("timed-out", "it took too long"),
        RuntimeError("a bug"),
    ]
    for error in failures:
        kernel.fail["load_instructions"] = error
        await client.request("POST", "/programs", instructions())
    numbers = await scrape(client)
    outcomes = ("ok", "verifier-rejected", "bad-object", "crashed", "timed-out", "internal")
    assert [numbers.get("kpmd_loads_total", outcome=each) for each in outcomes] == [1] * 6
    assert numbers.get("kpmd_loads_total", outcome="gave-up") == 0
    assert numbers.get("kpmd_load_duration_seconds_count") == 6
    assert numbers.get("kpmd_internal_errors_total") == 1


async def test_a_detach_that_takes_its_time(client: Client, kernel: FakeKernel) -> None:
    link_ = await a_link(client)
    gate = kernel.hooks["close_link"] = Gate()
    deleting = asyncio.create_task(client.delete(f"/links/{link_}"))
    await asyncio.to_thread(gate.entered.wait, 10)
    numbers = await scrape(client)
    assert numbers.get("kpmd_detach_waiting") == 1
    assert numbers.get("kpmd_pool_busy_threads", lane="close") == 1
    first = numbers.get("kpmd_detach_oldest_seconds")
    assert first is not None
    assert 0 < first < ((await scrape(client)).get("kpmd_detach_oldest_seconds") or 0)
    gate.open()
    await deleting
    numbers = await scrape(client)
    assert numbers.get("kpmd_detach_waiting") == 0
    assert numbers.get("kpmd_detach_oldest_seconds") == 0
    assert numbers.get("kpmd_detach_duration_seconds_count") == 1


@root
async def test_refusals_by_rule_and_by_limit(
    serve: Serve, kernel: FakeKernel, actor: Actors
) -> None:
    few = replace(Limits.unlimited(), programs=2, connections=2)
    rule = replace(EVERYTHING, name="few", rights=frozenset({"load"}), limits=few)
    served = await serve(kernel, policy=Policy((rule,)))
    user = await actor(NOBODY, served.path)
    async with Client(served.path) as admin:
        numbers = await scrape(admin)
        assert numbers.get("kpmd_forbidden_total", rule="few") == 0
        assert numbers.get("kpmd_quota_used_ratio", limit="programs") == 0
        program = await a_program(user)
        assert (await scrape(admin)).get("kpmd_quota_used_ratio", limit="programs") == 0.5
        await a_program(user)
        assert (await user.request("POST", "/programs", instructions())).status == 429
        assert (await user.request("POST", "/links", link(program))).status == 403
        assert (await user.request("GET", "/metrics")).status == 403
        numbers = await scrape(admin)
    assert numbers.get("kpmd_forbidden_total", rule="few") == 2
    assert numbers.get("kpmd_quota_refusals_total", limit="programs") == 1
    assert numbers.get("kpmd_quota_refusals_total", limit="links") == 0
    assert numbers.get("kpmd_quota_used_ratio", limit="programs") == 1
    assert numbers.get("kpmd_policy_rules") == 1
    assert numbers.get("kpmd_http_requests_total", kind="quota", code="429") == 1


async def test_connections_that_are_refused(serve: Serve, kernel: FakeKernel) -> None:
    limits = replace(Limits.unlimited(), connections=2)
    rule = replace(EVERYTHING, limits=limits, rights=frozenset(RIGHTS))
    served = await serve(kernel, policy=Policy((rule,), admin_users=frozenset()))
    async with Client(served.path) as first, Client(served.path) as second:
        await first.get("/version")
        await second.get("/version")
        assert [each.status for each in await raw(served.path, b"")] == [429]
        await second.__aexit__(None, None, None)
        await until(lambda: served.connections == 1)
        assert [each.status for each in await raw(served.path, b"\0\r\n\r\n")] == [400]
        numbers = await scrape(first)
    assert numbers.get("kpmd_http_connections_refused_total", kind="quota") == 1
    assert numbers.get("kpmd_http_connections_refused_total", kind="malformed") == 1
    assert numbers.get("kpmd_quota_refusals_total", limit="connections") == 1


async def test_streams_of_records(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(map_type=("ringbuf", 27))
    served = await serve(kernel)
    async with Client(served.path) as client:
        map_ = (await client.post("/programs", elf()))["maps"][0]["id"]
        async with listening(served.path, path=f"/maps/{map_}/records") as stream:
            kernel.ring.write(b"one", b"two")
            assert [await stream.next() for _ in range(2)]
            numbers = await scrape(client)
            assert numbers.get("kpmd_http_streams") == 1
            assert numbers.get("kpmd_record_readers") == 1
            assert numbers.get("kpmd_records_total") == 2
            assert numbers.get("kpmd_record_bytes_total") == 32
            assert numbers.get("kpmd_records_lost_total", reason="reader-too-slow") == 0
            monkeypatch.setattr(records_runtime, "QUEUE_BYTES", 0)
            kernel.ring.write(b"three")
            assert await stream.next() == {"lost": 1, "reason": "reader-too-slow"}
            monkeypatch.setattr(records_runtime, "STALL_SECONDS", -1.0)
            kernel.ring.write(b"four")
            await until(lambda: served.state.records.readers == 0)
        await until(lambda: served.state.counters.total("streams") == 0)
        numbers = await scrape(client)
    assert numbers.get("kpmd_http_streams") == 0
    assert numbers.get("kpmd_record_readers") == 0
    assert numbers.get("kpmd_records_total") == 4
    assert numbers.get("kpmd_records_lost_total", reason="reader-too-slow") == 2
    assert numbers.get("kpmd_record_readers_cut_total") == 1
    assert numbers.get("kpmd_http_requests_total", route="/maps/{id}/records", code="200") == 1


async def test_listeners_to_events(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(served.path):
        numbers = await scrape(client)
        assert numbers.get("kpmd_event_listeners") == 1
        assert numbers.get("kpmd_event_listeners_cut_total") == 0
    await until(lambda: served.state.journal.listeners == 0)
    monkeypatch.setattr(journal, "MOST_BEHIND", 1)
    monkeypatch.setattr(journal, "GRACE", 0.0)
    served.state.journal.listen(None, None)
    for _ in range(2):
        await a_lease(client)
    await until(lambda: served.state.journal.cut == 1)
    numbers = await scrape(client)
    assert numbers.get("kpmd_event_listeners") == 0
    assert numbers.get("kpmd_event_listeners_cut_total") == 1


async def test_the_machine(served: Served, client: Client, kernel: FakeKernel) -> None:
    numbers = await scrape(client)
    assert numbers.get("kpmd_symbol_index_builds_total") == 0
    assert numbers.get("kpmd_symbol_index_functions") == 0
    assert numbers.values("kpmd_feature_supported", "feature") == set()
    before = time.time()
    await client.get("/symbols?limit=1")
    features = (await client.get("/capabilities"))["features"]
    numbers = await scrape(client)
    assert numbers.get("kpmd_symbol_index_builds_total") == 1
    functions = len(served.state.symbols.current().index)
    assert numbers.get("kpmd_symbol_index_functions") == functions > 0
    assert (numbers.get("kpmd_symbol_index_build_duration_seconds") or 0) > 0
    assert (numbers.get("kpmd_symbol_index_built_timestamp_seconds") or 0) >= before
    for name, told in features.items():
        assert numbers.get("kpmd_feature_supported", feature=name) == told["supported"]
    build = numbers.families["kpmd_build_info"].samples[0]
    assert (build.value, build.labels["kernel"]) == (1, kernel.release)
    assert (numbers.get("kpmd_process_open_fds") or 0) > 3
    assert abs((numbers.get("kpmd_process_start_time_seconds") or 0) - time.time()) < 3600


async def test_a_policy_that_is_bad(served: Served, client: Client) -> None:
    policies = served.state.policies
    good = (await scrape(client)).get("kpmd_policy_in_force_timestamp_seconds")

    def bad() -> Policy:
        raise ValueError("no policy")

    policies._read = bad
    await policies.renew(served.state.executor)
    numbers = await scrape(client)
    assert numbers.get("kpmd_policy_last_reload_successful") == 0
    assert numbers.get("kpmd_policy_in_force_timestamp_seconds") == good
    policies._read = lambda: OPEN
    await policies.renew(served.state.executor)
    numbers = await scrape(client)
    assert numbers.get("kpmd_policy_last_reload_successful") == 1
    assert (numbers.get("kpmd_policy_in_force_timestamp_seconds") or 0) > (good or 0)


async def test_an_audit_trail_that_cannot_be_written(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = await scrape(client)
    assert numbers.get("kpmd_audit_records_lost_total") == 0
    assert numbers.get("kpmd_audit_failing") == 0
    monkeypatch.setattr(type(served.state.audit), "lost", 3, raising=False)
    monkeypatch.setattr(type(served.state.audit), "failing", "disk full", raising=False)
    numbers = await scrape(client)
    assert numbers.get("kpmd_audit_records_lost_total") == 3
    assert numbers.get("kpmd_audit_failing") == 1


async def test_the_fd_store(house: House, process: Actors) -> None:
    user = await process()
    before = await scrape(user)
    await a_program(user, lifetime={"kind": "persistent"})
    numbers = await scrape(user)
    assert (numbers.get("kpmd_fd_store_used") or 0) > (before.get("kpmd_fd_store_used") or 0)
    assert numbers.get("kpmd_fd_store_capacity") == house.manager.capacity


class TestWho:
    def test_no_rule_grants_it_unless_it_says_so(self) -> None:
        assert set(RIGHTS) - set(USUAL) == {"metrics"}

    @root
    async def test_a_scraper_needs_no_other_right(
        self, serve: Serve, kernel: FakeKernel, actor: Actors
    ) -> None:
        scraper = replace(
            EVERYTHING,
            everyone=False,
            users=frozenset({NOBODY}),
            name="scraper",
            rights=frozenset({"metrics"}),
            functions=Functions(allow=()),
        )
        served = await serve(kernel, policy=Policy((scraper, EVERYTHING)))
        user = await actor(NOBODY, served.path)
        other = await actor(NOBODY + 1, served.path)
        await a_program(other)
        assert (await scrape(user)).get("kpmd_programs") == 1
        assert (await user.request("POST", "/programs", instructions())).status == 403
        assert (await user.get("/programs"))["items"] == []
        answer = await other.request("GET", "/metrics")
        assert (answer.status, answer.json["kind"]) == (403, "forbidden")
        assert "'metrics'" in answer.json["detail"]


class TestForms:
    async def test_openmetrics_for_who_asks_for_it(self, client: Client) -> None:
        accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5"
        answer = await client.request("GET", "/metrics", headers={"Accept": accept})
        kind = answer.headers["Content-Type"]
        assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        text = answer.body.decode()
        assert text.endswith("# EOF\n")
        families = openmetrics.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        assert len(list(families)) > len(METRICS) - 2

    @pytest.mark.parametrize(
        "accept",
        [
            "",
            "*/*",
            "text/plain; version=1.0.0; escaping=x",
            "text/plain;version=9.x",
            "\xff",
            ";;,",
        ],
    )
    async def test_text_for_all_others(self, client: Client, accept: str) -> None:
        answer = await client.request("GET", "/metrics", headers={"Accept": accept})
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"

    async def test_an_answer_serves_for_a_while(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metrics, "FRESH", 60.0)
        first = await client.request("GET", "/metrics")
        await a_program(client)
        assert (await client.request("GET", "/metrics")).body == first.body
        monkeypatch.setattr(metrics, "FRESH", 0.0)
        assert (await client.request("GET", "/metrics")).body != first.body


@pytest.mark.alone
async def test_a_scrape_leaves_the_event_loop_free(serve: Serve, no_garbage: None) -> None:
    """With many links to five hundred functions each."""
    served = await serve(FakeKernel(files=symbol_files(many=500)))
    async with Client(served.path) as client:
        await _scrape_of_many(client)


async def _scrape_of_many(client: Client) -> None:
    program = await a_program(client)
    names = [f"many_{number}" for number in range(500)]
    await asyncio.gather(*(a_link(client, program, symbols=names) for _ in range(200)))
    await scrape(client)
    longest, last, done = 0.0, time.perf_counter(), asyncio.Event()

    async def watch() -> None:
        nonlocal longest, last
        while not done.is_set():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    numbers = await scrape(client)
    took = time.perf_counter() - began
    done.set()
    await watching
    assert numbers.get("kpmd_link_targets", kind="kprobe", mechanism="kprobe_multi") == 100_000
    assert took < 2.0
    assert longest < 0.25
