"""Filters of system calls, each tried in a process of its own; and calls that another one makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kpmd.bpf import seccomp
from kpmd.bpf.filters import ASKED, Filters
from kpmd.bpf.remote import Memory
from kpmd.errors import NotSupported

ROOT = Path(__file__).parents[2]

_HEAD = """
import ctypes, errno, mmap, os, signal, socket, sys
from kpmd.bpf import confine, seccomp
from kpmd.bpf.filters import Filters
confine.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
library = seccomp.Library()
made = library.filter(seccomp.ALLOW)
def tell(call):
    try: print(call(), flush=True)
    except OSError as error: print(errno.errorcode[error.errno], flush=True)
"""


def run(script: str) -> tuple[list[str], int]:
    """What a script prints, and how it ends."""
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines(), done.returncode


def test_calls_are_refused_and_kill() -> None:
    script = """
made.add(seccomp.refuse(errno.EROFS), ["mkdir", "mkdirat", "no_such_call"])
made.add(seccomp.KILL, ["socket"])
made.made().load()
tell(lambda: os.mkdir("/nowhere/x"))
tell(os.getpid)
tell(socket.socket)
"""
    lines, status = run(script)
    assert lines[0] == "EROFS"
    assert len(lines) == 2
    assert status == -signal.SIGSYS


def test_conditions() -> None:
    script = """
made.add(seccomp.refuse(errno.EDOM), ["lseek"], seccomp.equal(2, os.SEEK_END))
made.add(seccomp.refuse(errno.ERANGE), ["mmap"], seccomp.without(2, mmap.PROT_EXEC))
ready = made.made()
fd = os.memfd_create("x")
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def area(protection):
    got = libc.mmap(None, ctypes.c_size_t(4096), protection, 0x22, -1, ctypes.c_long(0))
    if got == ctypes.c_void_p(-1).value: raise OSError(ctypes.get_errno(), "mmap")
    return "made"
ready.load()
tell(lambda: os.lseek(fd, 7, os.SEEK_SET))
tell(lambda: os.lseek(fd, 7, os.SEEK_END))
tell(lambda: area(1))
tell(lambda: area(1 | 4))
"""
    assert run(script) == (["7", "EDOM", "ERANGE", "made"], 0)


def test_another_process_answers() -> None:
    script = """
made.add(seccomp.ASK, ["getppid", "chdir", "dup3"])
ready = made.made()
ours, theirs = socket.socketpair()
pid = os.fork()
if not pid:
    fd = ready.load_and_listen()
    socket.send_fds(theirs, [b"x"], [fd])
    os.close(fd)
    tell(os.getppid)
    tell(lambda: os.chdir("/"))
    tell(lambda: os.read(os.dup2(0, 90, inheritable=False), 5))
    tell(lambda: os.read(77, 5))
    os._exit(0)
theirs.close()
listener = seccomp.Listener(socket.recv_fds(ours, 1, 1)[1][0])
numbers = {library.number(name): name for name in ("getppid", "chdir", "dup3")}
told = os.memfd_create("told")
os.write(told, b"hello")
for expected in ("getppid", "chdir", "dup3"):
    call = listener.receive()
    assert numbers[call.number] == expected
    if expected == "getppid":
        listener.reply(call, 4242)
    elif expected == "chdir":
        listener.reply(call, -errno.EXDEV)
    else:
        assert call.arguments[0] == 0
        os.lseek(told, 0, 0)
        number = listener.add(call, told)
        assert listener.add(call, os.open("/dev/null", os.O_RDONLY), 77) == 77
        listener.reply(call, number)
assert os.waitpid(pid, 0)[1] == 0
try: listener.reply(call, 0)
except FileNotFoundError: print("gone")
"""
    assert run(script) == (["4242", "EXDEV", "b'hello'", "b''", "gone"], 0)


@pytest.mark.parametrize(
    ("which", "call", "outcome"),
    [
        ("parser", "os.getppid", None),
        ("parser", "socket.socket", None),
        ("parser", "os.fork", None),
        ("parser", "lambda: os.stat('/')", "ENOENT"),
        ("broker", "socket.socket", "EPERM"),
        ("broker", "os.fork", "EPERM"),
        ("broker", "lambda: os.open('/', 0)", "EPERM"),
        ("broker", "lambda: os.execv('/bin/true', ['x'])", "EPERM"),
        ("broker", "lambda: os.kill(os.getpid(), 0)", "EPERM"),
        ("broker", "lambda: mmap.mmap(-1, 4096, prot=7)", "EPERM"),
        ("broker", "lambda: mmap.mmap(-1, 4096)[0]", "0"),
        ("broker", "lambda: confine.prctl(4, 1)", "EPERM"),
    ],
)
def test_filters_of_the_loader(which: str, call: str, outcome: str | None) -> None:
    lines, status = run(f"Filters(library).{which}.load()\ntell({call})\nos._exit(0)")
    assert (lines, status) == (([], -signal.SIGSYS) if outcome is None else ([outcome], 0))


def test_what_is_asked_about_has_a_name() -> None:
    asked = Filters(seccomp.Library()).asked
    assert {name for number, name in asked.items() if number >= 0} <= set(ASKED)
    assert {"bpf", "openat"} <= set(asked.values())


def test_missing_libseccomp() -> None:
    with pytest.raises(NotSupported) as caught:
        seccomp.Library("libkpmd-none.so.2")
    assert caught.value.fields["needs"] == "libkpmd-none.so.2"


def test_memory_of_another_process() -> None:
    read_end, write_end = os.pipe()
    script = (
        "import ctypes, sys\n"
        "area = ctypes.create_string_buffer(b'abc\\0' + b'x' * 9000)\n"
        "print(ctypes.addressof(area), flush=True)\n"
        "sys.stdin.read(1)\n"
        "print(area.raw[:6], flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=read_end, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        where = int(process.stdout.readline())
        memory = Memory(process.pid)
        assert memory.read(where, 9000) == b"abc\0" + b"x" * 8996
        assert memory.string(where, 3) == b"abc"
        with pytest.raises(OSError, match="too long"):
            memory.string(where + 4, 255)
        for nowhere in (0, 1 << 40, 1 << 63, (1 << 64) - 1):
            for call in (memory.read, memory.string):
                with pytest.raises(OSError, match="Bad address"):
                    call(nowhere, 8)
            with pytest.raises(OSError, match="Bad address"):
                memory.write(nowhere, b"x")
        with pytest.raises(OSError, match="Bad address"):
            memory.read(where, 1 << 26)
        memory.write(where, b"kpmd")
        os.write(write_end, b"\n")
        assert process.stdout.read() == "b'kpmdxx'\n"
    with pytest.raises(OSError, match="Bad address"):  # it has ended
        memory.read(where, 1)
    memory.close()
    os.close(read_end)
    os.close(write_end)
