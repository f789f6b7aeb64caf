"""Maps in the hands of a client without privileges: what it can do with them, and what not."""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kpmd.core.holdings import LEAST_LENT
from tests.kernel.conftest import OBJECTS, Daemon
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, call_getpid
from tests.kernel.test_processes import stopped
from tests.kernel.wire import NOBODY, Forked, Tell, Wire, request
from tests.kernel.witness import eventually, in_kernel

pytestmark = pytest.mark.kprobes

DOCUMENT = Path(__file__).parents[2] / "docs/handover.md"
SYSCTL = Path("/proc/sys/kernel/unprivileged_bpf_disabled")

MAP_CREATE, LOOKUP, UPDATE, DELETE, PROG_LOAD, INFO, LINK_CREATE = 0, 1, 2, 3, 5, 15, 28

ARRAY, KPROBE, KPROBE_MULTI = 2, 2, 42

#: From then on who has a map may use it whatever kernel.unprivileged_bpf_disabled says.
BPF_FOR_ALL = (5, 19)

_libc = ctypes.CDLL(None, use_errno=True)

#: ``r0 = 0; exit``, and its license.
_instructions = ctypes.create_string_buffer(bytes.fromhex("b7000000000000009500000000000000"))
_license = ctypes.create_string_buffer(b"GPL")
PROGRAM = (ctypes.addressof(_instructions), ctypes.addressof(_license))


def bpf(command: int, layout: str, *fields: int) -> str:
    """The system call, with nothing of kpmd in between: the errno's name, or nothing."""
    attr = struct.pack(layout, *fields).ljust(128, b"\0")
    result = _libc.syscall(321, command, attr, len(attr))
    return "" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def element(command: int, fd: int, key: int, value: int = 0) -> tuple[str, int]:
    """A call about an entry of a map of 4 and 8 bytes."""
    keys, values = ctypes.c_uint32(key), ctypes.c_uint64(value)
    at = 0 if command == DELETE else ctypes.addressof(values)
    return bpf(command, "=IIQQ", fd, 0, ctypes.addressof(keys), at), values.value


def code(language: str) -> str:
    """The program in that language that the document shows."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(found)


def take(wire: Wire, map_: str) -> tuple[dict[str, Any], int]:
    """A map's description and file descriptor."""
    wire.send(request("POST", f"/maps/{map_}/fd"))
    data, fds, _, _ = socket.recv_fds(wire.sock, 1 << 16, 1)
    answer: dict[str, Any] = json.loads(data.partition(b"\r\n\r\n")[2])
    assert answer["fds"] == 1, answer
    return answer, fds[0]


def load(wire: Wire, **fields: Any) -> dict[str, str]:
    """Load and attach the program to calls of this test's process; the ids of its maps by name."""
    elf = base64.b64encode((OBJECTS / "handover.bpf.o").read_bytes()).decode()
    source = {"kind": "object", "elf": elf, "globals": {"target_pid": PID}}
    made = wire.ok("POST", "/programs", {"source": source, **fields})
    program = made["programs"][0]["id"]
    body = {"program": program, "kind": "kprobe", "symbols": [GETPID], **fields}
    wire.ok("POST", "/links", body)
    found = {each["name"]: each["id"] for each in made["maps"]}
    return {**found, "program": program}


#: Whose calls count.
PID = os.getpid()


@pytest.fixture
def owner(rest: Rest, fork: Callable[..., Forked]) -> Iterator[Callable[..., Forked]]:
    """Makes clients, as nobody; in the end they die, and all that is theirs ends."""
    made = []

    def start(work: Callable[[Tell], None]) -> Forked:
        made.append(fork(work))
        return made[-1]

    yield start
    for each in made:
        each.kill()
    eventually(lambda: rest.items("/programs"), [])


@pytest.fixture
def maps(daemon: Daemon, owner: Callable[..., Forked]) -> dict[str, str]:
    """Those of a program of nobody's that is attached."""

    def work(tell: Tell) -> None:
        tell(load(Wire(daemon.socket)))

    found: dict[str, str] = owner(work).told()
    return found


