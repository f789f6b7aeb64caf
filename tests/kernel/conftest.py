"""What the kernel tests share: which kernel this is, what it must be able to do, and the daemon."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.rest import Rest

OBJECTS = Path(__file__).parents[1] / "objects"

#: What each kernel of the matrix must answer: a missing feature fails, it never skips.
EXPECTED = {"6.12": True, "7.3": True, "6.1": False, "5.10": False}

NOBODY = 65534


def _own_has(option: str) -> bool:
    """Whether this machine's kernel was built with it, by its own configuration."""
    release = os.uname().release
    for path in ("/proc/config.gz", f"/boot/config-{release}"):
        if os.path.exists(path):
            raw = Path(path).read_bytes()
            text = gzip.decompress(raw) if path.endswith(".gz") else raw
            return f"\n{option}=y\n".encode() in text
    pytest.exit("cannot read this kernel's configuration, so cannot tell what it should have", 3)


def kernel_name() -> str:
    name = os.environ.get("KPMD_TEST_KERNEL", "own")
    release = os.uname().release
    if name != "own" and not release.startswith(f"{name}.") and not release.startswith(f"{name}+"):
        pytest.exit(f"this is {release}, not the kernel {name} that was asked for", 3)
    return name


def expects_multi() -> bool:
    name = kernel_name()
    return _own_has("CONFIG_FPROBE") if name == "own" else EXPECTED[name]


def expects_kprobes() -> bool:
    """Whether functions can be attached to one by one: Debian's kernels all have it."""
    return kernel_name() != "own" or _own_has("CONFIG_KPROBE_EVENTS")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for other kernels. What a kernel must have is pinned in EXPECTED."""
    wrong = {
        "no_multi" if expects_multi() else "multi",
        "no_kprobes" if expects_kprobes() else "kprobes",
    }
    items[:] = [
        item for item in items if wrong.isdisjoint(mark.name for mark in item.iter_markers())
    ]


@pytest.fixture(scope="session")
def release() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.partition("-")[0].partition("+")[0])


class Daemon:
    """kpmd as a process of its own, as an administrator runs it."""

    def __init__(self, folder: Path, *options: str, under: Sequence[str] = ()) -> None:
        """``under``: a command, with its arguments, that starts the daemon."""
        self.socket = str(folder / "kpmd.sock")
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "kpmd", "--socket", self.socket, *options],
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        self._seen: list[dict[str, Any]] = []
        self.wait_for("listening")

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """Read the log until it tells of ``event``; the pytest timeout ends a wait in vain."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            record: dict[str, Any] = json.loads(line)
            self._seen.append(record)
            if record["event"] == event and fields.items() <= record.items():
                return record
        raise AssertionError(f"kpmd ended before it told of {event}: {self._seen[-5:]}")

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        self.process.terminate()
        _, rest = self.process.communicate()
        self._seen += [json.loads(line) for line in rest.splitlines()]
        bugs = [record for record in self._seen if record["level"] == "error"]
        assert not bugs, bugs
        return self.process.returncode


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    # Not pytest's tmp_path: other users must be able to reach the socket.
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        running = Daemon(folder, "--group", str(NOBODY))
        yield running
        assert running.stop() == 0
        assert list(folder.iterdir()) == []


@pytest.fixture
def rest(daemon: Daemon) -> Iterator[Rest]:
    """A connection as root; what the test leaves behind is removed."""
    connection = Rest(daemon.socket)
    yield connection
    for program in connection.items("/programs"):
        connection.ok("DELETE", f"/programs/{program['id']}?force=true")
    assert connection.items("/links") == []
    connection.close()


class Holder:
    """A client process of its own, as the user nobody."""

    def __init__(self, socket: str, requests: list[Any], user: int = NOBODY) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernel.holder", socket, json.dumps(requests)],
            stdout=subprocess.PIPE,
            user=user,
            group=user,
            extra_groups=[],
        )

    def answers(self) -> list[Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the client ended with {self.process.wait()}"
        answers: list[Any] = json.loads(line)
        return answers

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def holder(daemon: Daemon) -> Iterator[Callable[..., Holder]]:
    with ExitStack() as stack:

        def start(requests: list[Any], user: int = NOBODY) -> Holder:
            made = Holder(daemon.socket, requests, user)
            stack.callback(made.kill)
            return made

        yield start


def bpftool_links(name: str = "kprobe_multi", number: int = 8) -> list[dict[str, Any]]:
    """The kernel's own list of links of a type: kprobe multi, where none is given."""
    shown = subprocess.run(
        ["/usr/sbin/bpftool", "-j", "link", "list"], capture_output=True, check=True
    )
    listed: list[dict[str, Any]] = json.loads(shown.stdout or b"[]")
    # bpftool of Debian 12 knows newer types by their number (BPF_LINK_TYPE_KPROBE_MULTI, 8).
    return [link for link in listed if link.get("type") in (name, number)]


def kallsyms() -> dict[str, int]:
    """Function starts by name; of several of a name the first."""
    found: dict[str, int] = {}
    with open("/proc/kallsyms", encoding="ascii") as file:
        for line in file:
            address, kind, name = line.split()[:3]
            if kind in "tTwW":
                found.setdefault(name, int(address, 16))
    return found


@pytest.fixture(scope="session")
def addresses() -> dict[str, int]:
    return kallsyms()


@pytest.fixture(scope="session")
def traceable(release: tuple[int, int], addresses: dict[str, int]) -> list[tuple[int, str]]:
    """(address, name) of the kernel's own functions in tracefs's list, each name once.

    The addresses are those of the list, which has them from 6.5 on, else those of kallsyms.
    """
    found: dict[str, int] = {}
    twice: set[str] = set()
    listed = release >= (6, 5)
    path = "/sys/kernel/tracing/available_filter_functions"
    with open(path + ("_addrs" if listed else ""), encoding="ascii") as file:
        for line in file:
            address, name, *module = line.split() if listed else ("", *line.split())
            if module or (not listed and name not in addresses):
                continue
            if name in found:
                twice.add(name)
            found[name] = int(address, 16) if listed else addresses[name]
    return [(address, name) for name, address in found.items() if name not in twice]
