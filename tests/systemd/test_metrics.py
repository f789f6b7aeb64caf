"""deploy/prometheus: the units that write numbers for node_exporter.

That they do is shown by tests/systemd/test_docs.py, as docs/how-to/monitor.md installs them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.conftest import INSTALLED, PROJECT
from tests.systemd.control import run

SHIPPED = PROJECT / "deploy/prometheus"
UNITS = ("kpmd-metrics.service", "kpmd-metrics.timer")
NUMBERS = Path("/var/lib/kpmd-metrics/kpmd.prom")


@pytest.fixture
def numbers(installed: None) -> Iterator[None]:
    """The units and their user; kpmd's socket does not listen."""
    for name in UNITS:
        shutil.copy(SHIPPED / name, INSTALLED / name)
    shutil.copy(SHIPPED / "kpmd-metrics.sysusers", "/usr/lib/sysusers.d/kpmd-metrics.conf")
    run("systemd-sysusers")
    run("systemctl", "daemon-reload")
    yield
    subprocess.run(["systemctl", "reset-failed", *UNITS], check=False, capture_output=True)


def test_old_numbers_do_not_stay_where_kpmd_is_silent(numbers: None) -> None:
    NUMBERS.parent.mkdir(exist_ok=True)
    NUMBERS.write_text("kpmd_links 1\n")
    for path in (NUMBERS.parent, NUMBERS):
        shutil.chown(path, "kpmd-metrics", "kpmd-metrics")
    started = subprocess.run(["systemctl", "start", UNITS[0]], check=False, capture_output=True)
    assert started.returncode != 0
    assert not NUMBERS.exists()
    assert "no socket at /run/kpmd.sock" in run("journalctl", "--unit", UNITS[0], "--output", "cat")


def test_nothing_to_complain_of(numbers: None) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(INSTALLED / name) for name in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    run("systemd-analyze", "security", "--no-pager", "--threshold=10", UNITS[0])
