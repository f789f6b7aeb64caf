"""What comes back from the loader's process for a request, checked as if it were hostile.

May import: ``kpmd.bpf.{abi,fd,progress,syscall}``, ``kpmd.errors``.
"""

from __future__ import annotations

import array
import base64
import ctypes
import json
import os
import socket
from dataclasses import dataclass
from typing import Any

from kpmd.bpf.abi import AttachType, Cmd, InfoAttr, ProgInfo, ProgType
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.progress import Progress
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import (
    BadObject,
    Forbidden,
    Invalid,
    KernelError,
    KpmdError,
    NotSupported,
    Quota,
    TooLarge,
    VerifierRejected,
    WrongAttachType,
)

#: The kernel's limit of FDs in one message.
SCM_MAX_FD = 253

#: Bytes of an answer at the most, and characters of one text in it.
_REPLY_MOST = 1 << 20
_DETAIL_MOST = 16384
NAME_MOST = 255
_LOG_MOST = 64 << 10
_NAMES_MOST = 16
_DIGITS_MOST = 10

#: Bytes of an object's BTF that are kept, to decode its maps with: what is larger is not.
BTF_MOST = 384 << 10
_QUOTA_FIELDS = ("limit", "used", "most", "asked")

#: Errors that a child may answer with and that need no more than their detail.
_ERRORS: dict[str, type[KpmdError]] = {
    each.kind: each for each in (BadObject, TooLarge, WrongAttachType)
}


@dataclass
class LoadedProgram:
    """A program in the kernel."""

    name: str
    attach: AttachType
    fd: OwnedFd
    log: str | None


@dataclass
class LoadedMap:
    """A map in the kernel; an internal one is called after its section (``.rodata``)."""

    name: str
    fd: OwnedFd
    #: Ids in the object's BTF; 0: it says nothing of them.
    key_type: int = 0
    value_type: int = 0


@dataclass
class LoadedObject:
    """What one load made. ``btf``: the object's, as hostile as the object; empty without any."""

    programs: list[LoadedProgram]
    maps: list[LoadedMap]
    btf: bytes = b""

    def close(self) -> None:
        """Close all FDs."""
        for program in self.programs:
            program.fd.close()
        for each in self.maps:
            each.fd.close()


class Answer:
    """What came from a child: bytes and FDs, bounded, and owned from the first moment.

    Before the answer itself, which has no line feed, come lines that tell how far it is.
    """

    def __init__(self, most_fds: int, progress: Progress | None = None) -> None:
        self._most_fds = most_fds
        self._progress = progress or Progress()
        self._length = 0
        self.raw = bytearray()
        self.fds: list[OwnedFd] = []
        self.fault: str | None = None

    def receive(self, reply: socket.socket) -> bool:
        """Take what is there; False at the end or when there is nothing more."""
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            data, control, got, _ = reply.recvmsg(65536, socket.CMSG_SPACE(SCM_MAX_FD * 4), flags)
        except (BlockingIOError, ConnectionResetError):
            return False
        for level, kind, content in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) // numbers.itemsize * numbers.itemsize])
                self.fds += [OwnedFd(number, "loader answer") for number in numbers]
        if got & socket.MSG_CTRUNC:
            self.fault = "its file descriptors did not fit"
        self._length += len(data)
        if self._length > _REPLY_MOST or len(self.fds) > self._most_fds:
            self.fault = "it is too long"
            self.close()
        elif self.fault is None:
            self.raw += data
            while (end := self.raw.find(b"\n")) >= 0:
                self._note(self.raw[:end])
                del self.raw[: end + 1]
        return bool(data)

    def _note(self, line: bytearray) -> None:
        """Take a line of ``loader_broker.tell``; what is none says nothing."""
        done, _, name = line.decode("ascii", "replace").partition(" ")
        if done.isdecimal() and len(done) < _DIGITS_MOST and name.isprintable():
            self._progress.phase = "verifying"
            self._progress.done, self._progress.name = int(done), name[:NAME_MOST]

    def close(self) -> None:
        """Close the FDs that were not handed on."""
        for fd in self.fds:
            fd.close()
        self.fds.clear()


class _NonsenseError(Exception):
    """An answer that no honest child gives."""


def checked(answer: Answer, wanted: tuple[str, ...] | None) -> LoadedObject:
    """Take an answer apart and its FDs over. Raises the error that it tells, or BadObject."""
    try:
        if answer.fault is not None:
            raise _NonsenseError(answer.fault)
        try:
            told = json.loads(answer.raw)
        except (ValueError, RecursionError):
            raise _NonsenseError("it is no JSON") from None
        if not isinstance(told, dict):
            raise _NonsenseError("it is no object")
        if "error" in told:
            raise _error(told)
        return _loaded(told, answer, wanted)
    except _NonsenseError as error:
        raise BadObject(
            f"the process that read the object gave an answer that makes no sense: {error}"
        ) from error


