"""How the loader's processes give up what they do not need: capabilities, uid, resources.

Imports nothing of kpmd. Runs in the loader's processes only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
from typing import Any

# include/uapi/linux/{prctl,capability,securebits}.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_DROP = 1, 4, 8, 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAP_KILL, _CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP, _CAP_PERFMON, _CAP_BPF = 5, 6, 7, 8, 38, 39
_CAP_VERSION_3 = 0x20080522

#: What a broker keeps, and a parser gives up. CAP_SYS_ADMIN is not among them: nothing needs it.
CHILD_CAPS = frozenset({_CAP_BPF, _CAP_PERFMON})
#: What the server keeps: the above, and what it takes to start, confine and end a child.
SERVER_CAPS = CHILD_CAPS | {_CAP_KILL, _CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP}

#: The most that a child may write into one memory file, in bytes.
FILE_SIZE = 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def prctl(option: int, *arguments: int) -> None:
    """Set an attribute of this process, or raise OSError."""
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) < 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def keep_capabilities(kept: frozenset[int]) -> None:
    """Reduce the effective and permitted set to ``kept``, and empty the inheritable one."""
    header = _CapHeader(_CAP_VERSION_3, 0)
    data = (_CapData * 2)()
    if _libc.capget(ctypes.byref(header), data) < 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index, word in enumerate(data):
        wanted = sum(1 << (cap % 32) for cap in kept if cap // 32 == index)
        word.permitted &= wanted
        word.effective = word.permitted
        word.inheritable = 0
    if _libc.capset(ctypes.byref(header), data) < 0:
        raise OSError(ctypes.get_errno(), "capset")


def forget_capabilities(kept: frozenset[int]) -> None:
    """Let no process that this one starts get others than ``kept`` by any means.

    Only where it may (CAP_SETPCAP): without, there are none that it could get by exec(2), which
    PR_SET_NO_NEW_PRIVS ends.
    """
    for cap in range(64):
        if cap not in kept:
            try:
                prctl(_PR_CAPBSET_DROP, cap)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM):
                    raise
                break  # past the last capability that this kernel knows


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends, which may have happened already."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Have the children of this process's children, when those end, become its own."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_dumpable(wanted: bool) -> None:
    """Whether processes of the same uid may read this one's memory, and a crash leaves a core."""
    prctl(_PR_SET_DUMPABLE, wanted)


def close_others(kept: set[int]) -> None:
    """Close all file descriptors but these."""
    start = 0
    for fd in sorted(kept):
        if fd > start:
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)


def no_more_processes() -> None:
    """Start no further process. Does not hold for root."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def give_up_everything(parent: int) -> None:
    """In a process that ``confine`` has confined: keep no capability, and end with ``parent``.

    Raises OSError.
    """
    keep_capabilities(frozenset())
    no_more_processes()
    die_with(parent)


def confine(limits: dict[str, Any], parent: int) -> None:
    """Give up what it does not take to load BPF objects. Raises OSError."""
    # Out of memory, the kernel takes this one first; where /proc cannot be written, it may choose.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"1000")
    privileged = os.geteuid() == 0
    if privileged:
        # Without capabilities uid 0 still owns half the files of the machine; and RLIMIT_NPROC
        # does not count for it.
        prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(limits["gid"], limits["gid"], limits["gid"])
        os.setresuid(limits["uid"], limits["uid"], limits["uid"])
    keep_capabilities(CHILD_CAPS)
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # After the change of uid, which resets both.
    set_dumpable(False)
    die_with(parent)
    cpu = limits["cpu_seconds"]
    for what, soft, hard in (
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_NOFILE, limits["files"], limits["files"]),
        (resource.RLIMIT_FSIZE, FILE_SIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))
