"""The loader's warm fork server: a small process that starts one confined process per object.

The daemon starts it (see ``kpmd.bpf.loader``) and sends one packet per request on the control
socket: the limits, and four FDs that it hands through. The server itself reads nothing that a
client wrote and nothing that a child says. It holds each child by its pidfd, kills it when its time
is up, and tells the daemon on the request's own socket how it ended. It ends with the daemon, and
its children end with it. May import: ``kpmd.bpf.{confine,libbpf,loader_child}``, ``kpmd.errors``.
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

from kpmd.bpf import confine, loader_child
from kpmd.bpf.libbpf import Library
from kpmd.errors import NotSupported

#: What the daemon is told of a child: one of these words and a number.
STARTED = "started"
EXITED, KILLED, TIMED_OUT, NOT_STARTED = "exited", "killed", "timed-out", "not-started"

#: Request, reply, words, verdict: the FDs of a packet on the control socket.
FDS = 4
PACKET = 4096

#: After its last order the server waits this long for its children's ends.
_FAREWELL_SECONDS = 2.0


class _Child:
    """A running child: its pidfd, its deadline, and the socket to tell its end on."""

    __slots__ = ("deadline", "late", "pidfd", "verdict")

    def __init__(self, pidfd: int, deadline: float, verdict: socket.socket) -> None:
        self.pidfd, self.deadline, self.verdict = pidfd, deadline, verdict
        self.late = False

    def kill(self) -> None:
        """Kill the child; its end is seen later, on the pidfd."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> None:
        """Take the child's exit status, tell it and forget the child."""
        ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        how, number = NOT_STARTED, errno.ECHILD
        if ended is not None:
            how = EXITED if ended.si_code == os.CLD_EXITED else KILLED
            number = ended.si_status
        os.close(self.pidfd)
        with self.verdict:
            tell(self.verdict, TIMED_OUT if self.late else how, number)


def tell(verdict: socket.socket, how: str, number: int) -> None:
    """Tell the daemon about a request; it may have given up meanwhile."""
    with contextlib.suppress(OSError):
        verdict.send(json.dumps([how, number]).encode(), socket.MSG_DONTWAIT)


class Server:
    """The loop over the control socket and the children."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, _Child] = {}
        self._poll = select.poll()
        self._poll.register(control.fileno(), select.POLLIN)
        self._pid = os.getpid()
        self._library: Library | NotSupported
        try:
            self._library = Library()
        except NotSupported as error:
            self._library = error

    def run(self) -> None:
        """Serve until the daemon closes its end or is gone, then end all children."""
        while self._step(self._until_deadline()):
            pass
        self._poll.unregister(self._control.fileno())
        self._control.close()
        for child in self._children.values():
            child.kill()
        end = time.monotonic() + _FAREWELL_SECONDS
        while self._children and time.monotonic() < end:
            self._step(100)

    def _until_deadline(self) -> int | None:
        """Milliseconds to the next deadline; None without children."""
        ahead = [child.deadline for child in self._children.values() if not child.late]
        return max(0, int((min(ahead) - time.monotonic()) * 1000) + 1) if ahead else None

    def _step(self, timeout: int | None) -> bool:
        """Wait once; False when the daemon is gone."""
        for number, _ in self._poll.poll(timeout):
            if number in self._children:
                self._poll.unregister(number)
                self._children.pop(number).reap()
            elif not self._accept():
                return False
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
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            os.waitpid(pid, 0)
            with verdict:
                tell(verdict, NOT_STARTED, error.errno or errno.EMFILE)
            return
        self._children[pidfd] = _Child(pidfd, time.monotonic() + seconds, verdict)
        self._poll.register(pidfd, select.POLLIN)

    def _become_child(self, limits: dict[str, int], request: int, reply: int, words: int) -> None:
        """In the child: keep the request's three FDs only, do the work and end."""
        status = 70
        try:
            start = 3
            for fd in sorted((request, reply, words)):
                if fd > start:
                    os.closerange(start, fd)
                start = fd + 1
            os.closerange(start, 1 << 20)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            loader_child.run(self._library, limits, self._pid, request, reply, words)
            status = 0
        except BaseException as error:  # noqa: BLE001, RUF100 - the parent's loop must never run here
            os.write(2, f"the loader's process failed: {error!r}".encode())
        finally:
            os._exit(status)


def main() -> None:
    """Run the server: arguments are the control socket's FD and the daemon's pid."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    # It ends when the daemon has closed the control socket, not when a service manager signals the
    # whole group: the daemon may have loads to finish.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    confine.keep_capabilities(confine.SERVER_CAPS)
    confine.die_with(int(sys.argv[2]))
    Server(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
