"""The same questions to kpmctl, bpftrace and bcc's tools: seconds from exec to the first answer.

All run in one VM, in turn, on a terminal, while one load runs. kpmctl runs as the user nobody, the
others as root, which they ask for. bcc compiles with the kernel's headers: ``prepare`` has them.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.prepare import BUILD, PROJECT
from tests.bench.report import say
from tests.bench.running import Kpmd
from tests.vm import kernels, sources

HEADERS = BUILD / "headers"
#: Columns of the table. bcc is its Python tools; libbpf-tools has some of them in C.
TOOLS = ("kpmctl", "bpftrace", "bcc", "libbpf-tools")

_PACKAGES = ("bpftrace", "bpfcc-tools", "libbpf-tools")
_NOBODY = 65534
#: Seconds that a tool has for its first answer, and to end when it is told to.
_PATIENCE, _ENDING = 150.0, 60.0
#: Written where a tool ends without an answer.
_FAILED = "fails"

#: Colours, and where the cursor goes.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[@-~]")

#: What runs all the time: twenty times a second a message over TCP to itself, a file read, and a
#: read that waits for 3 ms. Not more: the processor is emulated, and what it takes the tools lack.
_LOAD = """
import os, socket, threading, time
server = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(server.getsockname())
two, _ = server.accept()
end, begin = os.pipe()
wanted = threading.Semaphore(0)
def feed():
    while wanted.acquire():
        time.sleep(0.003)
        os.write(begin, b"x")
threading.Thread(target=feed, daemon=True).start()
print(flush=True)
while True:
    one.sendall(b"x" * 64)
    two.recv(64)
    with open("/proc/self/comm", "rb") as file:
        file.read()
    wanted.release()
    os.read(end, 1)
    time.sleep(0.05)
"""


@dataclass(frozen=True)
class Question:
    """What is asked; ``{pid}`` in a command is the load's process, ``{out}`` a file to write."""

    what: str
    #: By tool: its command, written as for a shell.
    commands: Mapping[str, str]
    #: What an answer has; "": the answer is there when the tool has ended.
    answer: str


def _bpftrace(probes: str) -> str:
    return f"bpftrace -e '{probes}'"


_EACH = "interval:ms:200 { print(@); }"
_READ = "kprobe:vfs_read { @s[tid] = nsecs; } kretprobe:vfs_read /@s[tid]/"

