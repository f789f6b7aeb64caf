"""The feature tests, on each kernel of the matrix."""

from __future__ import annotations

import pytest

from kpmd.bpf.fd import tracer
from kpmd.bpf.features import FEATURES
from tests.kernel.conftest import expects_kprobes, expects_multi
from tests.kernel.rest import Rest


def expected(name: str) -> bool:
    """Whether the kernel was built with what a feature needs, its release aside."""
    if name.startswith("bpf_link_kprobe_"):
        return expects_multi()
    return expects_kprobes() if name == "kprobe_perf_event" else True


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_answer_is_what_the_kernel_must_have(feature, release):  # type: ignore[no-untyped-def]
    new_enough = tuple(int(part) for part in feature.min_kernel.split(".")) <= release
    tracer.active = True
    answer = feature.test()
    assert answer.supported is (expected(feature.name) and new_enough)
    assert (answer.reason is None) is answer.supported
    assert tracer.held() == []


def test_capabilities_tell_it(rest: Rest) -> None:
    answer = rest.ok("GET", "/capabilities")
    multi = answer["features"]["bpf_link_kprobe_multi"]
    assert multi["supported"] is expects_multi()
    assert multi["min_kernel"] == "5.18"
    assert answer["features"]["bpf_link_kprobe_session"]["min_kernel"] == "6.10"


@pytest.mark.no_multi
def test_link_is_made_one_by_one_or_refused_with_what_it_needs(rest: Rest) -> None:
    """Kernels without kprobe multi attach through perf events, where they have kprobes at all."""
    loaded = rest.ok("POST", "/programs", {"source": {"kind": "builtin", "builtin": "count"}})
    program = loaded["programs"][0]
    status, problem = rest(
        "POST",
        "/links",
        {"program": program["id"], "kind": "kprobe", "symbols": ["vfs_read"]},
    )
    if expects_kprobes():
        assert (status, problem["mechanism"]) == (201, "perf_event")
        rest.ok("DELETE", f"/links/{problem['id']}")
        return
    assert (status, problem["kind"]) == (501, "not-supported")
    assert "5.18" in problem["needs"]
    assert rest.items("/links") == []
