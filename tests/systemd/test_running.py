"""What can be seen of one daemon that runs. Starting one takes its time: these tests share it."""

from __future__ import annotations

import base64
import os
import pwd
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import OBJECTS, bpftool_links, kallsyms
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID
from tests.kernel.test_service import COUNT, counts
from tests.systemd.conftest import PROJECT, SOCKET, Client, Kpmd, under_systemd
from tests.systemd.control import run
from tests.systemd.test_audit import found
from tests.systemd.test_not_root import (
    CAPABILITIES,
    USER,
    capabilities,
    mask,
    module,
    processes,
    status_of,
)
from tests.systemd.test_restart import PERSISTENT, make
from tests.systemd.test_units import count_getpid


@pytest.fixture(scope="module")
def kpmd(installed: None) -> Iterator[Kpmd]:
    """It is started once, by the first request."""
    yield from under_systemd()


def test_a_member_of_the_group_counts(kpmd: Kpmd, client: Callable[[str], Client]) -> None:
    inside = client("inside")
    program = count_getpid(inside)
    (link,) = inside.items("/links")
    assert link["mechanism"] == "kprobe_multi"
    assert link["owner"]["user"] == "inside"
    assert link["kernel_id"] in {each["id"] for each in bpftool_links()}
    inside.call_getpid(50)
    assert counts(inside, program)[kallsyms()[GETPID]] >= 50
    # The client's end is the end of what it made.
    inside.close()
    kpmd.journal.wait_for("ended", what="link", id=link["id"])
    assert bpftool_links() == []


def test_an_object_is_loaded_under_the_units_restrictions(rest: Rest) -> None:
    """By a process that becomes nobody and is ended: what SETUID, SETGID, SETPCAP, KILL are for."""
    elf = base64.b64encode((OBJECTS / "core.bpf.o").read_bytes()).decode()
    loaded = rest.ok("POST", "/programs", {"source": {"kind": "object", "elf": elf}})
    assert loaded["programs"]


def test_kpmctl_finds_the_socket(kpmd: Kpmd) -> None:
    shown = run("setpriv", "--reuid=inside", "--regid=inside", "--init-groups",
                "/usr/bin/kpmctl", "--json", "capabilities")  # fmt: skip
    assert os.uname().release in shown


def test_it_is_a_user_of_its_own(kpmd: Kpmd, rest: Rest, client: Callable[[str], Client]) -> None:
    make(rest, PERSISTENT)  # by a process of the loader
    entry = pwd.getpwnam(USER)
    main = kpmd.service.main_pid
    found = processes(kpmd)
    assert str(main) in found
    assert len(found) > 1
    for pid in found:
        status = status_of(pid)
        assert set(map(int, status["Uid"].split())) == {entry.pw_uid}
        assert set(map(int, status["Gid"].split())) == {entry.pw_gid}
        assert set(map(int, status["Groups"].split())) <= {entry.pw_gid}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        if pid == str(main):
            assert set(capabilities(status).values()) == {mask(CAPABILITIES)}
        else:
            assert capabilities(status)["Prm"] & ~mask(("CAP_BPF", "CAP_PERFMON")) == 0
    # It is in no group whose members are clients: whoever takes it over may not connect.
    assert set(os.getgrouplist(USER, entry.pw_gid)) == {entry.pw_gid}
    with pytest.raises(PermissionError):
        client(USER)("GET", "/healthz")
    # It sees what other users' processes are called, and has a place for a file of records.
    admin = client("admin")
    admin.ok("GET", "/healthz")
    (command,) = [
        each["command"] for each in rest.items("/clients") if each["pid"] == admin.process.pid
    ]
    comm = Path(f"/proc/{admin.process.pid}/comm").read_text(encoding="utf-8")
    assert command == comm.rstrip("\n")
    folder = Path("/var/log/kpmd")
    assert (folder.owner(), folder.group(), folder.stat().st_mode & 0o7777) == (USER, USER, 0o750)


def test_functions_have_their_addresses(
    kpmd: Kpmd, rest: Rest, client: Callable[[str], Client]
) -> None:
    inside = client("inside")
    found = {each["symbol"]: each["address"] for each in inside.items("/symbols?pattern=vfs_*")}
    assert len(found) > 20
    known = kallsyms()
    assert {name: int(address, 16) for name, address in found.items()} == {
        name: known[name] for name in found
    }
    built = [each for each in kpmd.journal.records() if each["event"] == "symbol index built"]
    assert all(each["addresses"] for each in built)
    assert built
    # debugfs's list of what must not be probed was read, too, and with what it says.
    forbidden = Path("/sys/kernel/debug/kprobes/blacklist").read_text(encoding="ascii").split()[1]
    status, problem = rest(
        "POST",
        "/links",
        {
            "program": rest.ok("POST", "/programs", COUNT)["programs"][0]["id"],
            "kind": "kprobe",
            "symbols": [forbidden],
        },
    )
    assert (status, problem["kind"]) == (422, "symbol-not-found")
    with module("dummy"):
        loaded = rest.items("/symbols?pattern=*[dummy]")
        assert loaded
        assert all(int(each["address"], 16) for each in loaded)
    assert rest.items("/symbols?pattern=*[dummy]") == []


def test_what_is_done_and_what_is_refused(
    kpmd: Kpmd, rest: Rest, client: Callable[[str], Client]
) -> None:
    program = rest.ok("POST", "/programs", COUNT)["programs"][0]
    pid = f"_PID={kpmd.service.main_pid}"
    made = f"KPMD_WHAT_PROGRAMS={program['id']}"
    done = found(pid, "KPMD_UID=0", "KPMD_CALL=POST /programs", "KPMD_OUTCOME=ok", made)
    assert done["KPMD_STATUS"] == "201"
    assert done["_SYSTEMD_UNIT"] == kpmd.service.name
    status, _ = client("inside")("DELETE", f"/programs/{program['id']}")
    assert status == 404
    uid = pwd.getpwnam("inside").pw_uid
    refused = found(pid, f"KPMD_UID={uid}", "KPMD_OUTCOME=not-found")
    assert refused["KPMD_CALL"] == f"DELETE /programs/{program['id']}"
    assert refused["PRIORITY"] == "5"


#: Takes a name of its own, and asks for what is not there.
_NAMED = """
import os, sys
from pathlib import Path
from tests.kernel.rest import Rest
Path("/proc/self/comm").write_text("a\\nKPMD_UID=7")
print(os.getpid(), Rest(sys.argv[1])("DELETE", "/programs/prg-none")[0])
"""


def test_a_process_forges_nothing_by_its_name(kpmd: Kpmd) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", _NAMED, SOCKET], cwd=PROJECT, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    pid, status = shown.split()
    assert status == "404"
    entry = found(f"_PID={kpmd.service.main_pid}", f"KPMD_PID={pid}")
    assert entry["KPMD_COMMAND"] == "a\nKPMD_UID=7"
    assert entry["KPMD_UID"] == "0"


def test_what_comes_while_journald_is_started_anew_is_not_lost(kpmd: Kpmd, rest: Rest) -> None:
    rest.ok("GET", "/healthz")
    run("systemctl", "restart", "systemd-journald.service")
    missing = f"/programs/prg-{secrets.token_hex(12)}"
    assert rest("DELETE", missing)[0] == 404
    found(f"KPMD_CALL=DELETE {missing}")
    assert Path("/run/systemd/journal/socket").is_socket()