QUESTIONS = (
    Question(
        "Count calls, by glob",
        {
            "kpmctl": "kpmctl count 'tcp_*'",
            "bpftrace": _bpftrace(f"kprobe:tcp_* {{ @[func] = count(); }} {_EACH}"),
            "bcc": "funccount-bpfcc -i 1 'tcp_*'",
        },
        r"(?m)tcp_[a-z_]+\]?:? +\d|\d +tcp_[a-z]",
    ),
    Question(
        "Count calls of a function, by process",
        {
            "kpmctl": "kpmctl count --by-process vfs_read",
            "bpftrace": _bpftrace(f"kprobe:vfs_read {{ @[comm, pid] = count(); }} {_EACH}"),
            "bcc": "argdist-bpfcc -i 1 -C 'p::vfs_read():u32:$PID'",
        },
        r"python.*\d|\d.*python|\d+ +\$PID = \d",
    ),
    Question(
        "Histogram of how long a function takes",
        {
            "kpmctl": "kpmctl latency vfs_read",
            "bpftrace": _bpftrace(
                f"{_READ} {{ @ = hist(nsecs - @s[tid]); delete(@s[tid]); }} {_EACH}"
            ),
            "bcc": "funclatency-bpfcc -i 1 vfs_read",
            "libbpf-tools": "funclatency -i 1 vfs_read",
        },
        r"[█▉▊▋▌▍▎▏@#*]",
    ),
    Question(
        "The same for each function of a glob",
        {
            # bpftrace 0.17 knows no function at a return, but the probe: of calls within calls it
            # has the inner ones alone.
            "kpmctl": "kpmctl latency --each 'vfs_*'",
            "bpftrace": _bpftrace(
                "kprobe:vfs_* { @s[tid] = nsecs; } kretprobe:vfs_* /@s[tid]/"
                f" {{ @[probe] = hist(nsecs - @s[tid]); delete(@s[tid]); }} {_EACH}"
            ),
            "bcc": "funclatency-bpfcc -F -i 1 'vfs_*'",
        },
        r"[█▉▊▋▌▍▎▏@#*]{2}",
    ),
    Question(
        "Calls with arguments and return value",
        {
            "kpmctl": "kpmctl trace vfs_read",
            "bpftrace": _bpftrace(
                "kprobe:vfs_read { @n[tid] = arg2; } kretprobe:vfs_read /@n[tid]/ "
                '{ printf("%s %d vfs_read(n=%d) = %d\\n", comm, pid, @n[tid], retval); }'
            ),
            "bcc": "trace-bpfcc 'vfs_read(void *file, void *to, size_t n) \"n=%d\", n'"
            " 'r::vfs_read \"= %d\", retval'",
        },
        r"= -?\d",
    ),
    Question(
        "Only calls slower than 1 ms",
        {
            "kpmctl": "kpmctl trace --slower-than 1ms vfs_read",
            "bpftrace": _bpftrace(
                f"{_READ} {{ $d = nsecs - @s[tid]; delete(@s[tid]);"
                ' if ($d > 1000000) { printf("%s %d %d us\\n", comm, pid, $d / 1000); } }'
            ),
            "bcc": "funcslower-bpfcc -m 1 vfs_read",
        },
        r"(?m)= \d|\d us|python.*\d",
    ),
    Question(
        "Who calls it: stacks",
        {
            "kpmctl": "kpmctl stacks --duration 0.2 vfs_read",
            "bpftrace": _bpftrace(f"kprobe:vfs_read {{ @[kstack] = count(); }} {_EACH}"),
            "bcc": "stackcount-bpfcc -i 1 vfs_read",
        },
        r"ksys_read",
    ),
    Question(
        "A flame graph of that",
        {
            "kpmctl": "kpmctl stacks --duration 0.2 --flame {out} vfs_read",
            # Folded stacks, which flamegraph.pl draws; it is not in Debian.
            "bcc": "stackcount-bpfcc -f -D 1 vfs_read",
        },
        "",
    ),
    Question(
        "Count calls of one process alone",
        {
            "kpmctl": "kpmctl count --pid {pid} 'vfs_*'",
            "bpftrace": _bpftrace(
                f"kprobe:vfs_* /pid == {{pid}}/ {{ @[func] = count(); }} {_EACH}"
            ),
            "bcc": "funccount-bpfcc -i 1 -p {pid} 'vfs_*'",
        },
        r"vfs_[a-z_]+\]?:? +\d|\d +vfs_[a-z]",
    ),
    Question(
        "Which functions can be traced, by glob",
        {
            "kpmctl": "kpmctl symbols 'tcp_*'",
            "bpftrace": "bpftrace -l 'kprobe:tcp_*'",
        },
        "",
    ),
)


def prepare(kernel: str) -> None:
    """Install the tools, and have the kernel's headers in ``build``."""
    subprocess.run([str(PROJECT / "deploy/apt-install"), *_PACKAGES], check=True)
    known = kernels.KERNELS[kernel]
    release = kernels.fetch(known, kernels.cache_folder()).release
    if (HEADERS / release).exists():
        return
    say(f"fetching the headers of {release}")
    common = re.sub(r"-[a-z]+-amd64$|-amd64$", "", release) + "-common"
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=BUILD) as text:
        work = Path(text)
        apt = kernels._Apt(work, sources.sources_list(sources.mirror(), known.suites))
        apt.update()
        tree = work / "tree"
        apt.unpack([f"linux-headers-{release}", f"linux-headers-{common}"], tree)
        ready = work / "ready"
        # The two over each other are what a built kernel's own folder has.
        for package in (common, release):
            for part in ("include", "arch/x86/include"):
                found = tree / f"usr/src/linux-headers-{package}/{part}"
                shutil.copytree(found, ready / part, dirs_exist_ok=True)
        HEADERS.mkdir(exist_ok=True)
        ready.rename(HEADERS / release)


