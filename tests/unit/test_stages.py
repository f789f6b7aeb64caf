"""The stages of CI: all run, in their order, and the end tells how each went."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tools import stages

#: ``meet-one`` and ``meet-other`` end only where both run at once: each opens a pipe's other end.
MAKEFILE = """
ok:
\t@echo said by ok >> log
broken:
\t@echo said by broken >> log; exit 3
meet-one:
\t@echo > pipe; echo one >> log
meet-other:
\t@cat pipe; echo other >> log
"""


def run(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    (folder / "Makefile").write_text(MAKEFILE)
    done = subprocess.run(
        [sys.executable, stages.__file__, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stdout.splitlines()


def table(lines: list[str]) -> list[list[str]]:
    """The rows at the end, but for their times."""
    (start,) = (number for number, line in enumerate(lines) if line.startswith("=== stage"))
    return [[row.split()[0], *row.split()[3:]] for row in lines[start + 1 :] if "failed" not in row]


def test_what_fails_keeps_nothing_from_running(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "broken", "ok", "--", "broken", "--", "ok")
    assert status == 1
    assert lines[-1] == "failed: make broken broken"
    rows = [["broken", "FAILED", "(2)"], ["ok", "ok"], ["broken", "FAILED", "(2)"], ["ok", "ok"]]
    assert table(lines) == [*rows, ["all"]]
    assert (tmp_path / "log").read_text().count("said by") == 4


def test_two_at_a_time(tmp_path: Path) -> None:
    subprocess.run(["mkfifo", tmp_path / "pipe"], check=True)
    status, lines = run(tmp_path, "ok", "--", "meet-one", "meet-other")
    assert status == 0, lines
    assert (tmp_path / "log").read_text().startswith("said by ok\n")
