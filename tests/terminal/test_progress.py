"""What ``kpmctl`` tells of long work on a terminal: over the fake daemon, and in words."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kpmd.client.client import Client
from kpmd.kpmctl.progress import sentence
from tests.unit.test_client import ELF, ROOT, http, problem, running_daemon, scripted
from tests.unit.test_kpmctl import KPMCTL, Terminal, environment

ERASE = "\r\x1b[K"


class Stops:
    """Where a call of the fake daemon's kernel is held up, each time until it is let go."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)
        self._held: socket.socket | None = None

    def wait(self) -> None:
        """Until the kernel is in the next call."""
        self._held, _ = self._listener.accept()

    def let(self) -> None:
        """Let that one go."""
        assert self._held is not None
        self._held.close()

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def held_up(call: str, path: Path) -> Iterator[tuple[str, Stops]]:
    """A daemon whose kernel is held up in each such call: its socket, and what holds it."""
    stops = Stops(path / "stops")
    try:
        with running_daemon(call, str(path / "stops")) as (socket_, _):
            yield socket_, stops
    finally:
        stops.close()


def at_rest(terminal: Terminal) -> str:
    """Everything that a command wrote, which must have left no line behind."""
    text = terminal.end()
    assert terminal.process.wait(20) == 0, text
    progress, erased, rest = text.rpartition(ERASE)
    assert erased
    assert ERASE not in progress
    assert "\n" not in progress
    return rest


def test_a_load_tells_what_the_verifier_is_at(tmp_path: Path) -> None:
    (tmp_path / "p.o").write_bytes(ELF)
    with held_up("progress", tmp_path) as (daemon, stops):
        arguments = ["load", str(tmp_path / "p.o"), "--program", "count", "--program", "other"]
        terminal = Terminal(daemon, arguments, 80, 20)
        stops.wait()
        terminal.read_until("verifying count (1 of 2), ")
        stops.let()
        stops.wait()
        terminal.read_until("verifying other (2 of 2), ")
        stops.let()
        rest = at_rest(terminal)
    assert "verifying" not in rest
    assert "Persistent: loaded until" in rest


def test_detaching_in_a_narrow_terminal(tmp_path: Path) -> None:
    with held_up("close_link", tmp_path) as (daemon, stops):
        with Client(daemon) as client:
            loaded = client.load_object(ELF, lifetime="persistent")
            program = loaded["programs"][0]["id"]
            for _ in range(2):
                client.attach(program, symbols=["vfs_read"], lifetime="persistent")
        terminal = Terminal(daemon, ["detach", "--force", program], 20, 20)
        stops.wait()
        # One column is left free, or the terminal would go on to the next line.
        terminal.read_until("detaching 2 links, ")
        stops.let()
        stops.wait()
        terminal.read_until("detaching from 1 fu\x1b[K")
        stops.let()
        assert at_rest(terminal) == ""


def test_ctrl_c_leaves_no_line(tmp_path: Path) -> None:
    with held_up("create_link", tmp_path) as (daemon, stops):
        with Client(daemon) as client:
            made = client.load_object(ELF, programs=["count"], lifetime="persistent")
        program = made["programs"][0]["id"]
        terminal = Terminal(daemon, ["attach", program, "vfs_read", "vfs_open"], 80, 20)
        stops.wait()
        terminal.read_until("attaching to 2 functions, ")
        os.write(terminal.master, b"\x03")
        text = terminal.end()
        assert terminal.process.wait(20) == 130
        stops.let()
    assert text.endswith(ERASE)


def test_an_error_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    with held_up("close_link", tmp_path) as (daemon, stops):
        with Client(daemon) as client:
            made = client.load_object(ELF, programs=["count"], lifetime="persistent")
            program = made["programs"][0]["id"]
            link = client.attach(program, symbols=["vfs_read"], lifetime="persistent")
        terminal = Terminal(daemon, ["detach", link["id"], "lnk-000000000000000000000000"], 80, 20)
        stops.wait()
        terminal.read_until("detaching from 1 function, ")
        stops.let()
        text = terminal.end()
    assert terminal.process.wait(20) == 5
    assert re.search(r"\r\x1b\[Kkpmctl: [^\r]+\r\n$", text), text


def test_an_older_daemon_shows_the_time_alone() -> None:
    seen: list[str] = []
    answer = threading.Event()

    def script(method: str, target: str, body: Any) -> bytes | None:
        seen.append(target)
        if target.startswith("/work"):
            return problem("not-found", 404)
        assert answer.wait(20)
        return http({"programs": [], "maps": []}, 201)

    with scripted(script) as server:
        terminal = Terminal(server.path, ["load", "--builtin", "count"], 80, 20)
        # It goes on, and asks no more.
        while terminal.seen.count("loading, ") < 3:
            terminal.seen += os.read(terminal.master, 65536).decode()
        answer.set()
        rest = at_rest(terminal)
    assert [each.partition("?")[0] for each in seen] == ["/programs", "/work"]
    assert "Persistent" in rest


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_nothing_is_shown_where_there_is_no_terminal(tmp_path: Path, term: str) -> None:
    """Or a dumb one; what is written to stdout is the same."""
    with held_up("load_object", tmp_path) as (daemon, stops):
        ours, theirs = os.openpty() if term == "dumb" else os.pipe()
        process = subprocess.Popen(
            [*KPMCTL, "--json", "load", "--builtin", "count"],
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=ROOT,
            env=environment(daemon, TERM=term),
        )
        os.close(theirs)
        stops.wait()
        with Client(daemon) as client:
            assert client.call("GET", "/work")["items"][0]["phase"] == "parsing"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.8)
        stops.let()
        out, _ = process.communicate(timeout=20)
        assert out.startswith(b'{"programs": [')
        with contextlib.suppress(OSError):  # EIO: the terminal's other side is closed
            assert os.read(ours, 100) == b""
        os.close(ours)


def item(phase: str, done: int | None = None, total: int | None = None, **more: str) -> Any:
    return {"what": "attach", "phase": phase, "done": done, "total": total, **more}


@pytest.mark.parametrize(
    ("work", "told"),
    [
        ([], "attaching"),
        ([item("queued")], "waiting for its turn"),
        ([item("parsing")], "reading the program"),
        ([item("verifying", 0, None, name="p")], "verifying p"),
        ([item("verifying", 0, 1, name="p")], "verifying p"),
        ([item("verifying", 3, 9, name="p")], "verifying p (4 of 9)"),
        ([item("resolving")], "finding the functions"),
        ([item("attaching", 128, 512)], "attaching: 128 of 512 functions"),
        ([item("attaching", 0, 1)], "attaching: 0 of 1 function"),
        ([item("attaching", None, 51234)], "attaching to 51234 functions"),
        ([item("attaching")], "attaching"),
        ([item("detaching", 7, 90)], "detaching: 7 of 90 functions"),
        ([item("detaching", None, 90)], "detaching from 90 functions"),
        ([item("dreaming", 1, 2)], "dreaming"),
        ([item("attaching", 2, 2), item("resolving")], "finding the functions"),
    ],
)
def test_in_words(work: list[Any], told: str) -> None:
    assert sentence("attach", work) == told


def test_several_links_at_once() -> None:
    assert sentence("detach", [item("queued"), item("detaching", 1, 2)]) == "detaching 2 links"
