"""Who is at the other end of the socket, as the kernel tells it."""

from __future__ import annotations

import errno
import functools
import os
import select
import socket
import struct
import time
from array import array
from collections.abc import Hashable
from dataclasses import dataclass

#: asm-generic/socket.h; kernel 4.13 and 6.5. Python 3.11 has no names for them.
_SO_PEERGROUPS, _SO_PEERPIDFD = 59, 77

#: Bytes that Python lets an option have: 256 groups.
_MOST_GROUPS = 1024

_UCRED = struct.Struct("iII")


@dataclass
class Peer:
    """The process that connected. The receiver owns ``pidfd``, and closes it.

    ``pidfd`` is None where the process has ended already, or cannot be told (``why`` says which).
    """

    pid: int
    uid: int
    gid: int
    pidfd: int | None
    command: str
    why: str = ""
    #: Its supplementary groups, with its own.
    groups: frozenset[int] = frozenset()

    @property
    def process(self) -> Hashable:
        """Tells the process from all others that live; None where that cannot be done."""
        return None if self.pidfd is None else process_of(self.pidfd, self.pid)


def process_of(pidfd: int, pid: int) -> Hashable:
    """What tells the process behind a pidfd from all others that live; None where nothing does.

    From kernel 6.9 on each process has an inode of its own on pidfs, also where it is in a PID
    namespace that we cannot see into. Before, its number has to do, which is 0 for those.
    """
    status = os.fstat(pidfd)
    if status.st_dev != _anonymous_device():
        return status.st_dev, status.st_ino
    return pid or None


@functools.cache
def _anonymous_device() -> int:
    """The device of anonymous inodes, which is where pidfds were before pidfs."""
    fd = os.eventfd(0)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def has_exited(pidfd: int) -> bool:
    """Whether the process behind a pidfd has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def read_user(sock: socket.socket) -> tuple[int, int, int, frozenset[int]]:
    """Pid, uid, gid and groups of the process that connected ``sock``: what is cheap to read.

    Raises OSError.
    """
    pid, uid, gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return pid, uid, gid, _groups(sock) | {gid}


def read_peer(sock: socket.socket) -> Peer:
    """Read the identity of the process that connected ``sock``. Quick; never waits.

    From kernel 6.5 the pidfd is that of the very process that called connect(2). Before, it is
    opened by number, and checked: a process that began after now is another one that got the number
    again. (Between connect and this call the number could in theory have come round already.)
    Raises OSError where that cannot be found out, for want of file descriptors or memory.
    """
    pid, uid, gid, groups = read_user(sock)
    pidfd, why = _pidfd(sock, pid)
    return Peer(pid, uid, gid, pidfd, _command(pid), why, groups)


def _groups(sock: socket.socket) -> frozenset[int]:
    """The supplementary groups that the process had when it connected.

    Not those that the user database tells of: a process can have given groups up. One with more
    than 256 counts as having none, since Python takes no longer answer.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS)
    except OSError as error:
        if error.errno in (errno.ERANGE, errno.ENOPROTOOPT, errno.ENODATA):
            return frozenset()
        raise
    return frozenset(array("I", raw))


#: What the kernel says of a process that has ended and been waited for.
_REAPED = (errno.ESRCH, errno.EINVAL)

_ENDED = "the process that opened this connection has ended"


def _pidfd(sock: socket.socket, pid: int) -> tuple[int | None, str]:
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno in _REAPED:
            return None, _ENDED
        if error.errno != errno.ENOPROTOOPT:
            raise  # out of file descriptors, say: that tells nothing of the process
    else:
        os.set_inheritable(pidfd, False)
        return pidfd, ""
    if pid == 0:
        return None, (
            "the process that opened this connection is in a PID namespace that the daemon cannot "
            "see into, and this kernel (before 6.5) tells no more"
        )
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _REAPED:
            return None, _ENDED
        raise
    if _began_before(pid, now) and not has_exited(pidfd):
        return pidfd, ""
    os.close(pidfd)
    return None, _ENDED


def _began_before(pid: int, now: float) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return False
    # Field 22, counted behind the command, which may hold spaces and parentheses.
    ticks = int(stat[stat.rindex(b")") + 2 :].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK") <= now


def _command(pid: int) -> str:
    """The process's comm. Not cmdline: reading that can be made to hang by its owner."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read(64).rstrip(b"\n").decode("utf-8", "replace")
    except OSError:
        return ""
