"""Filters of system calls, and system calls that another process makes instead (seccomp(2)).

libseccomp makes the filters, so that no machine's numbers are needed here. Runs in the loader's
processes only. May import: ``kpmd.errors``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Iterable
from ctypes import c_char_p, c_int, c_uint, c_uint32, c_uint64, c_ushort, c_void_p
from dataclasses import dataclass

from kpmd.errors import NotSupported

SONAME = "libseccomp.so.2"

#: What becomes of a call (SCMP_ACT_*); ``refuse`` makes one more.
KILL, ALLOW, ASK = 0x80000000, 0x7FFF0000, 0x7FC00000

#: Conditions on an argument (enum scmp_compare).
_EQUAL, _MASKED_EQUAL = 4, 7
#: What becomes of calls of other ABIs (enum scmp_filter_attr).
_BAD_ARCH = 2

_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "seccomp_init": (c_void_p, (c_uint32,)),
    "seccomp_attr_set": (c_int, (c_void_p, c_int, c_uint32)),
    "seccomp_rule_add_array": (c_int, (c_void_p, c_uint32, c_int, c_uint, c_void_p)),
    "seccomp_export_bpf": (c_int, (c_void_p, c_int)),
    "seccomp_syscall_resolve_name": (c_int, (c_char_p,)),
}

#: struct seccomp_notif, _resp and _addfd (include/uapi/linux/seccomp.h).
_CALL, _REPLY, _ADD = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI"), struct.Struct("=QIIII")
_AT_NUMBER = 1  # SECCOMP_ADDFD_FLAG_SETFD
#: SECCOMP_IOCTL_NOTIF_*: powerpc writes the direction of an ioctl in other bits.
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_ADD_FD = 0x80182103 if platform.machine() == "ppc64le" else 0x40182103


_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
#: sizeof(struct sock_filter)
_INSTRUCTION = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Fprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", c_ushort), ("filter", c_void_p))


class _Condition(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (("arg", c_uint), ("op", c_int), ("a", c_uint64), ("b", c_uint64))


def refuse(number: int) -> int:
    """Let a call fail with this errno (SCMP_ACT_ERRNO)."""
    return 0x00050000 | number


def equal(argument: int, value: int) -> _Condition:
    """Where an argument is exactly this."""
    return _Condition(argument, _EQUAL, value, 0)


def without(argument: int, bits: int) -> _Condition:
    """Where an argument has none of these bits."""
    return _Condition(argument, _MASKED_EQUAL, bits, 0)


class Library:
    """The loaded libseccomp. Raises NotSupported where it is missing or too old."""

    def __init__(self, soname: str = SONAME) -> None:
        try:
            self._lib = ctypes.CDLL(soname, use_errno=True)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._lib, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NotSupported(
                f"install libseccomp 2.5 or newer ({soname}): kpmd confines with it the processes"
                f" that load programs; {error}",
                needs=soname,
            ) from error

    def call(self, name: str, *arguments: object) -> int:
        """A call that gives 0 or more; raises OSError when it gives less."""
        result: int = getattr(self._lib, name)(*arguments)
        if result < 0:
            raise OSError(-result, f"{name}: {os.strerror(-result)}")
        return result

    def number(self, name: str) -> int:
        """The number of a system call on this machine; negative where it has none of this name."""
        number: int = self._lib.seccomp_syscall_resolve_name(name.encode())
        return number

    def filter(self, otherwise: int) -> Filter:
        """A filter without a rule: everything is treated as ``otherwise`` says."""
        handle = self._lib.seccomp_init(otherwise)
        if not handle:
            raise MemoryError
        self.call("seccomp_attr_set", handle, _BAD_ARCH, KILL)
        return Filter(self, handle)


class Filter:
    """A filter that is being made. Never freed: its process is, soon."""

    def __init__(self, library: Library, handle: int) -> None:
        self._library, self._handle = library, handle

    def add(self, action: int, names: Iterable[str], *conditions: _Condition) -> None:
        """What becomes of these calls, where all conditions hold."""
        array = (_Condition * len(conditions))(*conditions)
        for name in names:
            number = self._library.number(name)
            if number >= 0:  # else this machine does not have it
                self._library.call(
                    "seccomp_rule_add_array", self._handle, action, number, len(array), array
                )

    def made(self) -> Program:
        """The filter as the kernel takes it, to be used in any number of processes."""
        with os.fdopen(os.memfd_create("kpmd-filter", os.MFD_CLOEXEC), "w+b") as file:
            self._library.call("seccomp_export_bpf", self._handle, file.fileno())
            file.seek(0)
            return Program(file.read(), self._library.number("seccomp"))


class Program:
    """A filter that is made."""

    def __init__(self, code: bytes, number: int) -> None:
        self._code = ctypes.create_string_buffer(code, len(code))
        self._filter = _Fprog(len(code) // _INSTRUCTION, ctypes.addressof(self._code))
        self._number = number

    def load(self) -> None:
        """Put this process under the filter, for good. Raises OSError."""
        self._load(0)

    def load_and_listen(self) -> int:
        """The same; returns the FD on which the calls come that are to be asked about."""
        return self._load(_NEW_LISTENER)

    def _load(self, flags: int) -> int:
        # PR_SET_NO_NEW_PRIVS is set, or the kernel refuses.
        result: int = _libc.syscall(
            ctypes.c_long(self._number),
            ctypes.c_uint(_SET_MODE_FILTER),
            ctypes.c_uint(flags),
            ctypes.byref(self._filter),
        )
        if result < 0:
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
        return result


@dataclass(frozen=True)
class Call:
    """A system call that waits for its answer."""

    id: int
    number: int
    arguments: tuple[int, ...]


class Listener:
    """Where the calls of a filtered process arrive. All methods raise OSError.

    ENOENT: the process that waits for the answer has ended.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The FD, to be polled."""
        return self._fd

    def receive(self) -> Call:
        """The next call."""
        raw = bytearray(_CALL.size)
        fcntl.ioctl(self._fd, _RECEIVE, raw)
        id_, _, _, number, _, _, *arguments = _CALL.unpack(raw)
        return Call(id_, number, tuple(arguments))

    def add(self, call: Call, fd: int, at: int | None = None) -> int:
        """Put an FD into the calling process, with close-on-exec; returns its number there."""
        flags, number = (0, 0) if at is None else (_AT_NUMBER, at)
        raw = _ADD.pack(call.id, flags, fd, number, os.O_CLOEXEC)
        given: int = fcntl.ioctl(self._fd, _ADD_FD, bytearray(raw))
        return given

    def reply(self, call: Call, result: int) -> None:
        """Let the call return this; a negative result is an errno."""
        raw = _REPLY.pack(call.id, max(result, 0), min(result, 0), 0)
        fcntl.ioctl(self._fd, _SEND, bytearray(raw))
