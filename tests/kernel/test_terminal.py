"""``kpmctl`` on terminals, in pipes and without either, on a real kernel, as nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.kernel.conftest import Daemon
from tests.kernel.rest import Rest
from tests.kernel.wire import NOBODY
from tests.kernel.witness import PATIENCE
from tests.terminal.screen import Terminal

pytestmark = [pytest.mark.once, pytest.mark.multi]

COLUMNS = 60
ENVIRONMENT = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LANG": "C.UTF-8"}


def command(daemon: Daemon, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "kpmd.kpmctl", "--socket", daemon.socket, *arguments]


def on_terminal(daemon: Daemon, *arguments: str) -> Terminal:
    return Terminal(
        command(daemon, *arguments), ENVIRONMENT, COLUMNS, patience=PATIENCE, user=NOBODY
    )


def read() -> None:
    """Have something to count, from now on until all have seen it."""
    with open("/proc/self/stat", "rb") as file:
        file.read()


def shown(terminal: Terminal, holds: Callable[[list[str]], bool]) -> list[str]:
    def read_on(lines: list[str]) -> bool:
        read()
        return holds(lines)

    return terminal.read_until(read_on)


def has(*texts: str) -> Callable[[list[str]], bool]:
    return lambda lines: all(any(text in line for line in lines) for text in texts)


def test_sixty_columns_and_an_end_by_keys(daemon: Daemon, rest: Rest) -> None:
    with on_terminal(daemon, "count", "vfs_*") as count:
        lines = shown(count, has("CALLS/s", "vfs_read"))
        assert max(len(line.rstrip()) for line in lines) <= COLUMNS
        assert len(rest.items("/links")) == 1
        count.child.sendintr()  # Ctrl-C
        assert count.end() == 0
        assert has("vfs_read")(count.screen.display)  # what was counted stays
    with on_terminal(daemon, "latency", "vfs_read") as latency:
        lines = shown(latency, has("p50", "█"))
        assert max(len(line.rstrip()) for line in lines) <= COLUMNS
        latency.child.sendintr()
        assert latency.end() == 0
        assert has("p99")(latency.screen.display)
    with on_terminal(daemon, "top", "vfs_*") as top:
        shown(top, has("CALLS/s▼", "vfs_read", "Quit"))
        top.child.send("q")
        assert top.end() == 0
    assert rest.items("/links") == []


def test_a_reader_that_has_seen_enough(daemon: Daemon, rest: Rest) -> None:
    script = (
        '"$@" count vfs_read --interval 0.1 | head -n 2; echo "${PIPESTATUS[0]}";'
        '"$@" --json trace vfs_read | head -n 1 | cut -c 1; echo "${PIPESTATUS[0]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command(daemon)],
        capture_output=True,
        text=True,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    assert done.stderr == ""
    heading, titles, status, brace, other = done.stdout.splitlines()
    assert heading.startswith("1 function attached, ")
    assert titles.split() == ["CALLS", "CALLS/s", "FUNCTION"]
    assert (status, brace, other) == ("0", "{", "0")
    assert rest.items("/links") == []


def test_without_a_terminal(daemon: Daemon, rest: Rest) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(daemon, *arguments), capture_output=True, text=True, env=ENVIRONMENT
        )

    counted = run("count", "vfs_read", "--duration", "0.2")
    assert (counted.returncode, counted.stderr) == (0, "")
    assert "vfs_read" in counted.stdout
    assert "\x1b" not in counted.stdout
    refused = run("top", "vfs_read")
    assert refused.returncode == 2
    assert "kpmctl count" in refused.stderr
    assert rest.items("/links") == []
