"""``kpmd --check`` on each kernel: it says what the API says, and what attaching then does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.kernel.conftest import expects_kprobes, expects_multi
from tests.kernel.rest import Rest
from tests.kernel.wire import NOBODY

#: Findings that stand for a feature test.
FEATURES = {
    "sessions": "bpf_link_kprobe_session",
    "cookies": "bpf_cookie",
    "function addresses": "bpf_get_func_ip",
}


def check(*under: str, user: int | None = None) -> tuple[int, dict[str, Any]]:
    """The exit status, and the findings by their names."""
    command = [*under, sys.executable, "-m", "kpmd", "--check", "--json"]
    groups: Sequence[int] | None = None if user is None else []
    ended = subprocess.run(
        command, capture_output=True, check=False, user=user, group=user, extra_groups=groups
    )
    assert ended.stderr == b""
    told = json.loads(ended.stdout)
    assert told["status"] == ended.returncode
    return ended.returncode, {each["name"]: each for each in told["findings"]}


def test_root_sees_what_the_api_tells(rest: Rest) -> None:
    features = rest.ok("GET", "/capabilities")["features"]
    status, found = check()
    for name, feature in FEATURES.items():
        assert (found[name]["level"] == "ok") is features[feature]["supported"], found[name]
    attaching = found["attaching"]
    assert (attaching["level"] == "ok") is features["bpf_link_kprobe_multi"]["supported"]
    assert found["loading"]["level"] == "ok"
    assert [each for each in found.values() if each["level"] == "unknown"] == []
    if not expects_kprobes() and not expects_multi():
        assert (status, attaching["level"]) == (2, "missing")
        return
    # What it says of attaching is so: a link is made, by the mechanism that it names.
    assert status in (0, 1)
    loaded = rest.ok("POST", "/programs", {"source": {"kind": "builtin", "builtin": "count"}})
    body = {"program": loaded["programs"][0]["id"], "kind": "kprobe", "symbols": ["vfs_read"]}
    mechanism = rest.ok("POST", "/links", body)["mechanism"]
    assert attaching["found"].startswith(
        {"kprobe_multi": "kprobe multi", "perf_event": "one by one"}[mechanism]
    )


@pytest.mark.once
def test_a_user_is_told_what_cannot_be_seen() -> None:
    status, found = check(user=NOBODY)
    assert found["capabilities"]["level"] == "unknown"
    assert found["loading"]["level"] == "unknown"
    assert found["attaching"]["level"] == "unknown"
    assert status in (1, 3)


@pytest.mark.kprobes
def test_the_capabilities_of_the_unit() -> None:
    """On Debian's own settings they do for kprobe multi, and not for kprobes one by one."""
    # LimitMEMLOCK= of the unit, which counts before kernel 5.11.
    limits = ("prlimit", "--memlock=unlimited")
    status, found = check(*limits, sys.executable, "-m", "tests.kernel.as_unit", str(NOBODY))
    assert found["capabilities"]["level"] == "ok"
    assert found["addresses"]["level"] == "ok"
    assert found["loading"]["level"] == "ok"
    if expects_multi():
        assert found["attaching"]["level"] == "ok"
        assert status in (0, 1, 3)
    else:
        assert found["attaching"]["level"] == "missing"
        assert status == 2
