"""What the service manager is about to do, as systemctl tells it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kpmd.runtime import manager
from kpmd.runtime.manager import is_being_stopped, own_unit

UNIT = "kpmd.service"


def cgroup(folder: Path, text: str) -> Path:
    path = folder / "cgroup"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("0::/system.slice/kpmd.service\n", UNIT),
        ("0::/system.slice/system-kpmd.slice/kpmd@one.service\n", "kpmd@one.service"),
        ("0::/system.slice/kpmd.service/inner\n", UNIT),
        ("0::/user.slice/user-0.slice/user@0.service/app.slice/kpmd.service\n", UNIT),
        ("12:pids:/system.slice/kpmd.service\n1:name=systemd:/system.slice/kpmd.service\n", UNIT),
        ("3:cpu,cpuacct:/\n1:name=systemd:/system.slice/kpmd.service\n0::/\n", UNIT),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("0::/\n", None),
        ("0::/docker/0123\n", None),
        ("0::/a:b.service/c\n", "a:b.service"),
        ("", None),
    ],
)
def test_the_unit_is_what_the_cgroup_says(tmp_path: Path, text: str, unit: str | None) -> None:
    assert own_unit(cgroup(tmp_path, text)) == unit


def test_no_cgroup_no_unit(tmp_path: Path) -> None:
    assert own_unit(tmp_path / "none") is None


def test_the_own_one_can_be_read() -> None:
    unit = own_unit()
    assert unit is None or unit.endswith(".service")


Systemctl = Callable[[str], None]


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    """Makes a systemctl of a shell script; this process is in a unit."""
    monkeypatch.setattr(manager, "own_unit", lambda: UNIT)
    # Nothing but that one is found.
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "systemctl"

    def install(script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
        path.chmod(0o755)

    return install


@pytest.mark.parametrize(
    ("jobs", "stopped"),
    [
        ("1234 kpmd.service stop running", True),
        ("  12 kpmd.service stop running\n", True),
        ("1234 kpmd.service restart running", False),
        ("1234 kpmd.service start waiting", False),
        ("", False),
        ("1 other.service stop running", False),
        ("1 other.service stop running\n2 kpmd.service stop waiting", True),
        ("1 kpmd.service.d stop running", False),
        ("No jobs running.", False),
    ],
)
def test_what_the_job_is(systemctl: Systemctl, jobs: str, stopped: bool) -> None:
    systemctl(f"printf '%s' '{jobs}'")
    assert is_being_stopped() is stopped


def test_it_asks_for_its_own_unit_alone(systemctl: Systemctl, tmp_path: Path) -> None:
    systemctl(f'echo "$@" > {tmp_path}/asked')
    assert not is_being_stopped()
    assert (tmp_path / "asked").read_text().split()[-2:] == ["list-jobs", UNIT]


def test_a_systemctl_that_fails_tells_nothing(systemctl: Systemctl) -> None:
    systemctl("echo '1 kpmd.service stop running'; exit 1")
    assert not is_being_stopped()


def test_one_that_is_killed_tells_nothing(systemctl: Systemctl) -> None:
    systemctl("echo '1 kpmd.service stop running'; kill -9 $$")
    assert not is_being_stopped()


def test_one_that_is_not_there(systemctl: Systemctl) -> None:
    assert not is_being_stopped()


def test_one_that_cannot_be_run(systemctl: Systemctl, tmp_path: Path) -> None:
    (tmp_path / "systemctl").mkdir()
    assert not is_being_stopped()


@pytest.mark.parametrize("way", ["exec /bin/sleep 2", "/bin/sleep 2 & /bin/sleep 2"])
def test_one_that_hangs_is_cut(
    systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Whatever it has started, which may hold its output open."""
    monkeypatch.setattr(manager, "_PATIENCE", 0.1)
    systemctl(f"echo '1 kpmd.service stop running'; {way}")
    began = time.monotonic()
    assert not is_being_stopped()
    assert time.monotonic() - began < 1.5


def test_an_answer_that_is_no_text(systemctl: Systemctl) -> None:
    systemctl(r"printf '\377\376 kpmd.service stop'")
    assert isinstance(is_being_stopped(), bool)


def test_outside_of_a_unit_nobody_is_asked(
    systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(manager, "own_unit", lambda: None)
    systemctl(f"/bin/touch {tmp_path}/asked")
    assert not is_being_stopped()
    assert not os.path.exists(tmp_path / "asked")
