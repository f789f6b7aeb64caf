"""kpmd under a real systemd: its own units, installed as an administrator installs them.

All of this runs as root in a guest of its own (``python -m tests.vm run --systemd``): it makes
users, and writes to /etc and /usr.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import EXPECTED, bpftool_links
from tests.kernel.rest import Rest
from tests.systemd.control import Journal, Unit, run
from tests.vm.guest import HOSTNAME
from tests.vm.tree import needed_folders

PROJECT = Path(__file__).parents[2]
UNITS = PROJECT / "systemd"
INSTALLED = Path("/etc/systemd/system")
NAMES = ("kpmd.service", "kpmd.socket")
SYSUSERS = Path("/usr/lib/sysusers.d/kpmd.conf")
TMPFILES = Path("/usr/lib/tmpfiles.d/kpmd.conf")
SHIPPED_POLICY = Path("/usr/share/kpmd/policy.toml")
SOCKET = "/run/kpmd.sock"

#: Users that the tests make, and their groups.
USERS = {"inside": "kpmd", "admin": "kpmd,kpmd-admin", "outside": ""}

#: Folders of which kpmd.service shows kpmd nothing, or an empty one of its own.
_HIDDEN_BY_UNIT = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")


def pytest_configure() -> None:
    if not Path("/run/systemd/system").is_dir() or os.uname().nodename != HOSTNAME:
        pytest.exit("these tests change the system: run them by `make test-systemd`", 3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is for other kernels: those without kprobe multi have tests of their own."""
    release = os.uname().release
    has_multi = next(has for name, has in EXPECTED.items() if release.startswith(f"{name}."))
    items[:] = [item for item in items if has_multi != bool(item.get_closest_marker("no_multi"))]


class Kpmd:
    """The installed service and its socket, and what the service has logged in this test."""

    def __init__(self) -> None:
        self.service = Unit("kpmd.service")
        self.socket = Unit("kpmd.socket")
        self.journal = Journal(self.service)
        #: Events of the level "error" that the test brings about; any other fails it.
        self.expected: set[str] = set()


class Client(Rest):
    """A process of another user; what it asks for is asked for in its name, as with Rest."""

    def __init__(self, user: str) -> None:
        super().__init__(SOCKET)
        entry = pwd.getpwnam(user)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.systemd.client", SOCKET],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            user=entry.pw_uid,
            group=entry.pw_gid,
            extra_groups=os.getgrouplist(user, entry.pw_gid),
        )

    def __call__(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Make a request. Raises OSError where it may not connect."""
        what, *answer = self._do("request", method, path, body)
        if what == "refused":
            raise OSError(answer[0], os.strerror(answer[0]))
        return answer[0], answer[1]

    def call_getpid(self, times: int) -> None:
        self._do("getpid", times)

    def _do(self, *order: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the client ended with {self.process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        """End the process, and wait for it."""
        self.process.communicate()


def kernel_programs() -> list[dict[str, Any]]:
    """Those of kpmd's type, by the kernel's own list: systemd has programs too."""
    listed: list[dict[str, Any]] = json.loads(run("/usr/sbin/bpftool", "-j", "prog", "list"))
    return [program for program in listed if program["type"] == "kprobe"]


def install() -> None:
    """All that lies in systemd/, as it is, and the policy, as a package does."""
    for name in NAMES:
        shutil.copy(UNITS / name, INSTALLED / name)
    shutil.copy(UNITS / "kpmd.sysusers", SYSUSERS)
    run("systemd-sysusers", str(SYSUSERS))
    SHIPPED_POLICY.parent.mkdir(exist_ok=True)
    shutil.copy(PROJECT / "deploy" / "policy.toml", SHIPPED_POLICY)
    shutil.copy(UNITS / "kpmd.tmpfiles", TMPFILES)
    run("systemd-tmpfiles", "--create", str(TMPFILES))
    needed = sorted(set(needed_folders(PROJECT)))
    hidden = [folder for folder in needed if f"{folder}/".startswith(_HIDDEN_BY_UNIT)]
    if hidden:
        # An installed kpmd has its Python in /usr. Where the project, or its Python, lies in a
        # home, ProtectHome=yes would hide it: hide the rest of the homes alone.
        binds = "".join(f"BindReadOnlyPaths={folder}\n" for folder in hidden)
        for unit in ("kpmd.service", "kpmd-metrics.service"):
            _drop_in(unit, f"[Service]\nProtectHome=tmpfs\n{binds}")


def _drop_in(unit: str, text: str) -> None:
    folder = INSTALLED / f"{unit}.d"
    folder.mkdir(exist_ok=True)
    (folder / "administrator.conf").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def installed() -> None:
    """The programs, the units, the groups; a user in kpmd's, an administrator, and one of neither.

    They stay until the guest ends: in a shell there, the tests may be run again and again.
    """
    for name in ("kpmd", "kpmctl"):
        program = Path("/usr/bin", name)
        program.unlink(missing_ok=True)
        program.symlink_to(PROJECT / ".venv" / "bin" / name)
    install()
    users = {entry.pw_name for entry in pwd.getpwall()}
    for name, groups in USERS.items():
        if name not in users:
            run("useradd", "--no-create-home", "--groups", groups, name)
    run("systemctl", "daemon-reload")


def under_systemd() -> Iterator[Kpmd]:
    """The socket listens, the service does not run. Stopped afterwards, with nothing left."""
    made = Kpmd()
    made.socket.start()
    # Also the counts of starts: tests start kpmd more often than StartLimitBurst= allows.
    run("systemctl", "reset-failed", made.service.name, made.socket.name)
    yield made
    made.socket.stop()
    assert made.service.main_pid == 0
    made.service.remove_drop_ins()
    made.socket.remove_drop_ins()
    assert bpftool_links() == []
    assert kernel_programs() == []
    errors = [record for record in made.journal.records() if record["level"] == "error"]
    assert [record for record in errors if record["event"] not in made.expected] == []


@pytest.fixture
def kpmd(installed: None) -> Iterator[Kpmd]:
    """A service of the test's own: the socket listens, the service does not run."""
    yield from under_systemd()


@pytest.fixture
def rest(kpmd: Kpmd) -> Iterator[Rest]:
    """A connection as root, made (and kpmd started) by the first request."""
    connection = Rest(SOCKET)
    yield connection
    connection.close()


@pytest.fixture
def client(kpmd: Kpmd) -> Iterator[Callable[[str], Client]]:
    """Starts a process of a user, who has not connected yet."""
    with ExitStack() as stack:

        def start(user: str) -> Client:
            made = Client(user)
            stack.callback(made.close)
            return made

        yield start
