"""The loader's warm fork server: a small process that starts a broker per request.

The daemon starts it (see ``kpmd.bpf.loader``) and sends one packet per request on the control
socket: the limits, and four FDs that it hands through. The server itself reads nothing that a
client wrote and nothing that a child says. It holds each broker (``loader_broker``) by its pidfd,
kills it with its parser when its time is up, and tells the daemon on the request's own socket how
it ended. It ends with the daemon, and its children end with it. May import:
``kpmd.bpf.{confine,filters,libbpf,loader_broker,loader_child,loader_end,loader_session,maps,
seccomp}``, ``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import time

from kpmd.bpf import confine, loader_broker, seccomp
from kpmd.bpf.filters import Filters
from kpmd.bpf.libbpf import Library
from kpmd.bpf.loader_child import Job, load_object
from kpmd.bpf.loader_end import NOT_STARTED, STARTED, TIMED_OUT, how_ended
from kpmd.bpf.loader_session import Kit, kernel_types, unconfined
from kpmd.bpf.maps import possible_cpus
from kpmd.errors import KpmdError, NotSupported

#: Request, reply, words, verdict: the FDs of a packet on the control socket.
FDS = 4
PACKET = 4096

#: After its last order the server waits this long for its children's ends.
_FAREWELL_SECONDS = 2.0

#: How often to look after a parser that outlived its broker and was killed, in milliseconds.
_ORPHANS_MS = 5


class _Child:
    """A running broker: its pidfd, its deadline, and the socket to tell its end on.

    The broker leads a process group of its own, in which its parser is too.
    """

    __slots__ = ("_end", "_group", "deadline", "late", "pidfd", "verdict")

    def __init__(self, pid: int, pidfd: int, deadline: float, verdict: socket.socket) -> None:
        self.pidfd, self.deadline, self.verdict = pidfd, deadline, verdict
        self.late = False
        self._group = pid
        self._end: tuple[str, int] = (NOT_STARTED, errno.ECHILD)

    def kill(self) -> None:
        """Kill the broker and its parser; the broker's end is seen later, on the pidfd."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._group, signal.SIGKILL)

    def reap(self) -> None:
        """Take the broker's exit status, and kill the parser that it may have left behind."""
        self.kill()  # while the broker is not waited for, the group's number is its own
        self._end = how_ended(os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED))
        os.close(self.pidfd)

    def tell_end(self) -> bool:
        """After ``reap``: tell the end once the parser is gone, too; False while it is not."""
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PGID, self._group, os.WEXITED | os.WNOHANG) is None:
                return False
        how, number = self._end
        with self.verdict:
            tell(self.verdict, TIMED_OUT if self.late else how, number)
        return True


def tell(verdict: socket.socket, how: str, number: int) -> None:
    """Tell the daemon about a request; it may have given up meanwhile."""
    with contextlib.suppress(OSError):
        verdict.send(json.dumps([how, number]).encode(), socket.MSG_DONTWAIT)


