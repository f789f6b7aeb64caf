"""The system calls of a parser, made by the broker: on its own copies, checked, with its own FDs.

The parser is taken for hostile. Of its memory only what a call points to is read, in bounds and
once; its FD numbers are looked up among what was made for it here. May import:
``kpmd.bpf.{abi,instructions,loader_abi,maps,remote,rights,seccomp,syscall}``, ``kpmd.errors``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kpmd.bpf import instructions
from kpmd.bpf.abi import MAX_INSNS, AttachType, Cmd, MapElemAttr, ProgType
from kpmd.bpf.loader_abi import (
    BtfLoadAttr,
    MapCreateAttr,
    MapFreezeAttr,
    ProgBindMapAttr,
    ProgLoadAttr,
)
from kpmd.bpf.maps import memory_of
from kpmd.bpf.remote import Memory
from kpmd.bpf.rights import Rights
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import BadObject, KpmdError, Quota, TooLarge

#: Bytes of one call's attributes, of BTF (BTF_MAX_SIZE), of a log and of a license.
_ATTR_MOST, _BTF_MOST, LOG_MOST, _LICENSE_MOST = 4096, 16 << 20, 16 << 20, 127
#: Bytes of one record of func_info and line_info (MAX_FUNCINFO_REC_SIZE).
_RECORD_MOST = 252

#: BPF_LOG_LEVEL1 | BPF_LOG_STATS, for the log of a program that the verifier takes; and the
#: statistics alone, for one whose whole log is too long: the kernel refuses that with ENOSPC.
LOG_PLAIN, LOG_STATS, LOG_ALL = 1, 4, 1 | 4

#: libbpf finds out with programs and maps of its own what the kernel can do. They are made, and
#: cannot get out of here: programs of other types than kpmd's, and small maps with its name.
_PROBE_TYPES = frozenset({1, 5, 9})  # SOCKET_FILTER, TRACEPOINT, CGROUP_SOCK
_PROBE_INSNS, _PROBE_MAP_NAME, _PROBE_MAP_BYTES, _PROBES = 16, b"libbpf_", 64, 64
_BTFS = 64

# include/uapi/linux/bpf.h: map types whose values are FDs, and the other one that libbpf fills.
_ARRAY, _PROG_ARRAY, _MAPS_OF_MAPS = 2, 3, frozenset({12, 13})
#: BPF_F_VTYPE_BTF_OBJ_FD and BPF_F_TOKEN_FD: further FDs.
_FD_FLAGS = 1 << 15 | 1 << 16

#: What the parser gets in place of a program's FD: /dev/null.
PLACEHOLDER = 0

#: Called with each program that the verifier begins with: how many it took before, and the name.
Tell = Callable[[int, str], None]

_A = TypeVar("_A", bound=ctypes.Structure)
_M = TypeVar("_M", bound="Made")


@dataclass(frozen=True)
class Made:
    """What was made for the parser. The FD is the broker's, and ends with it."""

    fd: int

    @property
    def given(self) -> int:
        """The FD that the parser gets a copy of."""
        return self.fd


@dataclass(frozen=True)
class MadeBtf(Made):
    """BTF."""


@dataclass(frozen=True)
class MadeMap(Made):
    """A map. The parser may fill it and map its memory: it is its own."""

    type: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class MadeProgram(Made):
    """A program, which the parser cannot use. ``attach`` None: one of libbpf's own."""

    attach: int | None

    @property
    def given(self) -> int:
        """Not the program."""
        return PLACEHOLDER


