"""GET /metrics over a real kernel: what there is, and what links have missed."""

from __future__ import annotations

import http.client
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.kernel.conftest import Daemon
from tests.kernel.rest import Rest, UnixConnection

pytestmark = [pytest.mark.multi, pytest.mark.once]


def scrape(daemon: Daemon) -> dict[tuple[str, str], float]:
    """By name and, of links, their kind."""
    connection: http.client.HTTPConnection = UnixConnection(daemon.socket, 60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        (each.name, each.labels.get("kind", "")): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
        if each.labels.get("mechanism", "kprobe_multi") == "kprobe_multi"
    }


def test_links_targets_and_missed_calls(daemon: Daemon, rest: Rest) -> None:
    before = scrape(daemon)
    source = {"kind": "builtin", "builtin": "count"}
    loaded = rest.ok("POST", "/programs", {"source": source, "attach": "kprobe_multi"})
    program = loaded["programs"][0]["id"]
    wanted: list[dict[str, object]] = [
        {"patterns": ["vfs_*"]},
        {"symbols": ["vfs_read", "vfs_open"]},
    ]
    made = [
        rest.ok("POST", "/links", {"program": program, "kind": "kprobe", **what}) for what in wanted
    ]
    time.sleep(1)  # for as long as the first answer serves
    after = scrape(daemon)
    missed = sum(each["missed"] for each in rest.items("/links"))

    def more(name: str, kind: str = "kprobe") -> float:
        return after[name, kind] - before.get((name, kind), 0)

    assert more("kpmd_links") == 2
    assert more("kpmd_link_targets") == sum(each["count"] for each in made)
    assert more("kpmd_programs", "") == 1
    assert more("kpmd_maps", "") >= 1
    # Mostly 0: the kernel misses calls only where its tracing calls itself more than once.
    assert more("kpmd_link_missed_calls_total") <= missed
    assert after["kpmd_symbol_index_functions", ""] > 10_000
    rest.ok("DELETE", f"/programs/{program}?force=true")
    # An answer serves for a second.
    deadline = time.monotonic() + 30
    while (ended := scrape(daemon))["kpmd_programs", ""] != before["kpmd_programs", ""]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ended["kpmd_links", "kprobe"] == before["kpmd_links", "kprobe"]
    # It does not go back with the link.
    missed_calls = "kpmd_link_missed_calls_total", "kprobe"
    assert ended[missed_calls] >= after[missed_calls]
