"""kpmctl metrics: the daemon's numbers, on a terminal and in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_client import running_daemon
from tests.unit.test_kpmctl import good, run


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


def test_they_are_written_as_they_come(daemon: str) -> None:
    text = good(daemon, "metrics")
    assert text.startswith("# HELP kpmd_build_info ")
    assert '\nkpmd_links{kind="kprobe",mechanism="kprobe_multi"} 0.0\n' in text


def test_a_file_is_always_whole(daemon: str, tmp_path: Path) -> None:
    path = tmp_path / "kpmd.prom"
    path.write_text("old\n")
    with path.open() as reader:
        assert good(daemon, "metrics", "--output", str(path)) == ""
        assert reader.read() == "old\n"
    assert "\nkpmd_build_info{" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["kpmd.prom"]


def test_a_file_that_cannot_be_written(daemon: str, tmp_path: Path) -> None:
    done = run(daemon, "metrics", "--output", str(tmp_path / "no" / "kpmd.prom"))
    assert done.exit_code == 1
    assert "No such file or directory" in done.stderr
    (tmp_path / "folder").mkdir()
    assert run(daemon, "metrics", "--output", str(tmp_path / "folder")).exit_code == 2


def test_without_a_daemon_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "kpmd.prom"
    path.write_text("old\n")
    done = run(str(tmp_path / "none.sock"), "metrics", "--output", str(path))
    assert done.exit_code == 3
    assert path.read_text() == "old\n"