def _fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Broker:
    """The calls of one parser. ``rights`` None: nothing is refused but what breaks the sandbox."""

    def __init__(
        self,
        memory: Memory,
        limits: Mapping[str, Any],
        rights: Rights | None,
        cpus: int,
        kfunc_name: Callable[[int], str | None],
        tell: Tell,
    ) -> None:
        self._memory, self._limits, self._rights = memory, limits, rights
        self._cpus, self._kfunc_name, self._tell = cpus, kfunc_name, tell
        #: By the number that the parser knows it by.
        self.held: dict[int, Made] = {}
        #: The first thing that was refused: libbpf sees an errno only.
        self.refusal: KpmdError | None = None
        self._maps = self._map_bytes = self._programs = self._probes = self._btfs = 0
        self._taken = 0
        self._log = mmap.mmap(-1, mmap.PAGESIZE)
        self._commands: dict[int, Callable[[int, int], int | Made]] = {
            Cmd.MAP_CREATE: self._create_map,
            Cmd.MAP_UPDATE_ELEM: self._update_map,
            Cmd.MAP_FREEZE: self._freeze_map,
            Cmd.PROG_LOAD: self._load_program,
            Cmd.PROG_BIND_MAP: self._bind_map,
            Cmd.BTF_LOAD: self._load_btf,
        }

    def command(self, cmd: int, address: int, size: int) -> int | Made:
        """One call of bpf(2): its result, or what it made. Raises OSError, as the kernel would."""
        made = self._commands.get(cmd)
        if made is None:
            raise _fail(errno.EINVAL)
        return made(address, size)

    def path(self, address: int, most: int) -> bytes:
        """The path that a call names. Raises OSError."""
        return self._memory.string(address, most)

    def _read(self, kind: type[_A], address: int, size: int) -> _A:
        """A copy of a call's attributes. Like the kernel, it takes no more than it knows."""
        if size > _ATTR_MOST:
            raise _fail(errno.E2BIG)
        raw = bytes(self._memory.read(address, size))
        known = ctypes.sizeof(kind)
        if any(raw[known:]):
            raise _fail(errno.E2BIG)
        return kind.from_buffer_copy(raw[:known].ljust(known, b"\0"))

    def _of(self, kind: type[_M], number: int) -> _M:
        made = self.held.get(number)
        if not isinstance(made, kind):
            raise _fail(errno.EBADF)
        return made

    def _refuse(self, error: KpmdError) -> OSError:
        self.refusal = self.refusal or error
        return _fail(errno.EACCES)

    def _create_map(self, address: int, size: int) -> Made:
        attr = self._read(MapCreateAttr, address, size)
        if attr.map_flags & _FD_FLAGS or attr.map_ifindex or attr.btf_vmlinux_value_type_id:
            raise _fail(errno.EINVAL)
        shape = attr.map_type, attr.key_size, attr.value_size
        needed = memory_of(*shape, attr.max_entries, self._cpus)
        own = attr.map_type == _ARRAY and attr.map_name.startswith(_PROBE_MAP_NAME)
        own = own and needed <= _PROBE_MAP_BYTES
        if own:
            self._probe()
        else:
            self._check_map(_shown(attr.map_name), attr.map_type, needed)
        if attr.inner_map_fd:
            attr.inner_map_fd = self._of(MadeMap, attr.inner_map_fd).fd
        if attr.btf_fd:
            attr.btf_fd = self._of(MadeBtf, attr.btf_fd).fd
        made = MadeMap(bpf(Cmd.MAP_CREATE, attr), *shape)
        if not own:
            self._maps += 1
            self._map_bytes += needed
        return made

    def _check_map(self, name: str, type_number: int, needed: int) -> None:
        # A map of maps has the pattern of its inner ones beside itself.
        if self._maps >= 2 * self._limits["max_maps"]:
            raise self._refuse(BadObject("the object makes more maps than it tells of"))
        total, most = self._map_bytes + needed, self._limits["map_bytes"]
        if total > most:
            raise self._refuse(
                TooLarge(
                    f"the object's maps take about {total >> 20} MiB of kernel memory, and"
                    f" {most >> 20} MiB are allowed: make max_entries smaller"
                )
            )
        if self._rights is None:
            return
        try:
            self._rights.check_map(name, type_number)
        except KpmdError as error:
            raise self._refuse(error) from error
        most = self._rights.map_bytes
        if total > most:
            raise self._refuse(
                Quota(
                    f"the object's maps take {total} bytes of kernel memory or more, with map"
                    f" {name}, and you may have {most} more (map_bytes): make max_entries smaller,"
                    " or delete programs",
                    limit="map_bytes",
                    used=0,
                    most=most,
                    asked=total,
                )
            )

    def _probe(self) -> None:
        self._probes += 1
        if self._probes > _PROBES:
            raise _fail(errno.EPERM)

    def _update_map(self, address: int, size: int) -> int:
        """Fill a map as libbpf does while it loads: variables, programs to call, maps in maps."""
        attr = self._read(MapElemAttr, address, size)
        made = self._of(MadeMap, attr.map_fd)
        if made.type not in {_ARRAY, _PROG_ARRAY, *_MAPS_OF_MAPS}:
            raise _fail(errno.EPERM)
        key = self._memory.read(attr.key, made.key_size)
        value = self._memory.read(attr.value, made.value_size)
        if made.type == _PROG_ARRAY:
            program = self._of(MadeProgram, _number(value))
            if program.attach is None:
                raise _fail(errno.EBADF)
            value = bytearray(struct.pack("=I", program.fd))
        elif made.type in _MAPS_OF_MAPS:
            value = bytearray(struct.pack("=I", self._of(MadeMap, _number(value)).fd))
        attr.map_fd, attr.key, attr.value = made.fd, _address(key), _address(value)
        return bpf(Cmd.MAP_UPDATE_ELEM, attr)

    def _freeze_map(self, address: int, size: int) -> int:
        attr = self._read(MapFreezeAttr, address, size)
        attr.map_fd = self._of(MadeMap, attr.map_fd).fd
        return bpf(Cmd.MAP_FREEZE, attr)

    def _bind_map(self, address: int, size: int) -> int:
        attr = self._read(ProgBindMapAttr, address, size)
        attr.prog_fd = self._of(MadeProgram, attr.prog_fd).fd
        attr.map_fd = self._of(MadeMap, attr.map_fd).fd
        return bpf(Cmd.PROG_BIND_MAP, attr)

    def _load_btf(self, address: int, size: int) -> Made:
        attr = self._read(BtfLoadAttr, address, size)
        self._btfs += 1
        if self._btfs > _BTFS or attr.pad:
            raise _fail(errno.EPERM)
        if attr.btf_size > _BTF_MOST:
            raise _fail(errno.E2BIG)
        content = self._memory.read(attr.btf, attr.btf_size)
        attr.btf = _address(content)
        return MadeBtf(self._logged(Cmd.BTF_LOAD, attr))

    def _load_program(self, address: int, size: int) -> Made:
        attr = self._read(ProgLoadAttr, address, size)
        if attr.prog_flags or attr.prog_ifindex or attr.attach_btf_id:
            raise _fail(errno.EINVAL)
        if attr.insn_cnt > MAX_INSNS:
            raise _fail(errno.E2BIG)
        probe = attr.prog_type != ProgType.KPROBE
        if probe:
            self._probe()
            if attr.prog_type not in _PROBE_TYPES or attr.insn_cnt > _PROBE_INSNS:
                raise _fail(errno.EINVAL)
        else:
            self._programs += 1
            if attr.expected_attach_type not in list(AttachType):
                raise _fail(errno.EINVAL)
        code = self._memory.read(attr.insns, attr.insn_cnt * instructions.SIZE)
        if not probe:
            self._check_program(_shown(attr.prog_name), code)
        self._translate(code)
        license_ = self._memory.string(attr.license, _LICENSE_MOST) + b"\0"
        functions = self._records(attr.func_info, attr.func_info_cnt, attr.func_info_rec_size, attr)
        lines = self._records(attr.line_info, attr.line_info_cnt, attr.line_info_rec_size, attr)
        licensed = bytearray(license_)
        attr.insns, attr.license, attr.kern_version = _address(code), _address(licensed), 0
        attr.func_info, attr.line_info = _address(functions), _address(lines)
        if attr.prog_btf_fd:
            attr.prog_btf_fd = self._of(MadeBtf, attr.prog_btf_fd).fd
        # libbpf tries the kernel with programs that have no name.
        named = not probe and bool(attr.prog_name)
        if named:
            self._tell(self._taken, _shown(attr.prog_name))
        fd = self._logged(Cmd.PROG_LOAD, attr)
        self._taken += named
        return MadeProgram(fd, None if probe else attr.expected_attach_type)

    def _check_program(self, name: str, code: bytearray) -> None:
        # libbpf tries a refused program a second time, for its log; and probes with a few.
        if self._programs > 2 * self._limits["max_programs"] + _PROBES:
            raise self._refuse(BadObject("the object loads more programs than it tells of"))
        if self._rights is not None:
            try:
                instructions.check(name, code, self._rights, self._kfunc_name)
            except KpmdError as error:
                raise self._refuse(error) from error

    def _translate(self, code: bytearray) -> None:
        """Put the broker's FDs where the parser's numbers are; other maps than its cannot be."""
        for each in instructions.special(code):
            if each.code != instructions.LOAD:
                continue
            if each.source in instructions.MAPS:
                fd = self._of(MadeMap, each.number).fd
                struct.pack_into("=i", code, each.at * instructions.SIZE + 4, fd)
            elif each.source in instructions.INDEXED or instructions.names_btf(code, each):
                raise _fail(errno.EBADF)

    def _records(self, address: int, count: int, size: int, attr: ProgLoadAttr) -> bytearray:
        if not count:
            return bytearray()
        if count > attr.insn_cnt or size > _RECORD_MOST:
            raise _fail(errno.EINVAL)
        return self._memory.read(address, count * size)

    def _logged(self, cmd: Cmd, attr: ProgLoadAttr | BtfLoadAttr) -> int:
        """Make a call that tells of itself in a log: in a buffer here, then in the parser's.

        Where the whole log of a program that the verifier takes is too long, the statistics are
        asked for, and then nothing; of a program that it refuses, the plain log.
        """
        level, size, theirs = attr.log_level, attr.log_size, attr.log_buf
        if level not in (0, LOG_PLAIN, LOG_STATS, LOG_ALL) or size > LOG_MOST:
            raise _fail(errno.EINVAL)
        if size > len(self._log):
            self._log = mmap.mmap(-1, size)
        failed: BpfError | None = None
        for each in (LOG_ALL, LOG_STATS, 0, LOG_PLAIN) if level == LOG_ALL else (level,):
            attr.log_level, attr.log_size, attr.log_buf = each, 0, 0
            self._log[0] = 0
            if each:
                attr.log_size, attr.log_buf = size, _address(self._log)
            try:
                fd = bpf(cmd, attr)
            except BpfError as error:
                failed = error
                if each == LOG_ALL and error.errno != errno.ENOSPC:
                    break
            else:
                self._hand_over(theirs, size)
                return fd
        assert failed is not None  # noqa: S101 - there was a try
        self._hand_over(theirs, size)
        raise failed

    def _hand_over(self, address: int, size: int) -> None:
        length = self._log.find(b"\0", 0, size)
        text = self._log[: length if length >= 0 else size]
        if text:
            self._memory.write(address, text[: size - 1] + b"\0")


def _address(buffer: bytearray | mmap.mmap) -> int:
    """Where a buffer lies, which its holder keeps alive through the call; 0 for an empty one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


def _number(value: bytearray) -> int:
    return int.from_bytes(value, sys.byteorder)


def _shown(name: bytes) -> str:
    text = name.decode("ascii", "replace")
    return "".join(c if c.isprintable() and c != "\ufffd" else "?" for c in text)
