"""The Debian package's life: installed, used, upgraded, rolled back, removed, purged.

One story: each test goes on where the one before ended. docs/how-to/install.md tells it.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.rest import Rest
from tests.packages.later import LATER
from tests.systemd.control import Unit, run

PROJECT = Path(__file__).parents[2]
BUILT = PROJECT / "build" / "deb"
SOCKET = "/run/kpmd.sock"
POLICY = Path("/etc/kpmd/policy.toml")
GETPID = "__x64_sys_getpid"
#: A PATH without the project's own kpmd.
SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"
PERSISTENT = {"kind": "persistent"}
#: Where installing anything, or making a user, leaves something: a log, and lists as they were.
OTHERS = {"/var/log/dpkg.log"} | {
    f"/etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
}


@dataclass
class Story:
    """What later tests take from earlier ones."""

    service: Unit = field(default_factory=lambda: Unit("kpmd.service"))
    socket: Unit = field(default_factory=lambda: Unit("kpmd.socket"))
    #: All files of the machine before the package came.
    before: set[str] = field(default_factory=set)
    program: dict[str, Any] = field(default_factory=dict)
    link: dict[str, Any] = field(default_factory=dict)
    counted: int = 0


@pytest.fixture(scope="module")
def story() -> Story:
    # The guest was made without manual pages; what is installed from here on has its own.
    Path("/etc/dpkg/dpkg.cfg.d/99mmdebstrap").unlink(missing_ok=True)
    # Kernels without kprobe multi: as the documentation says, for Debian's default is 3.
    run("sysctl", "-w", "kernel.perf_event_paranoid=2")
    return Story(before=files())


@pytest.fixture
def rest() -> Iterator[Rest]:
    connection = Rest(SOCKET)
    yield connection
    connection.close()


def files() -> set[str]:
    """The guest's own files and folders, but for the package manager's books and the journal."""
    pruned = [f"-path {each} -prune -o" for each in ("/var/lib/dpkg", "/var/log/journal", "/tmp")]
    return set(run("find", "/", "-xdev", *" ".join(pruned).split(), "-print").splitlines())


def package(name: str) -> str:
    (found,) = BUILT.glob(name)
    return str(found)


def dpkg(*arguments: str) -> str:
    """What it said, also on standard error; it must succeed."""
    done = subprocess.run(
        ["dpkg", *arguments],
        stdin=subprocess.DEVNULL,  # nobody is there to be asked anything
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PATH": SYSTEM},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def as_user(name: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["runuser", "-u", name, "--", *command], capture_output=True, text=True, check=False
    )


def kernel_links() -> set[int]:
    """By the kernel's own list."""
    return {each["id"] for each in json.loads(run("/usr/sbin/bpftool", "-j", "link") or "[]")}


def counts(rest: Rest, program: dict[str, Any]) -> int:
    """The calls of all functions that it counts."""
    maps = {rest.ok("GET", f"/maps/{each}")["name"]: each for each in program["maps"]}
    entries = rest.items(f"/maps/{maps['counts']}/entries")
    return sum(
        int.from_bytes(bytes.fromhex(cpu), "little") for entry in entries for cpu in entry["value"]
    )


def still_counts(rest: Rest, story: Story) -> None:
    """The link is the same, was attached all the while, and goes on."""
    (link,) = rest.items("/links")
    assert (link["id"], link["kernel_id"]) == (story.link["id"], story.link["kernel_id"])
    assert story.link["kernel_id"] in kernel_links()
    before = counts(rest, story.program)
    assert before >= story.counted
    for _ in range(10):
        os.getpid()
    story.counted = counts(rest, story.program)
    assert story.counted >= before + 10


def test_installed_it_runs(story: Story) -> None:
    said = dpkg("--install", package("kpmd_*_amd64.deb"))
    assert "good" not in said, "the configuration that it ships is"
    for unit in (story.socket, story.service):
        assert (unit.active, unit.show("UnitFileState")) == ("active", "enabled")
    assert list(Path("/usr/lib/kpmd/kpmd/__pycache__").glob("__main__.*.pyc"))


def test_users_and_groups(story: Story) -> None:
    daemon = pwd.getpwnam("kpmd-daemon")
    groups = {grp.getgrnam(name).gr_gid for name in ("kpmd", "kpmd-admin")}
    assert groups.isdisjoint(os.getgrouplist(daemon.pw_name, daemon.pw_gid))
    owner = Path(SOCKET).stat()
    assert (owner.st_gid, owner.st_mode & 0o777) == (grp.getgrnam("kpmd").gr_gid, 0o660)


