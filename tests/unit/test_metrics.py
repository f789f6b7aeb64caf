"""How numbers are kept, what they are called, and what becomes of them as text."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kpmd.api.exposition import text
from kpmd.api.metric_table import METRICS, Metric
from kpmd.bpf.fd import Closed
from kpmd.bpf.objects import LinkDetails
from kpmd.core.model import Mechanism
from kpmd.core.quotas import Accounts, Limits
from kpmd.core.registry import Registry
from kpmd.errors import BadObject, Forbidden, Quota
from kpmd.runtime.executor import Executor
from kpmd.runtime.missed import _CALLS, Missed
from kpmd.runtime.tallies import REQUEST, Histogram, RouteTally, Tallies
from tests.unit.records import a_link, a_program


@given(st.lists(st.floats(0, 100), max_size=50))
def test_each_observation_is_in_the_bucket_of_its_bound(values: list[float]) -> None:
    histogram = Histogram(REQUEST)
    for value in values:
        histogram.observe(value)
    for at, bound in enumerate(REQUEST):
        assert sum(histogram.counts[: at + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))


def test_a_copy_is_as_of_then() -> None:
    tally = RouteTally()
    tally.answered(0.1, 200, None)
    before = tally.seconds.copy()
    tally.answered(0.1, 403, Forbidden("no", rule="r"))
    assert (sum(before.counts), sum(tally.seconds.counts)) == (1, 2)
    assert (tally.successes, tally.errors) == ({200: 1}, {(403, "forbidden"): 1})


def test_refusals_are_counted_by_what_the_policy_and_the_code_say() -> None:
    tallies = Tallies()
    tallies.refused(Forbidden("no"), "mine")
    tallies.refused(Forbidden("no", rule="other"), "mine")
    tallies.refused(Quota("no", limit="links"), "mine")
    tallies.refused(Quota("no"), "mine")
    # What comes out of the loader's processes is not believed.
    tallies.refused(Quota("no", limit="evil\n"), "mine")
    assert tallies.forbidden == {"mine": 1, "other": 1}
    assert tallies.quota == {"links": 1, "fd_store": 1, "other": 1}


def test_a_load_that_is_cut_off_counts_too() -> None:
    tallies = Tallies()
    with pytest.raises(BadObject), tallies.load():
        raise BadObject.after("crashed", "it crashed")
    with pytest.raises(KeyboardInterrupt), tallies.load():
        raise KeyboardInterrupt
    assert tallies.loads == {"crashed": 1, "cancelled": 1}
    assert sum(tallies.load_seconds.counts) == 2


def test_the_fullest_of_all_users() -> None:
    accounts = Accounts()
    limits = replace(Limits(), links=10, leases=0)
    with accounts.claim(1, limits) as claim:
        claim.want("links", 4)
        accounts.add(2, "links", 1000)  # since before a restart: their limits are not known yet
        assert accounts.fullest()["links"] == 0.4
        with accounts.claim(3, limits) as other:
            other.want("links", 5)
            assert accounts.fullest() == {
                "programs": 0,
                "links": 0.5,
                "targets": 0,
                "map_bytes": 0,
                "leases": 0,
            }
        assert accounts.fullest()["links"] == 0.4
    accounts.add(2, "links", -1000)
    assert set(accounts.fullest().values()) == {0}


def test_limits_of_users_who_are_gone_are_forgotten() -> None:
    accounts = Accounts()
    accounts.add(0, "links", 1)
    for uid in range(5000):
        accounts.check(uid, Limits(), "links", 1)
    assert len(accounts._limits) <= 1025
    assert 0 in accounts._limits


class TestNames:
    """By Prometheus' conventions, and by what the text format can say."""

    @pytest.mark.parametrize("metric", METRICS, ids=lambda each: each.name)
    def test_each(self, metric: Metric) -> None:
        assert re.fullmatch(r"kpmd(_[a-z]+)+", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
        assert metric.help.endswith(".")
        assert metric.name.endswith("_seconds") == (
            "duration" in metric.name or "time" in metric.name or "oldest" in metric.name
        )
        assert not {"le", "quantile", "uid", "user", "pid", "id"} & set(metric.labels)

    def test_none_is_there_twice(self) -> None:
        names = [each.name for each in METRICS]
        assert len(names) == len(set(names))


def a_metric(kind: Any, *labels: str) -> Metric:
    return Metric(kind, "kpmd_x", "Some.", lambda state: {}, labels)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_labels_come_back_as_they_were(label: str) -> None:
    raw = text([(a_metric("gauge", "word"), {(label,): 2.5})], openmetrics=False)
    (family, *_) = text_string_to_metric_families(raw.decode())
    assert [(each.labels, each.value) for each in family.samples] == [({"word": label}, 2.5)]


def test_a_histogram_comes_back() -> None:
    histogram = Histogram((0.5, 1.0))
    for value in (0.1, 0.5, 0.7, 3.0):
        histogram.observe(value)
    raw = text([(a_metric("histogram", "route"), {("/x",): histogram})], openmetrics=False)
    (family, *_) = text_string_to_metric_families(raw.decode())
    found = {(each.name, each.labels.get("le")): each.value for each in family.samples}
    assert found == {
        ("kpmd_x_bucket", "0.5"): 2,
        ("kpmd_x_bucket", "1"): 3,
        ("kpmd_x_bucket", "+Inf"): 4,
        ("kpmd_x_count", None): 4,
        ("kpmd_x_sum", None): pytest.approx(4.3),
    }


class _Kernel:
    """Knows what each link missed; counts what it is asked."""

    def __init__(self) -> None:
        self.missed: dict[object, int | Exception] = {}
        self.asked = 0

    def link_details(self, handle: object) -> LinkDetails:
        self.asked += 1
        told = self.missed[handle]
        if isinstance(told, Exception):
            raise told
        return LinkDetails(kernel_id=1, program_kernel_id=1, count=1, missed=told)


class TestMissed:
    """The kernel's counts of links, by as many system calls as there may be."""

    @staticmethod
    def _one(links: int, mechanism: Mechanism, count: int) -> tuple[Registry, _Kernel, Missed]:
        registry, kernel = Registry(), _Kernel()
        connection = registry.connect(None, 1, 0, 0, "test", 0.0)
        program = a_program(connection)
        for number in range(links):
            link = a_link(connection, program)
            link = replace(link, id=f"lnk-{number}", mechanism=mechanism, count=count)
            registry.links.add(link)
            kernel.missed[link.id] = 1
        missed = Missed(kernel, Executor(), registry, lambda id_: id_)  # type: ignore[arg-type, return-value]
        return registry, kernel, missed

    async def test_links_of_many_parts_use_up_the_calls(self) -> None:
        _, kernel, missed = self._one(10, "perf_event", _CALLS // 2)
        await missed.refresh()
        assert kernel.asked == 2
        for _ in range(4):
            await missed.refresh()
        assert dict(missed.total) == {("kprobe", "perf_event"): 10}

    async def test_one_that_cannot_be_asked_is_left_out(self) -> None:
        _, kernel, missed = self._one(3, "kprobe_multi", 1)
        kernel.missed["lnk-0"] = Closed("gone")
        kernel.missed["lnk-1"] = OSError(9, "bad")
        await missed.refresh()
        assert dict(missed.total) == {("kprobe", "kprobe_multi"): 1}

    async def test_what_has_ended_is_forgotten(self) -> None:
        registry, _, missed = self._one(3, "kprobe_multi", 1)
        await missed.refresh()
        registry.links.remove("lnk-1")
        await missed.refresh()
        assert set(missed._known) == {"lnk-0", "lnk-2"}
        assert dict(missed.total) == {("kprobe", "kprobe_multi"): 3}


def test_who_is_not_scraped_does_without_the_library() -> None:
    code = "import sys, kpmd.daemon; sys.exit(any('prometheus' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