def measure(runs: int, only: Sequence[str] | None) -> None:
    """Ask all the questions and print the table; ``only``: these tools."""
    tools = [tool for tool in TOOLS if not only or tool in only]
    with tempfile.TemporaryDirectory(prefix="kpmd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        kpmd = Kpmd(folder, "--mode", "0666")
        try:
            kpmd.warm()
            with _load() as pid:
                for tool in tools:  # not counted: it is read from the disk
                    first = next(each for each in QUESTIONS if tool in each.commands)
                    say(f"warming up: {tool}: {_ask(first, tool, pid, kpmd.socket)}")
                found = _ask_all(tools, runs, pid, kpmd.socket)
        finally:
            kpmd.close()
    print(f"| question | {' | '.join(tools)} |")
    print(f"|---{'|---' * len(tools)}|")
    for question in QUESTIONS:
        cells = [_cell(found.get((question.what, tool))) for tool in tools]
        print(f"| {question.what} | {' | '.join(cells)} |")


def _ask_all(
    tools: Sequence[str], runs: int, pid: int, socket: str
) -> dict[tuple[str, str], list[float] | str]:
    found: dict[tuple[str, str], list[float] | str] = {}
    for question in QUESTIONS:
        asked = [tool for tool in tools if tool in question.commands]
        for _ in range(runs):
            for tool in asked:
                before = found.setdefault((question.what, tool), [])
                if isinstance(before, str):
                    continue
                seconds, said = _ask(question, tool, pid, socket)
                if seconds is None:
                    found[question.what, tool] = said
                else:
                    before.append(seconds)
                say(f"{question.what}: {tool}: {seconds or said}")
    return found


def _cell(found: list[float] | str | None) -> str:
    if found is None:
        return "\N{EN DASH}"
    return found if isinstance(found, str) else f"{statistics.median(found):.2f} s"


@contextmanager
def _load() -> Iterator[int]:
    """The process that makes calls; its id."""
    process = subprocess.Popen([sys.executable, "-c", _LOAD], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.wait()


def _ask(question: Question, tool: str, pid: int, socket: str) -> tuple[float | None, str]:
    """Seconds to the first answer; where there was none, how it ended instead."""
    line = question.commands[tool]
    with tempfile.TemporaryDirectory(prefix="kpmd-peers-") as name:
        os.chmod(name, 0o777)
        for word, value in (("{pid}", str(pid)), ("{out}", f"{name}/out.svg")):
            line = line.replace(word, value)
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "TERM": "xterm",
            "COLUMNS": "120",
            "KPMD_SOCKET": socket,
            "HOME": name,
            "BCC_KERNEL_SOURCE": str(HEADERS / os.uname().release),
        }
        user = _NOBODY if tool == "kpmctl" else None
        reader, terminal = pty.openpty()
        # bcc shows the compiler's warnings, in which nearly everything stands.
        errors = open(f"{name}/errors", "w+b", buffering=0)  # noqa: SIM115
        begun = time.monotonic()
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {line}"],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=errors,
            env=environment,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            start_new_session=True,
        )
        os.close(terminal)
        try:
            seconds, said = _wait(process, reader, question.answer, begun)
            if seconds is None:
                errors.seek(0)
                sys.stderr.write(errors.read()[-1000:].decode(errors="replace"))
            return seconds, said
        finally:
            os.close(reader)
            errors.close()


def _wait(
    process: subprocess.Popen[bytes], reader: int, answer: str, begun: float
) -> tuple[float | None, str]:
    """Read until the answer is there; then let the tool end, by Ctrl-C."""
    killing = threading.Timer(_PATIENCE, process.kill)
    killing.start()
    said, seconds = "", None
    for piece in _pieces(reader):
        if seconds is not None:
            continue  # it goes on until it has noticed
        said += piece
        if answer and re.search(answer, _ESCAPES.sub("", said)):
            seconds = time.monotonic() - begun
            killing.cancel()
            killing = threading.Timer(_ENDING, process.kill)
            killing.start()
            process.send_signal(signal.SIGINT)
    status = process.wait()
    killing.cancel()
    if seconds is None and not answer and status == 0:
        seconds = time.monotonic() - begun
    if seconds is not None:
        return seconds, ""
    sys.stderr.write(f"{said[-2000:]}\n")
    late = f"no answer in {_PATIENCE:.0f} s" if status == -signal.SIGKILL else _FAILED
    return None, late


def _pieces(reader: int) -> Iterator[str]:
    """What is written to the terminal, until nobody has it open."""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # EIO: that was the last one
            return
        yield piece.decode(errors="replace")