def test_manual_and_completions_are_found() -> None:
    for page in ("man1/kpmctl.1", "man1/kpmctl-count.1", "man8/kpmd.8"):
        assert Path(f"/usr/share/man/{page}.gz").is_file()
    for place in (
        "bash-completion/completions/kpmctl",
        "zsh/vendor-completions/_kpmctl",
        "fish/vendor_completions.d/kpmctl.fish",
    ):
        assert "kpmctl" in Path("/usr/share", place).read_text()


def test_neither_gets_in_the_others_way(tmp_path: Path) -> None:
    """A user's environment has no say in kpmd, and other programs do not see its packages."""
    for name in ("sitecustomize", "kpmd", "argparse", "importlib"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("not the package\'s")')
    home = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": str(tmp_path / "kpmd.py")}
    for program in ("/usr/bin/kpmd", "/usr/bin/kpmctl"):
        run("env", *(f"{name}={value}" for name, value in home.items()), program, "--version")
    names = ("kpmd", "aiohttp", "click", "google")
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert run("/usr/bin/python3", "-I", "-c", code) == "[]\n"


def test_a_member_of_the_group_counts_and_nobody_else(story: Story) -> None:
    run("useradd", "--no-create-home", "--groups", "kpmd", "alice")
    run("useradd", "--no-create-home", "bob")
    count = ("/usr/bin/kpmctl", "--json", "count", "vfs_read", "--duration", "1")
    done = as_user("alice", *count)
    assert done.returncode == 0, done.stderr
    assert "vfs_read" in done.stdout
    assert as_user("bob", *count).returncode != 0


def test_a_persistent_link_counts(story: Story, rest: Rest) -> None:
    source = {"kind": "builtin", "builtin": "count"}
    loaded = rest.ok("POST", "/programs", {"source": source, "lifetime": PERSISTENT})
    story.program = loaded["programs"][0]
    what = {"program": story.program["id"], "kind": "kprobe", "symbols": [GETPID]}
    story.link = rest.ok("POST", "/links", {**what, "lifetime": PERSISTENT})
    still_counts(rest, story)


def test_upgraded_it_goes_on_counting(story: Story) -> None:
    edited = POLICY.read_text() + '\n[[rules]]\nname = "mine"\nusers = ["alice"]\n'
    POLICY.write_text(edited)
    pid, listens = story.service.main_pid, story.socket.show("ActiveEnterTimestampMonotonic")
    dpkg("--install", package("later/*.deb"))
    assert story.service.active == "active"
    assert story.service.main_pid not in (0, pid)
    assert run("/usr/bin/kpmctl", "--version") == f"kpmctl, version {LATER}\n"
    # Nobody who connected meanwhile was refused, nor was an administrator's change lost.
    assert story.socket.show("ActiveEnterTimestampMonotonic") == listens
    assert POLICY.read_text() == edited
    rest = Rest(SOCKET)
    still_counts(rest, story)
    rest.close()


def test_rolled_back_with_a_policy_that_is_no_good(story: Story) -> None:
    good = POLICY.read_text()
    POLICY.write_text(good + "[future]\n")
    pid = story.service.main_pid
    said = dpkg("--install", package("kpmd_*_amd64.deb"))
    # A service that does not start would have lost its links.
    assert "kpmd.service was not started anew" in said
    assert "future" in said
    assert story.service.main_pid == pid
    POLICY.write_text(good)
    story.service.restart()
    rest = Rest(SOCKET)
    still_counts(rest, story)
    rest.close()


def test_removed_it_leaves_what_is_the_administrators(story: Story) -> None:
    dpkg("--remove", "kpmd")
    assert story.link["kernel_id"] not in kernel_links()
    for unit in (story.socket, story.service):
        assert (unit.active, unit.show("LoadState")) == ("inactive", "not-found")
    left = {path for path in files() - story.before if not path.startswith("/etc/systemd/")}
    assert {"/etc/kpmd/policy.toml", "/etc/kpmd/kpmd.toml"} <= left
    assert not Path(SOCKET).exists()


def test_purged_it_leaves_nothing(story: Story) -> None:
    dpkg("--purge", "kpmd")
    assert files() - story.before - OTHERS == set()
    assert pwd.getpwnam("kpmd-daemon")
