"""ELF objects into the kernel, through libbpf in a process of its own.

``Loader.load`` hands the object to a warm fork server (``kpmd.bpf.loader_server``), which starts
one confined process for it (``kpmd.bpf.loader_child``). Whatever that process does (crash, hang,
lie) ends in one of kpmd's errors here, with no FD and no process left. May import:
``kpmd.bpf.{abi,loader_answer}``, ``kpmd.errors``.

Per request there are a sealed memory file with the request, a stream socket on which the child
sends one JSON document and its FDs, a memory file for libbpf's messages, and a socket on which the
server (never the child) tells how the child ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kpmd.bpf.abi import AttachType
from kpmd.bpf.loader_answer import (
    NAME_MOST,
    SCM_MAX_FD,
    Answer,
    LoadedMap,
    LoadedObject,
    LoadedProgram,
    checked,
)
from kpmd.errors import BadObject, Invalid, KernelError, KpmdError, ShuttingDown

__all__ = [
    "LoadedMap",
    "LoadedObject",
    "LoadedProgram",
    "Loader",
    "LoaderLimits",
    "ObjectRequest",
]

#: libbpf's words that are shown after a crash, in bytes.
_WORDS_SHOWN = 1024

#: The server kills a child at its deadline; after this much more it is itself taken for hung.
_GRACE_SECONDS = 5.0

#: Runs the server from where this package came from, without the site's packages.
_COMMAND = (
    "import sys; sys.path.append(sys.argv.pop()); from kpmd.bpf.loader_server import main; main()"
)
_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class ObjectRequest:
    """What to load of an object, and how."""

    elf: bytes
    #: Only these are loaded; None: all but those in a section ``?…``.
    programs: tuple[str, ...] | None = None
    #: None: each program's section says it.
    attach: AttachType | None = None
    #: To be attached one by one: the programs are loaded as AttachType.NONE, if they are for
    #: kprobe multi; others cannot be loaded so.
    one_by_one: bool = False
    #: Set in .rodata, .data and .bss before the load.
    globals: Mapping[str, int | bytes] = field(default_factory=dict)
    #: Map name to size, set before the load.
    max_entries: Mapping[str, int] = field(default_factory=dict)
    #: Return what the verifier says of a program that it takes, too.
    want_log: bool = False


@dataclass(frozen=True)
class LoaderLimits:
    """What one load may take."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    #: Address space of the process; and kernel memory of the object's maps, by estimate.
    memory_bytes: int = 512 << 20
    map_bytes: int = 512 << 20
    max_programs: int = 128
    max_maps: int = 64
    #: Who the process runs as: "nobody".
    uid: int = 65534
    gid: int = 65534

    def __post_init__(self) -> None:
        if self.max_programs + self.max_maps > SCM_MAX_FD:
            raise ValueError(f"max_programs and max_maps together exceed {SCM_MAX_FD}")

    def packet(self) -> bytes:
        """The limits as the server reads them."""
        return json.dumps({**vars(self), "files": self.max_programs + self.max_maps + 64}).encode()


class _NotTakenError(Exception):
    """The server is gone and had not begun with the request, which can be sent again."""


