"""systemd/kpmd.service and systemd/kpmd.socket, as they are, under a real systemd."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from datetime import datetime

import pytest

from tests.kernel.conftest import bpftool_links
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID
from tests.kernel.test_service import COUNT
from tests.systemd.conftest import (
    INSTALLED,
    NAMES,
    SOCKET,
    UNITS,
    Client,
    Kpmd,
    kernel_programs,
)
from tests.systemd.control import NOT_JSON, until
from tests.systemd.test_audit import found
from tests.systemd.test_restart import PERSISTENT, again, make


def count_getpid(rest: Rest) -> dict[str, list[str]]:
    """Load the builtin ``count`` and attach it to getpid(2); the program."""
    program: dict[str, list[str]] = rest.ok("POST", "/programs", COUNT)["programs"][0]
    rest.ok("POST", "/links", {"program": program["id"], "kind": "kprobe", "symbols": [GETPID]})
    return program


def test_nothing_to_complain_of(installed: None) -> None:
    for name in NAMES:
        assert (INSTALLED / name).read_bytes() == (UNITS / name).read_bytes()
    # Without the check for manual pages: the guest has none.
    command = ["systemd-analyze", "verify", "--man=no", *(str(INSTALLED / name) for name in NAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_first_request_of_the_group_starts_the_service_and_nobody_else_s(
    kpmd: Kpmd, client: Callable[[str], Client]
) -> None:
    outside, inside = client("outside"), client("inside")
    assert kpmd.socket.show("SubState") == "listening"
    assert kpmd.service.active == "inactive"
    assert kpmd.service.main_pid == 0
    with pytest.raises(PermissionError) as refused:
        outside("GET", "/healthz")
    assert refused.value.errno == errno.EACCES
    assert kpmd.service.active == "inactive"
    inside.ok("GET", "/healthz")
    kpmd.service.wait_until_active()
    assert kpmd.journal.wait_for("listening")["socket"] == SOCKET
    pid = kpmd.service.main_pid
    with pytest.raises(PermissionError):
        outside("GET", "/healthz")
    root = Rest(SOCKET)
    root.ok("GET", "/healthz")
    root.close()
    assert kpmd.service.main_pid == pid
    assert kpmd.socket.show("SubState") == "running"


def test_active_once_it_listens_and_started_again_once_killed(kpmd: Kpmd) -> None:
    assert kpmd.service.show("Type") == "notify"
    kpmd.service.start()
    listening = datetime.fromisoformat(kpmd.journal.wait_for("listening")["timestamp"])
    assert kpmd.service.time("ExecMainStartTimestamp") < listening
    assert listening <= kpmd.service.time("ActiveEnterTimestamp")
    first = kpmd.service.main_pid
    kpmd.service.kill()
    kpmd.service.wait_until_active()
    kpmd.journal.wait_for("listening")
    assert kpmd.service.main_pid not in (0, first)
    assert kpmd.service.show("NRestarts") == "1"
    assert kpmd.socket.show("SubState") == "running"


def test_what_cannot_start_is_not_active(kpmd: Kpmd) -> None:
    kpmd.expected.add(NOT_JSON)  # what is said of a wrong command line
    kpmd.service.add_drop_in(
        "broken", "[Service]\nExecStart=\nExecStart=/usr/bin/kpmd --config /nowhere\nRestart=no\n"
    )
    done = subprocess.run(
        ["systemctl", "start", kpmd.service.name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert kpmd.service.active == "failed"
    assert kpmd.service.show("Result") == "exit-code"


def test_stop_leaves_nothing(kpmd: Kpmd, rest: Rest) -> None:
    """Neither what ends with its client, nor what outlives clients and restarts."""
    count_getpid(rest)
    for _ in range(2):
        make(rest, PERSISTENT)
    assert len(bpftool_links()) == 3
    assert kernel_programs()
    pid = f"_PID={kpmd.service.main_pid}"
    found(pid, "KPMD_AUDIT=start", "KPMD_OUTCOME=ok")
    kpmd.service.stop()
    # Not left to systemd, which would close them one by one in process 1 (until systemd 254).
    assert kpmd.journal.wait_for("stopping")["keep"] is False
    assert bpftool_links() == []
    until(lambda: kernel_programs() == [], "the kernel has let go of the programs")
    assert kpmd.service.stored == 0
    assert kpmd.service.active == "inactive"
    assert kpmd.service.show("Result") == "success"
    assert kpmd.service.show("ExecMainCode") == "1"  # CLD_EXITED: by itself, not by a signal
    assert kpmd.service.show("ExecMainStatus") == "0"
    kpmd.journal.wait_for("stopped")
    found(pid, "KPMD_AUDIT=stop", "KPMD_OUTCOME=ok")
    # The socket is systemd's, and waits for the next client.
    assert kpmd.socket.show("SubState") == "listening"
    rest = again(rest)
    assert rest.items("/links") == rest.items("/programs") == []
    rest.close()
    # And goes when it is stopped.
    kpmd.socket.stop()
    assert not os.path.lexists(SOCKET)
    assert kpmd.service.active == "inactive"
    assert kpmd.service.show("Result") == "success"
