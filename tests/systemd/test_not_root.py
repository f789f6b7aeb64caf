"""The daemon is a user of its own, and has no more than kpmd.service says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kpmd.bpf.tracefs import PATHS
from tests.kernel.conftest import bpftool_links
from tests.kernel.rest import Rest
from tests.systemd.conftest import UNITS, Kpmd
from tests.systemd.control import NOT_JSON, run, until
from tests.systemd.test_restart import PERSISTENT, again, counted, make, nothing_is_stored

USER = "kpmd-daemon"
CAPABILITIES = ("CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG")

#: Overall exposure, times ten: 0 is safe, 100 is a root without any restriction.
EXPOSURE = 15


def status_of(pid: int | str) -> dict[str, str]:
    """What /proc says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def mask(names: tuple[str, ...]) -> int:
    """Capabilities as /proc shows them."""
    numbers = {name: number for number, name in enumerate(run("setpriv", "--list-caps").split())}
    return sum(1 << numbers[name.removeprefix("CAP_").lower()] for name in names)


def capabilities(status: dict[str, str]) -> dict[str, int]:
    return {name: int(status[f"Cap{name}"], 16) for name in ("Eff", "Prm", "Inh", "Amb", "Bnd")}


def processes(kpmd: Kpmd) -> list[str]:
    """The service's processes, as its cgroup has them."""
    group = Path("/sys/fs/cgroup", kpmd.service.show("ControlGroup").lstrip("/"))
    return (group / "cgroup.procs").read_text(encoding="ascii").split()


def handed_over(kpmd: Kpmd) -> list[str]:
    """The kernel's lists of functions that the daemon has open."""
    folder = Path(f"/proc/{kpmd.service.main_pid}/fd")
    wanted = {path for paths in PATHS.values() for path in paths}
    # Of a mount in another namespace the path may not be told in full.
    names = {os.path.basename(path) for path in wanted}
    found = [os.readlink(fd) for fd in folder.iterdir()]
    return sorted(os.path.basename(path) for path in found if os.path.basename(path) in names)


@contextmanager
def module(name: str) -> Iterator[None]:
    run("modprobe", name)
    try:
        yield
    finally:
        run("modprobe", "-r", name)


def test_without_tracefs_it_says_so_and_serves(kpmd: Kpmd, rest: Rest) -> None:
    """And who opens the files for the daemon is root with few capabilities, in its sandbox."""
    kpmd.expected.add(NOT_JSON)
    kpmd.service.add_drop_in(
        "hidden",
        "[Service]\nInaccessiblePaths=/sys/kernel/tracing /sys/kernel/debug\n"
        "ExecStartPre=!/bin/cat /proc/self/status\n",
    )
    rest.ok("GET", "/healthz")
    kpmd.journal.wait_for("cannot tell which functions can be traced")
    assert rest.items("/symbols?pattern=vfs_*") == []
    texts = [each["text"] for each in kpmd.journal.records() if each["event"] == NOT_JSON]
    status = {name: value.strip() for name, _, value in (text.partition(":") for text in texts)}
    assert status["Uid"].split()[0] == "0"
    assert capabilities(status)["Prm"] == capabilities(status)["Bnd"] == mask(CAPABILITIES)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_a_daemon_that_hangs_is_started_anew_and_nothing_is_detached(
    kpmd: Kpmd, rest: Rest
) -> None:
    kpmd.service.add_drop_in("short", "[Service]\nWatchdogSec=6\n")
    program, link = make(rest, PERSISTENT)
    kpmd.journal.wait_for("symbol index built")
    files = handed_over(kpmd)
    assert files == ["available_filter_functions", "available_filter_functions_addrs", "blacklist"]
    alive = kpmd.service.time("WatchdogTimestamp")
    until(lambda: kpmd.service.time("WatchdogTimestamp") > alive, "it tells that it lives")
    before = kpmd.service.main_pid
    kpmd.expected.add(NOT_JSON)  # where it hung
    run("systemctl", "kill", "--kill-whom=main", "--signal=SIGSTOP", kpmd.service.name)
    until(lambda: kpmd.service.main_pid not in (0, before), "the watchdog ends it")
    kpmd.service.wait_until_active()
    assert kpmd.service.show("NRestarts") == "1"
    texts = [each["text"] for each in kpmd.journal.records() if each["event"] == NOT_JSON]
    assert "Fatal Python error: Aborted" in texts
    assert [each["id"] for each in bpftool_links()] == [link["kernel_id"]]
    rest = again(rest)
    assert counted(rest, program) >= 0
    # Root opened its files anew for this start, and those of the first are nowhere.
    assert handed_over(kpmd) == files
    rest.ok("DELETE", f"/programs/{program['id']}?force=true")
    nothing_is_stored(kpmd, rest)


def test_the_policy_is_there_and_an_administrators_own_stays(tmp_path: Path) -> None:
    shipped, policy = tmp_path / "usr/share/kpmd/policy.toml", tmp_path / "etc/kpmd/policy.toml"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("shipped\n", encoding="ascii")
    (tmp_path / "etc").mkdir()
    command = ("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "kpmd.tmpfiles"))
    run(*command)
    assert policy.read_text(encoding="ascii") == "shipped\n"
    assert (policy.owner(), policy.stat().st_mode & 0o777) == ("root", 0o644)
    assert policy.parent.stat().st_mode & 0o777 == 0o755
    policy.write_text("own\n", encoding="ascii")
    run(*command)
    assert policy.read_text(encoding="ascii") == "own\n"


def test_its_exposure(installed: None) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", f"--threshold={EXPOSURE}", "kpmd.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    overall = re.search(r"Overall exposure level for kpmd\.service: (\d+\.\d)", done.stdout)
    assert overall is not None, done.stdout
    assert float(overall[1]) * 10 <= EXPOSURE
