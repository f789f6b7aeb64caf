"""The feature tests, on each kernel of the matrix."""

from __future__ import annotations

import pytest

from kpmd.bpf.fd import tracer
from kpmd.bpf.features import FEATURES
from tests.kernel.conftest import expects_multi
from tests.kernel.rest import Rest


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_answer_is_what_the_kernel_must_have(feature, release):  # type: ignore[no-untyped-def]
    new_enough = tuple(int(part) for part in feature.min_kernel.split(".")) <= release
    tracer.active = True
    answer = feature.test()
    assert answer.supported is (expects_multi() and new_enough)
    assert (answer.reason is None) is answer.supported
    assert tracer.held() == []


def test_capabilities_tell_it(rest: Rest) -> None:
    answer = rest.ok("GET", "/capabilities")
    multi = answer["features"]["bpf_link_kprobe_multi"]
    assert multi["supported"] is expects_multi()
    assert multi["min_kernel"] == "5.18"
    assert answer["features"]["bpf_link_kprobe_session"]["min_kernel"] == "6.10"


@pytest.mark.no_multi
def test_link_is_refused_with_what_it_needs(rest: Rest) -> None:
    """EOPNOTSUPP on 6.1 cloud and on kernels without FPROBE: loading works, linking does not."""
    loaded = rest.ok("POST", "/programs", {"source": {"kind": "builtin", "builtin": "count"}})
    program = loaded["programs"][0]
    status, problem = rest(
        "POST",
        "/links",
        {"program": program["id"], "kind": "kprobe", "symbols": ["vfs_read"]},
    )
    assert (status, problem["kind"]) == (501, "not-supported")
    assert "5.18" in problem["needs"]
    assert rest.items("/links") == []