@pytest.fixture(autouse=True)
def _signals_wait() -> Iterator[None]:
    """Processes that are forked take SIGUSR1 when they ask for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def reader(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program that prints records, as nobody."""
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, user=NOBODY, group=NOBODY, extra_groups=[]
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def check_reader(running: subprocess.Popen[str], daemon: Daemon) -> None:
    """It prints the record of each call, also when kpmd is not running meanwhile."""
    assert running.stdout is not None
    call_getpid(1)
    assert running.stdout.readline().split() == ["0", str(PID)]
    status = Path(f"/proc/{running.pid}/status").read_text()
    assert "\nCapEff:\t0000000000000000\n" in status
    assert f"\nUid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}\n" in status
    with stopped(daemon):
        for number in range(1, 4):
            call_getpid(1)
            assert running.stdout.readline().split() == [str(number), str(PID)]
        # All together they do not fit into the buffer.
        for first in range(4, 4004, 1000):
            call_getpid(1000)
            for number in range(first, first + 1000):
                assert running.stdout.readline().split() == [str(number), str(PID)]


def test_python(daemon: Daemon, maps: dict[str, str]) -> None:
    with reader(sys.executable, "-c", code("python"), daemon.socket, maps["records"]) as running:
        check_reader(running, daemon)


@pytest.fixture(scope="module")
def program() -> Iterator[str]:
    """The C program of the document, where nobody can run it."""
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "read_records.c").write_text(code("c"))
        command = ["clang", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", "-o"]
        command += ["read_records", "read_records.c", "-lbpf"]
        subprocess.run(command, cwd=folder, check=True)
        yield str(folder / "read_records")


def test_c_on_libbpf(
    daemon: Daemon, maps: dict[str, str], program: str, release: tuple[int, int]
) -> None:
    with (
        unprivileged_bpf(2 if release >= BPF_FOR_ALL else 0),
        reader(program, daemon.socket, maps["records"]) as running,
    ):
        check_reader(running, daemon)


@pytest.mark.parametrize("disabled", [2, 0])
def test_entries(
    daemon: Daemon,
    rest: Rest,
    owner: Callable[..., Forked],
    release: tuple[int, int],
    disabled: int,
) -> None:
    """By bpf(2), as the document says; and it can do no more than with the map."""

    def work(tell: Tell) -> None:
        wire = Wire(daemon.socket)
        maps = load(wire)
        _, fd = take(wire, maps["counts"])
        tell("ready")
        signal.sigwait([signal.SIGUSR1])
        found = element(LOOKUP, fd, PID)
        changed = [element(UPDATE, fd, key, 7)[0] for key in (PID, 3)]
        info, size = ctypes.create_string_buffer(256), 256
        tell(
            {
                "found": found,
                "changed": changed,
                "deleted": element(DELETE, fd, 3)[0],
                "missing": element(LOOKUP, fd, 3)[0],
                "info": bpf(INFO, "=IIQ", fd, size, ctypes.addressof(info)),
                "create": bpf(MAP_CREATE, "=IIII", ARRAY, 4, 8, 1),
                "load": bpf(PROG_LOAD, "=IIQQ", KPROBE, 2, *PROGRAM),
                "link": bpf(LINK_CREATE, "=IIII", fd, 0, KPROBE_MULTI, 0),
                "maps": maps,
            }
        )

    with unprivileged_bpf(disabled):
        client = owner(work)
        assert client.told() == "ready"
        call_getpid(5)
        client.signal(signal.SIGUSR1)
        told = client.told()
    counts = told.pop("maps")["counts"]
    link = told.pop("link")
    allowed = disabled == 0 or release >= BPF_FOR_ALL
    if allowed:
        assert told == {
            "found": ["", 5],
            "changed": ["", ""],
            "deleted": "",
            "missing": "ENOENT",
            "info": "",
            # Before 5.11 it would be locked memory, of which there is too little.
            "create": "" if disabled == 0 and release >= (5, 11) else "EPERM",
            "load": "EPERM",
        }
        # A map is no program.
        assert link in ("EINVAL", "EPERM")
        entries = rest.items(f"/maps/{counts}/entries")
        assert [int.from_bytes(bytes.fromhex(each["value"]), "little") for each in entries] == [7]
    else:
        none = {"found": ["EPERM", 0], "changed": ["EPERM"] * 2}
        assert told == {**dict.fromkeys(told, "EPERM"), **none}
        assert link == "EPERM"


def test_globals(daemon: Daemon, owner: Callable[..., Forked]) -> None:
    """Those that the program writes can be mapped; those it was verified with cannot be changed."""

    def work(tell: Tell) -> None:
        wire = Wire(daemon.socket)
        maps = load(wire)
        _, bss = take(wire, maps[".bss"])
        _, frozen = take(wire, maps[".rodata"])
        calls = memoryview(mmap.mmap(bss, mmap.PAGESIZE)).cast("Q")
        reading = mmap.mmap(frozen, mmap.PAGESIZE, prot=mmap.PROT_READ)
        try:
            mmap.mmap(frozen, mmap.PAGESIZE)
        except PermissionError as error:
            mapped = error.errno
        tell([int.from_bytes(reading[:4], sys.byteorder), mapped, element(UPDATE, frozen, 0)[0]])
        signal.sigwait([signal.SIGUSR1])
        before, calls[0] = calls[0], 1 << 40
        tell(before)
        signal.sigwait([signal.SIGUSR1])
        tell(calls[0])

    with unprivileged_bpf(0):
        client = owner(work)
        assert client.told() == [PID, errno.EPERM, "EPERM"]
    for before in (0, 1 << 40):
        call_getpid(3)
        client.signal(signal.SIGUSR1)
        assert client.told() == before + 3


def test_what_holds_programs_is_not_handed_over(rest: Rest, maps: dict[str, str]) -> None:
    status, problem = rest("POST", f"/maps/{maps['tails']}/fd")
    assert (status, problem["kind"]) == (501, "not-supported")
    status, problem = rest("POST", f"/programs/{maps['program']}/fd")
    assert (status, problem["kind"]) == (404, "not-found")


def test_it_is_on_the_books_as_long_as_the_kernel_has_it(
    daemon: Daemon, rest: Rest, exact: Callable[[], object], fork: Callable[..., Forked]
) -> None:
    """Whoever holds it, and in whatever way: here a process that kpmd has never heard of."""

    def holder(tell: Tell) -> None:
        wire = Wire(daemon.socket)
        maps = load(wire)
        answer, fd = take(wire, maps["records"])
        child = os.fork()
        if not child:
            mapped = mmap.mmap(fd, mmap.PAGESIZE)
            os.closerange(0, 64)
            signal.pause()
            mapped.close()
        tell([child, answer["map"]["kernel_id"]])

    def used() -> int:
        usage: dict[str, int] = rest.ok("GET", f"/policy?user={NOBODY}")["usage"]
        return usage["map_bytes"]

    client = fork(holder)
    child, kernel_id = client.told()
    try:
        assert used() > 1 << 16
        client.kill()
        daemon.wait_for("client gone", pid=client.pid)
        # The other maps are gone, and not this one.
        eventually(used, LEAST_LENT)
        assert rest.items("/maps") == []
        assert kernel_id in in_kernel().maps
    finally:
        os.kill(child, signal.SIGKILL)
    eventually(used, 0)
    assert kernel_id not in in_kernel().maps


@contextmanager
def unprivileged_bpf(disabled: int) -> Iterator[None]:
    """kernel.unprivileged_bpf_disabled; 1 could not be taken back."""
    before = SYSCTL.read_text()
    SYSCTL.write_text(str(disabled))
    try:
        yield
    finally:
        SYSCTL.write_text(before)