class _Server:
    """One server process. A thread of its own starts it, waits for its end and reaps it.

    That thread lives as long as the process, because the kernel kills a process with
    PR_SET_PDEATHSIG when the *thread* that started it ends.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        self._failed: list[OSError] = []
        self._started = threading.Event()
        self.ended = threading.Event()
        self._control.settimeout(_GRACE_SECONDS)
        self._thread = threading.Thread(
            target=self._keep, args=(theirs,), name="kpmd-loader", daemon=True
        )
        self._thread.start()
        self._started.wait()
        for error in self._failed:
            self._control.close()
            raise KernelError(
                f"the loader's process cannot be started: {error.strerror}",
                error.errno or errno.EAGAIN,
            )

    def _keep(self, theirs: socket.socket) -> None:
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-I", "-S", "-c", _COMMAND, str(number), str(os.getpid())]
            try:
                self._process = subprocess.Popen(
                    [*command, _ROOT],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(number,),
                    start_new_session=True,
                    cwd="/",
                    env={"LC_ALL": "C.UTF-8"},
                )
            except OSError as error:
                self._failed.append(error)
        self._started.set()
        if self._process is not None:
            self._process.wait()
        self.ended.set()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid if self._process is not None else -1

    def send(self, packet: bytes, fds: list[int]) -> None:
        """Send one request. Raises OSError when the server is gone or does not take it."""
        socket.send_fds(self._control, [packet], fds)

    def kill(self) -> None:
        """End the process at once, and its children with it."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Let the process end; kill it when it does not."""
        self._control.close()
        if not self.ended.wait(_GRACE_SECONDS):
            self.kill()
        self._thread.join(_GRACE_SECONDS)


