"""What the kernel tests share: which kernel this is, what it must be able to do, and the daemon."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.policies import EVERYTHING
from tests.kernel.rest import Rest
from tests.kernel.wire import NOBODY, Forked, Tell
from tests.kernel.witness import (
    PATIENCE,
    Holdings,
    eventually,
    in_api,
    in_kernel,
    kprobes,
    kprobes_in_api,
)

OBJECTS = Path(__file__).parents[1] / "objects"

#: What each kernel of the matrix must answer: a missing feature fails, it never skips.
EXPECTED = {"6.12": True, "7.3": True, "6.1": False, "5.10": False}
#: Where tests run that are of kpmd more than of the kernel.
MAIN = "6.12"


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
    if kernel_name() != MAIN:
        wrong.add("once")
    items[:] = [
        item for item in items if wrong.isdisjoint(mark.name for mark in item.iter_markers())
    ]


@pytest.fixture(scope="session")
def release() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.partition("-")[0].partition("+")[0])


class Daemon:
    """kpmd as a process of its own, as an administrator runs it.

    A thread reads its log all the time: a pipe that nobody empties would stop the daemon.
    """

    def __init__(self, folder: Path, *options: str, under: Sequence[str] = ()) -> None:
        """``under``: a command, with its arguments, that starts the daemon.

        Everybody may do everything, unless the options name a policy.
        """
        self.socket = str(folder / "kpmd.sock")
        self._policy = tempfile.NamedTemporaryFile("w", prefix="kpmd-policy-")  # noqa: SIM115
        self._policy.write(EVERYTHING)
        self._policy.flush()
        os.chmod(self._policy.name, 0o644)
        named = [] if "--policy" in options else ["--policy", self._policy.name]
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "kpmd", "--socket", self.socket, *named, *options],
            stderr=subprocess.PIPE,
        )
        self._told: list[dict[str, Any]] = []
        self._read = 0
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()
        self.wait_for("listening")

    @property
    def pid(self) -> int:
        """The daemon's own process, whatever command started it."""
        return self.process.pid

    def _follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self._told.append(json.loads(line))
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait_for(self, event: str, **fields: object) -> dict[str, Any]:
        """Read the log on until it tells of ``event``; what it told last, where it never does."""
        deadline = time.monotonic() + PATIENCE
        began = self._read
        while True:
            with self._more:
                left = max(0.0, deadline - time.monotonic())
                self._more.wait_for(lambda: self._ended or self._read < len(self._told), left)
                if self._read == len(self._told):
                    break
                record = self._told[self._read]
                self._read += 1
            if record["event"] == event and fields.items() <= record.items():
                return record
        raise AssertionError(f"kpmd did not tell of {event} {fields}: {self._told[began:][-20:]}")

    def mark(self) -> None:
        """Let ``wait_for`` look only at what is told from now on."""
        with self._more:
            self._read = len(self._told)

    def bugs(self) -> list[dict[str, Any]]:
        """What the daemon told so far that must never happen."""
        with self._more:
            return [record for record in self._told if record["level"] == "error"]

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal that ends it; its exit status."""
        os.kill(self.pid, number)
        status = self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._policy.close()
        return status

    def stop(self) -> int:
        status = self.end()
        assert not self.bugs(), self.bugs()
        return status


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

    def __init__(
        self, socket: str, requests: list[Any], user: int = NOBODY, under: Sequence[str] = ()
    ) -> None:
        """``under``: a command, with its arguments, that starts the client."""
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "tests.kernel.holder", socket, json.dumps(requests)],
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


@pytest.fixture
def fork() -> Iterator[Callable[..., Forked]]:
    """Clients that are forked; those that the test leaves alive are killed."""
    with ExitStack() as stack:

        def start(work: Callable[[Tell], None], user: int = NOBODY) -> Forked:
            made = Forked(work, user)
            stack.callback(made.kill)
            return made

        yield start


@pytest.fixture(scope="session")
def warm(daemon: Daemon) -> None:
    """What the daemon opens only once is open: so its file descriptors can be counted."""
    rest = Rest(daemon.socket)
    body = {"source": {"kind": "builtin", "builtin": "count"}}
    program = rest.ok("POST", "/programs", body)["programs"][0]["id"]
    rest.ok("POST", "/links", {"program": program, "kind": "kprobe", "symbols": ["vprintk"]})
    rest.ok("DELETE", f"/programs/{program}?force=true")
    rest.close()


@pytest.fixture
def exact(daemon: Daemon, warm: None, rest: Rest) -> Iterator[Callable[[], Holdings]]:
    """Whether the kernel has just what the API lists; and in the end nothing, nor has the daemon.

    The function that the test gets waits until it is so, and returns what there is then.
    """
    others = in_kernel() - in_api(rest)

    def check() -> Holdings:
        listed = Holdings()

        def same() -> bool:
            nonlocal listed
            listed = in_api(rest)
            return in_kernel() - others == listed and len(kprobes()) == kprobes_in_api(rest)

        eventually(same, True)
        return listed

    own = os.getpid()
    eventually(lambda: [each["pid"] for each in rest.items("/clients")], [own])
    before = daemon.fds()
    daemon.mark()
    yield check
    eventually(lambda: in_api(rest), Holdings())
    eventually(in_kernel, others)
    assert kprobes() == []
    assert rest.items("/leases") == []
    eventually(lambda: [each["pid"] for each in rest.items("/clients")], [own])
    eventually(daemon.fds, before)
    assert daemon.bugs() == []


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
