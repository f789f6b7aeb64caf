"""``kpmctl count``: by process, its filters, and how soon the first table comes."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import click
import pytest

from kpmd.kpmctl import failures, filters
from kpmd.kpmctl.live import watch
from kpmd.kpmctl.stopping import Stop
from tests.unit.oneliners import FakeBuiltin, u64
from tests.unit.test_client import http, problem, scripted
from tests.unit.test_kpmctl import Terminal, good, plain, run

PROGRAM = {"count": "kprobe_multi"}


def caller(function: int, pid: int, uid: int, command: bytes) -> str:
    return struct.pack("=QII16s", function, pid, uid, command).hex()


def by_process() -> FakeBuiltin:
    counted = [
        {"key": caller(0x1000, 7, 1000, b"cat"), "value": [u64(5), u64(6)]},
        {"key": caller(0x1000, 8, 0, b"a\x1b\xff"), "value": [u64(0), u64(40)]},
        {"key": caller(0x2000, 7, 1000, b"cat"), "value": [u64(1), u64(0)]},
    ]
    return FakeBuiltin(PROGRAM, {"counts": [], "counts_by_process": counted})


def test_by_process() -> None:
    script = by_process()
    with scripted(script) as server:
        text = good(server.path, "count", "f", "--by-process", "--duration", "0")
        line = good(server.path, "--json", "count", "f", "--by-process", "--duration", "0")
    source = script.loads[0]["source"]
    assert source["globals"] == {"by_process": 1}
    assert source["max_entries"] == {"counts": 1, "counts_by_process": 16384}
    titles, *rows = text.splitlines()[1:]
    assert titles.split() == ["CALLS", "CALLS/s", "PID", "COMMAND", "FUNCTION"]
    cells = [row.split() for row in rows]
    assert [[each[0], *each[2:]] for each in cells] == [
        ["40", "8", "a\\x1b\\xff", "vfs_read"],
        ["11", "7", "cat", "vfs_read"],
        ["1", "7", "cat", "nf_hook", "[nf_tables]"],
    ]
    first = json.loads(line)["functions"][1]
    assert (first["pid"], first["uid"], first["command"]) == (7, 1000, "cat")


def test_by_process_on_a_narrow_terminal() -> None:
    with scripted(by_process()) as server:
        asked = ["count", "f", "--by-process", "--interval", ".1", "--duration", ".25"]
        terminal = Terminal(server.path, asked, 60, 12)
        text = plain(terminal.end())
        assert terminal.process.wait(20) == 0
    assert max(len(line) for line in text.splitlines()) <= 60


def test_filters(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").touch()
    script = FakeBuiltin(PROGRAM, {"counts": []})
    with scripted(script) as server:
        asked = ["count", "f", "--duration", "0", "--uid", "root", "--cgroup", str(tmp_path)]
        good(server.path, *asked)
        good(server.path, *asked, "--cgroup-alone", "--uid", "7")
    inode = os.stat(tmp_path).st_ino
    assert [each["source"]["globals"] for each in script.loads] == [
        {"target_uid": 0, "target_cgroup_tree": inode},
        {"target_uid": 7, "target_cgroup": inode},
    ]


def test_what_filters_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert filters.uid_of("0") == filters.uid_of("root") == 0
    assert filters.command_of("cat") == b"cat".ljust(16, b"\0")
    assert filters.command_of("ä" * 7) == ("ä" * 7).encode().ljust(16, b"\0")
    with pytest.raises(click.BadParameter, match="'a-name-that-is-'"):
        filters.command_of("a-name-that-is-too-long")
    assert filters.cgroup_of("4711") == 4711
    # As /proc/PID/cgroup and systemd tell it.
    monkeypatch.setattr(filters, "_CGROUPS", str(tmp_path))
    below = tmp_path / "system.slice" / "a.service"
    below.mkdir(parents=True)
    with pytest.raises(click.BadParameter, match="version 2"):
        filters.cgroup_of("/system.slice/a.service")
    (below / "cgroup.controllers").touch()
    for text in ("/system.slice/a.service", "system.slice/a.service", str(below)):
        assert filters.cgroup_of(text) == below.stat().st_ino
    times = {"100ns": 100, "20us": 20_000, "1.5ms": 1_500_000, ".5 s": 500_000_000, "3µs": 3000}
    assert {text: filters.duration(text) for text in times} == times


def test_an_old_kernel_cannot_look_below_a_cgroup() -> None:
    errors = [{"loc": ["target_cgroup_tree"], "msg": "no global variable of this name"}]
    with scripted(lambda *_: problem("invalid", 422, errors=errors)) as server:
        done = run(server.path, "count", "f", "--cgroup", "5")
    assert done.exit_code == failures.NOT_SUPPORTED
    assert "--cgroup-alone" in done.stderr


def test_no_program_of_that_name() -> None:
    with scripted(lambda *_: http({"programs": [], "maps": []}, 201)) as server:
        done = run(server.path, "count", "f")
    assert done.exit_code == failures.OTHER
    assert "has no program" in done.stderr


# When reports are made


class Times:
    """Reports that are empty until so many were made, and when those that were shown came."""

    def __init__(self, empty: int) -> None:
        self.made = 0
        self.empty = empty
        self.shown: list[tuple[float, int]] = []
        self.begin = time.monotonic()

    def report(self) -> int:
        self.made += 1
        return self.made

    def update(self, report: int) -> None:
        self.shown.append((time.monotonic() - self.begin, report))

    def watch(self, interval: float, duration: float) -> None:
        with Stop() as stop:
            watch(stop, interval, duration, self.report, self.update, lambda n: n <= self.empty)


def test_the_first_report_comes_before_an_interval_is_over() -> None:
    times = Times(0)
    times.watch(5, 0.3)
    ((when, _),) = times.shown
    assert 0.2 <= when < 0.3


def test_what_is_empty_is_not_shown_before_an_interval_is_over() -> None:
    times = Times(2)
    times.watch(5, 0.7)
    assert [report for _, report in times.shown] == [3]
    times = Times(99)
    times.watch(0.1, 0.15)
    assert [report for _, report in times.shown] == [1]
