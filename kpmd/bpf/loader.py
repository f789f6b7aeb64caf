"""Programs into the kernel, through processes of their own.

``Loader.load`` and ``load_instructions`` hand what they load to a warm fork server
(``kpmd.bpf.loader_server``), which starts a confined process for it (``loader_broker``), and for an
ELF object that one starts another one, which has no rights at all and runs libbpf
(``loader_child``). Whatever becomes of them (crash, hang, lie) ends in one of kpmd's errors here,
with no FD and no process left. May import: ``kpmd.bpf.{abi,loader_answer,loader_end,
loader_request,progress}``, ``kpmd.errors``.

Per request there are a sealed memory file with the request, a stream socket on which one JSON
document and its FDs come, and before it a line for each program that the verifier begins with; a
memory file for libbpf's messages, and a socket on which the server
tells how the process ended. The request is three parts: a line of JSON for the broker, and for the
parser a line of JSON and the object; or a line for the broker and instructions.
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
from pathlib import Path

from kpmd.bpf.loader_answer import Answer, LoadedMap, LoadedObject, LoadedProgram, checked
from kpmd.bpf.loader_end import EXITED, STARTED, TIMED_OUT, describe
from kpmd.bpf.loader_request import (
    INSTRUCTIONS,
    InstructionsRequest,
    LoaderLimits,
    ObjectRequest,
    encode,
)
from kpmd.bpf.progress import Progress
from kpmd.errors import KernelError, ShuttingDown

__all__ = [
    "InstructionsRequest",
    "LoadedMap",
    "LoadedObject",
    "LoadedProgram",
    "Loader",
    "LoaderLimits",
    "ObjectRequest",
]

#: The server kills a child at its deadline; after this much more it is itself taken for hung.
_GRACE_SECONDS = 5.0

#: Runs the server from where this package came from, without the site's packages.
_COMMAND = (
    "import sys; sys.path.append(sys.argv.pop()); from kpmd.bpf.loader_server import main; main()"
)
_ROOT = str(Path(__file__).resolve().parents[2])


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

    def load(self, request: ObjectRequest, progress: Progress | None = None) -> LoadedObject:
        """Load an object's programs and maps; ``progress`` tells of it meanwhile.

        Raises BadObject (unreadable, or it broke its process), VerifierRejected, Invalid,
        WrongAttachType, TooLarge, NotSupported (no libbpf or libseccomp, or a session program one
        by one), KernelError, ShuttingDown; and what its rights do not hold: Forbidden, with
        ``refused`` (the names), and Quota.
        """
        return self._request(request, request.programs, progress)

    def load_instructions(
        self, request: InstructionsRequest, progress: Progress | None = None
    ) -> LoadedProgram:
        """Load one program from raw instructions.

        Raises Invalid where one names a map or BTF, the errors of ``objects.program_load``, and
        those of ``load``.
        """
        loaded = self._request(request, (INSTRUCTIONS,), progress)
        program = loaded.programs[0]
        program.name = request.name
        program.fd.what = f"program {request.name}"
        return program

    def _request(
        self,
        request: ObjectRequest | InstructionsRequest,
        programs: tuple[str, ...] | None,
        progress: Progress | None,
    ) -> LoadedObject:
        content, limits = encode(request), self._limits.within(request.rights)
        for _ in range(2):
            with contextlib.suppress(_NotTakenError):
                return self._load(content, limits, programs, progress or Progress())
        raise KernelError("the loader's process does not take requests; try again", errno.EAGAIN)

    def _load(
        self,
        content: bytes,
        limits: LoaderLimits,
        programs: tuple[str, ...] | None,
        progress: Progress,
    ) -> LoadedObject:
        with contextlib.ExitStack() as stack:
            sealed = _memfd(stack, "kpmd-request", content)
            words = _memfd(stack, "kpmd-words", None)
            reply = _socketpair(stack, socket.SOCK_STREAM)
            verdict = _socketpair(stack, socket.SOCK_SEQPACKET)
            server = self._running()
            self._send(server, limits, [sealed, reply[1].fileno(), words, verdict[1].fileno()])
            reply[1].close()
            verdict[1].close()
            answer = Answer(self._limits.max_programs + self._limits.max_maps, progress)
            stack.callback(answer.close)
            how, number = self._wait(server, limits, reply[0], verdict[0], answer)
            if self._closed and (how, number) != (EXITED, 0):
                raise ShuttingDown("kpmd is stopping and has given the load up")
            if (how, number) != (EXITED, 0):
                raise describe(how, number, words, vars(limits))
            return checked(answer, programs)

    def _send(self, server: _Server, limits: LoaderLimits, fds: list[int]) -> None:
        """Hand a request to the server. Raises _NotTakenError where it turns out to be gone."""
        try:
            server.send(limits.packet(), fds)
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
        self,
        server: _Server,
        limits: LoaderLimits,
        reply: socket.socket,
        verdict: socket.socket,
        answer: Answer,
    ) -> tuple[str, int]:
        """Collect the answer until the server tells how the child ended."""
        poll = select.poll()
        poll.register(reply, select.POLLIN)
        poll.register(verdict, select.POLLIN)
        deadline = time.monotonic() + limits.seconds + _GRACE_SECONDS
        started, told = False, ("", 0)
        while not told[0]:
            left = deadline - time.monotonic()
            if left <= 0:
                server.kill()
                return TIMED_OUT, signal.SIGKILL
            for number, _ in poll.poll(left * 1000):
                if number == verdict.fileno():
                    told = _told(verdict)
                    if told[0] == STARTED:
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


def _told(verdict: socket.socket) -> tuple[str, int]:
    """The server's next word on a child; it is "lost" when the server is gone."""
    try:
        how, number = json.loads(verdict.recv(4096))
    except (OSError, ValueError):
        return "lost", 0
    return str(how), int(number)


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