def _loaded(told: dict[str, Any], answer: Answer, wanted: tuple[str, ...] | None) -> LoadedObject:
    programs, maps = told.get("programs"), told.get("maps")
    if not isinstance(programs, list) or not isinstance(maps, list) or not programs:
        raise _NonsenseError("it has no programs or no maps")
    if len(programs) + len(maps) != len(answer.fds):
        raise _NonsenseError("it tells of more or fewer file descriptors than came")
    names = [_text(each, "name", NAME_MOST) for each in (*programs, *maps)]
    program_names, map_names = names[: len(programs)], names[len(programs) :]
    if wanted is not None and set(program_names) != set(wanted):
        raise _NonsenseError("it has other programs than were asked for")
    if any(len(set(each)) != len(each) for each in (program_names, map_names)):
        raise _NonsenseError("a name comes twice")
    attach = [_attach(each) for each in programs]
    logs = [None if each.get("log") is None else _text(each, "log", _LOG_MOST) for each in programs]
    for index, fd in enumerate(answer.fds):
        _check_fd(fd, program=index < len(programs))
    btf = _btf(told.get("btf"))
    types = [(_type_id(each, "key_type"), _type_id(each, "value_type")) for each in maps]
    fds, answer.fds = answer.fds, []
    for fd, name in zip(fds, names, strict=True):
        fd.what = f"{'program' if fd in fds[: len(programs)] else 'map'} {name}"
    return LoadedObject(
        [
            LoadedProgram(*each)
            for each in zip(program_names, attach, fds[: len(programs)], logs, strict=True)
        ],
        [
            LoadedMap(name, fd, *ids)
            for name, fd, ids in zip(map_names, fds[len(programs) :], types, strict=True)
        ],
        btf,
    )


def _type_id(told: Any, name: str) -> int:
    value = told.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise _NonsenseError(f"`{name}` is missing, or no id of a type")
    return value


def _btf(told: object) -> bytes:
    if not isinstance(told, str) or len(told) > BTF_MOST * 4 // 3 + 4:
        raise _NonsenseError("its BTF is missing or too long")
    try:
        return base64.b64decode(told, validate=True)
    except ValueError:
        raise _NonsenseError("its BTF is not in base64") from None


def _text(told: Any, name: str, most: int) -> str:
    value = told.get(name) if isinstance(told, dict) else None
    if not isinstance(value, str) or len(value) > most:
        raise _NonsenseError(f"`{name}` is missing, no text or too long")
    return value.encode("utf-8", "replace").decode()


def _attach(told: dict[str, Any]) -> AttachType:
    number = told.get("attach")
    if not isinstance(number, int) or number not in list(AttachType):
        raise _NonsenseError("an attach type is unknown")
    return AttachType(number)


def _check_fd(fd: OwnedFd, *, program: bool) -> None:
    """Ask the kernel what an FD is: the numbers in a map's info could pass for a program's."""
    expected = "anon_inode:bpf-prog" if program else "anon_inode:bpf-map"
    if os.readlink(f"/proc/self/fd/{fd.fileno()}") != expected:
        raise _NonsenseError("a file descriptor is not what it is said to be")
    info = ProgInfo()
    size = ctypes.sizeof(info) if program else ctypes.sizeof(ctypes.c_uint32) * 2
    attr = InfoAttr(bpf_fd=fd.fileno(), info_len=size, info=ctypes.addressof(info))
    try:
        bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
    except BpfError as error:
        raise _NonsenseError(f"the kernel does not know a file descriptor ({error})") from error
    if program and info.type != ProgType.KPROBE:
        raise _NonsenseError("a program is of another type")


def _names(told: object) -> list[str]:
    if not isinstance(told, list) or len(told) > _NAMES_MOST:
        raise _NonsenseError("what is refused is no list")
    return [_text({"name": each}, "name", NAME_MOST) for each in told]


def _error(told: dict[str, Any]) -> KpmdError:
    """The error that a child reports, of the kinds that it may report, within bounds."""
    kind, fields = told["error"], told.get("fields")
    detail = _text(told, "detail", _DETAIL_MOST)
    fields = fields if isinstance(fields, dict) else {}
    if kind == KernelError.kind:
        number = told.get("errno")
        if not isinstance(number, int) or not 0 < number < 4096:
            raise _NonsenseError("an errno is out of range")
        return KernelError(detail, number)
    if kind == VerifierRejected.kind:
        log = _text(fields, "verifier_log", _LOG_MOST)
        number = None if fields.get("errno") is None else _text(fields, "errno", NAME_MOST)
        truncated = fields.get("verifier_log_truncated") is True
        return VerifierRejected(detail, log, truncated, errno=number)
    if kind == Invalid.kind:
        errors = fields.get("errors")
        first = errors[0] if isinstance(errors, list) and len(errors) == 1 else None
        loc = first.get("loc") if isinstance(first, dict) else None
        if not isinstance(loc, list) or not 0 < len(loc) < 8:
            raise _NonsenseError("an error has no place")
        if not all(isinstance(part, str | int) for part in loc):
            raise _NonsenseError("the place of an error is no path")
        return Invalid.at(loc, _text(first, "msg", _DETAIL_MOST))
    if kind == Forbidden.kind:
        return Forbidden(detail, refused=_names(fields.get("refused")))
    if kind == Quota.kind:
        return Quota(detail, **{name: fields.get(name) for name in _QUOTA_FIELDS})
    if kind == NotSupported.kind:
        return NotSupported(detail, needs=_text(fields, "needs", NAME_MOST))
    known = _ERRORS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise _NonsenseError("an error is of an unknown kind")
    return known(detail)
