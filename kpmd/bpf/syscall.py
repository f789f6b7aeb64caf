"""The only bpf(2) call of the project."""

from __future__ import annotations

import ctypes
import errno
import os
import platform

from kpmd.bpf.abi import Cmd

#: __NR_bpf by machine (arch/*/entry/syscalls tables).
_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}

#: The verifier gives EAGAIN when a signal is pending; libbpf tries five times too.
_ATTEMPTS = 5

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class BpfError(OSError):
    """bpf(2) failed: ``errno`` and the command."""

    def __init__(self, number: int, cmd: Cmd) -> None:
        super().__init__(number, os.strerror(number))
        self.cmd = cmd

    def __str__(self) -> str:
        return f"bpf({self.cmd.name}): {self.strerror}"


def bpf(cmd: Cmd, attr: ctypes.Structure) -> int:
    """Make the system call; its result is an FD for the commands that make one.

    The buffers that ``attr`` points to must be kept alive by the caller. Raises ``BpfError``.
    Releases the GIL while the kernel works.
    """
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, cmd)
    for attempt in range(_ATTEMPTS):
        result: int = _libc.syscall(
            ctypes.c_long(number),
            ctypes.c_int(cmd),
            ctypes.byref(attr),
            ctypes.c_uint(ctypes.sizeof(attr)),
        )
        if result >= 0:
            return result
        failed = ctypes.get_errno()
        again = failed == errno.EINTR or (failed == errno.EAGAIN and cmd is Cmd.PROG_LOAD)
        if not again or attempt == _ATTEMPTS - 1:
            break
    raise BpfError(failed, cmd)
