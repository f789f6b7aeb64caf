"""Kprobes one by one over a restart: many file descriptors for one link (kernel 6.1)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, call_getpid
from tests.systemd.conftest import Kpmd
from tests.systemd.control import run
from tests.systemd.test_restart import (
    PERSISTENT,
    again,
    counted,
    make,
    nothing_is_stored,
    restart,
)

pytestmark = pytest.mark.no_multi

#: More file descriptors than fit into one message (SCM_MAX_FD).
MANY = 253


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    """Debian's default, 3, wants CAP_SYS_ADMIN for this, which the unit does not give."""
    run("sysctl", "-w", "kernel.perf_event_paranoid=2")
    yield
    run("sysctl", "-w", "kernel.perf_event_paranoid=3")


def perf_links() -> set[int]:
    """The kernel's own list of links to perf events."""
    listed = json.loads(run("/usr/sbin/bpftool", "-j", "link", "list") or "[]")
    return {each["id"] for each in listed if each["type"] in ("perf_event", 7)}


def test_all_of_them_go_on_over_a_restart_and_a_kill(kpmd: Kpmd, rest: Rest) -> None:
    program, link = make(rest, PERSISTENT)
    assert link["mechanism"] == "perf_event"
    body = {"program": program["id"], "kind": "kprobe", "lifetime": PERSISTENT}
    large = rest.ok(
        "POST",
        "/links",
        {**body, "patterns": ["acpi_ut_*", "acpi_ns_*", "acpi_ex_*", "acpi_ds_*"]},
    )
    assert large["count"] > MANY
    before = perf_links()
    assert len(before) == 1 + large["count"]
    for how in ("restart", "SIGKILL"):
        call_getpid(10)
        first = counted(rest, program)
        restart(kpmd, how)
        rest = again(rest)
        assert perf_links() == before
        assert counted(rest, program) >= first
        call_getpid(10)
        assert counted(rest, program) >= first + 10
        found = rest.ok("GET", f"/links/{large['id']}")
        assert (found["count"], found["kernel_id"]) == (large["count"], large["kernel_id"])
        assert rest.items(f"/links/{link['id']}/targets")[0]["symbol"] == GETPID
    rest.ok("DELETE", f"/programs/{program['id']}?force=true")
    assert perf_links() == set()
    nothing_is_stored(kpmd, rest)