class Server:
    """The loop over the control socket and the children."""

    def __init__(self, control: socket.socket, job: Job) -> None:
        self._control = control
        self._children: dict[int, _Child] = {}
        #: Their brokers have ended, their parsers have not quite.
        self._ending: list[_Child] = []
        self._poll = select.poll()
        self._poll.register(control.fileno(), select.POLLIN)
        self._pid = os.getpid()
        library: Library | NotSupported
        filters: Filters | KpmdError
        try:
            library = Library()
            _warm(library)
        except NotSupported as error:
            library = error
        try:
            filters = Filters(seccomp.Library())
        except NotSupported as error:
            filters = error
        except OSError as error:
            filters = unconfined(error)
        self._kit = Kit(library, filters, kernel_types(), possible_cpus(), job)

    def run(self) -> None:
        """Serve until the daemon closes its end or is gone, then end all children."""
        while self._step(self._until_deadline()):
            pass
        self._poll.unregister(self._control.fileno())
        self._control.close()
        for child in self._children.values():
            child.kill()
        end = time.monotonic() + _FAREWELL_SECONDS
        while (self._children or self._ending) and time.monotonic() < end:
            self._step(_ORPHANS_MS)

    def _until_deadline(self) -> int | None:
        """Milliseconds to the next thing to do unasked; None: nothing."""
        if self._ending:
            return _ORPHANS_MS
        ahead = [child.deadline for child in self._children.values() if not child.late]
        return max(0, int((min(ahead) - time.monotonic()) * 1000) + 1) if ahead else None

    def _step(self, timeout: int | None) -> bool:
        """Wait once; False when the daemon is gone."""
        for number, _ in self._poll.poll(timeout):
            if number in self._children:
                self._poll.unregister(number)
                child = self._children.pop(number)
                child.reap()
                self._ending.append(child)
            elif not self._accept():
                return False
        self._ending = [child for child in self._ending if not child.tell_end()]
        now = time.monotonic()
        for child in self._children.values():
            if child.deadline <= now and not child.late:
                child.late = True
                child.kill()
        return True

    def _accept(self) -> bool:
        """Take one request and start a child for it."""
        packet, fds, _, _ = socket.recv_fds(self._control, PACKET, FDS)
        if not packet:
            return False
        if len(fds) != FDS:
            # Out of FDs: the daemon sees its ends closed.
            for fd in fds:
                os.close(fd)
            return True
        request, reply, words, verdict_fd = fds
        verdict = socket.socket(fileno=verdict_fd)
        limits = json.loads(packet)
        tell(verdict, STARTED, 0)
        try:
            pid = os.fork()
        except OSError as error:
            with verdict:
                tell(verdict, NOT_STARTED, error.errno or errno.EAGAIN)
        else:
            if pid == 0:
                self._become_child(limits, request, reply, words)
            self._watch(pid, limits["seconds"], verdict)
        for fd in (request, reply, words):
            os.close(fd)
        return True

    def _watch(self, pid: int, seconds: float, verdict: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it may have done so itself, or have ended
            os.setpgid(pid, pid)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            os.waitpid(pid, 0)
            with verdict:
                tell(verdict, NOT_STARTED, error.errno or errno.EMFILE)
            return
        self._children[pidfd] = _Child(pid, pidfd, time.monotonic() + seconds, verdict)
        self._poll.register(pidfd, select.POLLIN)

    def _become_child(self, limits: dict[str, int], request: int, reply: int, words: int) -> None:
        """In the child: keep the request's three FDs, do the work and end."""
        status = 70
        types = set() if self._kit.types is None else {self._kit.types}
        try:
            os.setpgid(0, 0)
            confine.close_others({0, 1, 2, request, reply, words} | types)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            loader_broker.run(self._kit, limits, self._pid, request, reply, words)
            status = 0
        except BaseException as error:  # noqa: BLE001, RUF100 - the parent's loop must never run here
            os.write(2, f"the loader's process failed: {error!r}".encode())
        finally:
            os._exit(status)


def _warm(library: Library) -> None:
    """Have libbpf try once what the kernel can do, and not in each parser."""
    null, stderr = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(null, 2)  # an error here is no news: the first load tells it
    try:
        # Not through kpmd.builtin, which would bring half a standard library with it.
        path = os.path.join(os.path.dirname(__file__), "..", "builtin", "count.bpf.o")
        with open(path, "rb") as file:
            library.warm(file.read())
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def main(job: Job = load_object) -> None:
    """Run the server: arguments are the control socket's FD and the daemon's pid."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    # It ends when the daemon has closed the control socket, not when a service manager signals the
    # whole group: the daemon may have loads to finish.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    confine.forget_capabilities(confine.CHILD_CAPS)
    confine.keep_capabilities(confine.SERVER_CAPS)
    confine.die_with(int(sys.argv[2]))
    confine.adopt_orphans()
    Server(socket.socket(fileno=int(sys.argv[1])), job).run()


if __name__ == "__main__":
    main()