class Loader:
    """Loads ELF objects. All methods may be called from any thread, and block."""

    def __init__(self, limits: LoaderLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._closed = False

    def start(self) -> None:
        """Start the server process, so that the first load need not. Raises KernelError."""
        self._running()

    def close(self) -> None:
        """End the server and the loads that are running; later ones are refused."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _running(self) -> _Server:
        with self._lock:
            if self._closed:
                raise ShuttingDown("kpmd is stopping and loads no more programs")
            if self._server is not None and self._server.ended.is_set():
                self._server.close()
                self._server = None
            if self._server is None:
                self._server = _Server()
            return self._server

    def load(self, request: ObjectRequest) -> LoadedObject:
        """Load an object's programs and maps.

        Raises BadObject (unreadable, or it broke its process), VerifierRejected, Invalid,
        WrongAttachType, TooLarge, NotSupported (no libbpf, or a session program one by one),
        KernelError, ShuttingDown.
        """
        content = _encode(request)
        for _ in range(2):
            with contextlib.suppress(_NotTakenError):
                return self._load(content, request.programs)
        raise KernelError("the loader's process does not take requests; try again", errno.EAGAIN)

    def _load(self, content: bytes, programs: tuple[str, ...] | None) -> LoadedObject:
        with contextlib.ExitStack() as stack:
            sealed = _memfd(stack, "kpmd-request", content)
            words = _memfd(stack, "kpmd-words", None)
            reply = _socketpair(stack, socket.SOCK_STREAM)
            verdict = _socketpair(stack, socket.SOCK_SEQPACKET)
            server = self._running()
            self._send(server, [sealed, reply[1].fileno(), words, verdict[1].fileno()])
            reply[1].close()
            verdict[1].close()
            answer = Answer(self._limits.max_programs + self._limits.max_maps)
            stack.callback(answer.close)
            how, number = self._wait(server, reply[0], verdict[0], answer)
            if (how, number) != ("exited", 0):
                raise self._end(how, number, words)
            return checked(answer, programs)

    def _send(self, server: _Server, fds: list[int]) -> None:
        """Hand a request to the server. Raises _NotTakenError where it turns out to be gone."""
        try:
            server.send(self._limits.packet(), fds)
        except TimeoutError:
            server.kill()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                raise KernelError(
                    f"the object cannot be handed to the loader's process: {error.strerror}",
                    error.errno or errno.EIO,
                ) from error
        else:
            return
        server.ended.wait(_GRACE_SECONDS)
        raise _NotTakenError

    def _wait(
        self, server: _Server, reply: socket.socket, verdict: socket.socket, answer: Answer
    ) -> tuple[str, int]:
        """Collect the answer until the server tells how the child ended."""
        poll = select.poll()
        poll.register(reply, select.POLLIN)
        poll.register(verdict, select.POLLIN)
        deadline = time.monotonic() + self._limits.seconds + _GRACE_SECONDS
        started, told = False, ("", 0)
        while not told[0]:
            left = deadline - time.monotonic()
            if left <= 0:
                server.kill()
                return "timed-out", signal.SIGKILL
            for number, _ in poll.poll(left * 1000):
                if number == verdict.fileno():
                    told = _told(verdict)
                    if told[0] == "started":
                        started, told = True, ("", 0)
                elif not answer.receive(reply):
                    poll.unregister(reply)
        if told[0] == "lost" and not started:
            server.ended.wait(_GRACE_SECONDS)
            raise _NotTakenError
        # The child has ended: all that it sent is there.
        while answer.receive(reply):
            pass
        return told

    def _end(self, how: str, number: int, words: int) -> KpmdError:
        """What to say of a child that did not end well."""
        if self._closed:
            return ShuttingDown("kpmd is stopping and has given the load up")
        if how == "timed-out":
            return BadObject(
                f"loading took longer than {self._limits.seconds:g} seconds and was ended"
            )
        if how == "killed":
            names = {each.value: each.name for each in signal.Signals}
            name = names.get(number, "unknown")
            if number == signal.SIGXCPU:
                most = self._limits.cpu_seconds
                return BadObject(f"loading took more than {most} seconds of processor time")
            last = _last_words(words)
            return BadObject(
                f"the process that read the object crashed with signal {number} ({name})"
                + (f"; libbpf said last: {last}" if last else "")
            )
        if how == "exited":
            return BadObject(
                f"the process that read the object gave up (status {number}): {_last_words(words)}"
            )
        if how == "not-started":
            return KernelError("no process can be started to load the object; try later", number)
        return KernelError(
            "the loader ended while it worked on the object; try again", errno.EAGAIN
        )


def _told(verdict: socket.socket) -> tuple[str, int]:
    """The server's next word on a child; it is "lost" when the server is gone."""
    try:
        how, number = json.loads(verdict.recv(4096))
    except (OSError, ValueError):
        return "lost", 0
    return str(how), int(number)


def _encode(request: ObjectRequest) -> bytes:
    """The request as the child reads it: a line of JSON, and the object's bytes."""
    if request.programs is not None and not request.programs:
        raise Invalid.at(["source", "programs"], "name at least one, or leave it out")
    for index, name in enumerate(request.programs or ()):
        _check_name(["source", "programs", index], name)
    for what in ("globals", "max_entries"):
        for name in getattr(request, what):
            _check_name(["source", what, name[:NAME_MOST]], name)
    for name, value in request.globals.items():
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise Invalid.at(["source", "globals", name], "the number does not fit into 64 bits")
    for name, size in request.max_entries.items():
        if not 0 < size < 1 << 32:
            raise Invalid.at(["source", "max_entries", name], "must be between 1 and 4294967295")
    head = {
        "programs": request.programs,
        "attach": request.attach,
        "one_by_one": request.one_by_one,
        "globals": {
            name: value.hex() if isinstance(value, bytes) else int(value)
            for name, value in request.globals.items()
        },
        "max_entries": dict(request.max_entries),
        "want_log": request.want_log,
    }
    return json.dumps(head).encode() + b"\n" + request.elf


def _check_name(loc: list[str | int], name: str) -> None:
    if not 0 < len(name) <= NAME_MOST:
        raise Invalid.at(loc, f"a name has 1 to {NAME_MOST} characters")


def _memfd(stack: contextlib.ExitStack, name: str, content: bytes | None) -> int:
    """A memory file; with content it is sealed, so that nobody can change it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    if content is not None:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _socketpair(stack: contextlib.ExitStack, kind: int) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    stack.enter_context(ours)
    stack.enter_context(theirs)
    return ours, theirs


def _last_words(words: int) -> str:
    size = os.fstat(words).st_size
    raw = os.pread(words, _WORDS_SHOWN, max(0, size - _WORDS_SHOWN))
    text = "".join(c if c.isprintable() else " " for c in raw.decode("ascii", "replace"))
    return " ".join(text.replace("libbpf: ", "; ").strip("; ").split())
