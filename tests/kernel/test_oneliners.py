"""``kpmctl``'s count, latency, trace and stacks, as nobody, against calls that are known."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.builtins import in_child, set_command
from tests.kernel.conftest import Daemon, kernel_name
from tests.kernel.wire import NOBODY
from tests.kernel.witness import Holdings

pytestmark = [
    pytest.mark.kprobes,
    pytest.mark.skipif(
        kernel_name() in ("7.3", "5.10"), reason="there is a session, or none, on 6.12 and 6.1 too"
    ),
]

#: The name of the thread whose calls are looked at, and how often it reads a file, so many bytes.
READER = "kpmd-reader"
READS, BYTES = 40, 64


class Kpmctl(subprocess.Popen[str]):
    """``kpmctl`` as the user nobody; its stderr is a terminal."""

    def __init__(self, daemon: Daemon, *arguments: str) -> None:
        self.master, terminal = pty.openpty()
        super().__init__(
            [sys.executable, "-m", "kpmd.kpmctl", "--socket", daemon.socket, *arguments],
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        )
        os.close(terminal)

    def wait_for(self, text: str) -> None:
        """Read on stderr until there is this text; of a line all, as it may come in pieces."""
        seen = ""
        while text not in seen:
            seen += os.read(self.master, 4096).decode()

    def wait_for_line(self) -> None:
        """Read a line of stdout."""
        assert self.stdout is not None
        assert self.stdout.readline()

    def interrupt(self) -> str:
        """End it as Ctrl-C does: the rest of what it wrote on stdout, and nothing on stderr."""
        self.send_signal(signal.SIGINT)
        assert self.stdout is not None
        out = self.stdout.read()
        self.wait(60)
        told = b""
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while more := os.read(self.master, 4096):
                told += more
        assert (self.returncode, told.decode()) == (0, "")
        return out

    def close(self) -> None:
        """Let nothing of it stay."""
        self.kill()
        self.wait()
        assert self.stdout is not None
        self.stdout.close()
        os.close(self.master)


@pytest.fixture
def kpmctl(daemon: Daemon) -> Iterator[Callable[..., Kpmctl]]:
    with contextlib.ExitStack() as last:

        def start(*arguments: str) -> Kpmctl:
            made = Kpmctl(daemon, *arguments)
            last.callback(made.close)
            return made

        yield start


def read() -> int:
    """Read a file in a process of that name, and then a directory, which cannot be. Its id."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "file"
        file.write_bytes(bytes(BYTES))
        opened = os.open(file, os.O_RDONLY)
        folder = os.open(name, os.O_RDONLY)

        def work() -> None:
            for _ in range(READS):
                os.pread(opened, BYTES, 0)
            with contextlib.suppress(IsADirectoryError):
                os.pread(folder, BYTES, 0)

        child = in_child(work, lambda: set_command(READER))
        os.close(opened)
        os.close(folder)
    return child


def test_each_tells_what_was_done(
    kpmctl: Callable[..., Kpmctl], exact: Callable[[], Holdings], addresses: dict[str, int]
) -> None:
    mine = ("vfs_read", "vfs_write", "--command", READER)
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        picture = Path(name) / "flame.svg"
        count = kpmctl("--json", "count", "--by-process", *mine, "--interval", "0.5")
        latency = kpmctl("--json", "latency", *mine, "--interval", "0.5")
        trace = kpmctl("trace", *mine)
        stacks = kpmctl("stacks", "--folded", "-", "--flame", str(picture), *mine)
        for each in (count, latency, trace):
            each.wait_for_line()
        for each in (trace, stacks):
            each.wait_for("2 functions attached, Ctrl-C ends it\r\n")
        pid = read()

        (counted,) = json.loads(count.interrupt().splitlines()[-1])["functions"]
        assert (counted["symbol"], counted["calls"]) == ("vfs_read", str(READS + 1))
        assert (counted["pid"], counted["uid"], counted["command"]) == (pid, os.getuid(), READER)
        assert int(counted["address"], 16) == addresses["vfs_read"]

        report = json.loads(latency.interrupt().splitlines()[-1])
        (timed,) = report["functions"]
        assert (timed["symbol"], timed["calls"]) == ("vfs_read", str(READS + 1))
        slots = [int(each) for each in timed["slots"]]
        assert sum(slots) == READS + 1
        assert 0 < int(timed["max_ns"]) <= int(timed["total_ns"])
        assert slots[int(timed["max_ns"]).bit_length() - 1] > 0
        assert report["lost"] == {}

        lines = [line for line in trace.interrupt().splitlines() if f"  {READER}[{pid}]  " in line]
        assert len(lines) == READS + 1
        number = r"(-?\d+|0x[0-9a-f]+)"
        call = rf"  vfs_read\({number}, {number}, {BYTES}\) = "
        assert all(re.search(rf"{call}{BYTES}$", line) for line in lines[:-1])
        assert re.search(rf"{call}-21 EISDIR$", lines[-1])

        folded = dict(line.rsplit(" ", 1) for line in stacks.interrupt().splitlines())
        assert sum(map(int, folded.values())) == READS + 1
        for path in folded:
            assert path.endswith(";vfs_read")
            assert "sys_pread64;" in path
            assert "do_syscall_64;" in path
        assert "sys_pread64" in picture.read_text()
    assert exact() == Holdings()


def test_a_pipe_that_is_closed_ends_it(
    kpmctl: Callable[..., Kpmctl], exact: Callable[[], Holdings]
) -> None:
    trace = kpmctl("trace", "vfs_read", "--command", READER)
    trace.wait_for("Ctrl-C ends it\r\n")
    assert trace.stdout is not None
    trace.stdout.close()
    read()
    assert trace.wait(60) == 0
    assert exact() == Holdings()
