"""Parsers that were taken over: what runs in place of libbpf, in the loader's confined process.

The object is the name of an attack. What one found out comes back as the detail of a bad-object.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from kpmd.bpf.abi import Cmd, MapElemAttr
from kpmd.bpf.libbpf import Library
from kpmd.bpf.loader_abi import (
    BtfLoadAttr,
    MapCreateAttr,
    MapFreezeAttr,
    ProgBindMapAttr,
    ProgLoadAttr,
)
from kpmd.bpf.loader_end import problem
from kpmd.bpf.syscall import bpf
from kpmd.errors import BadObject, KpmdError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)

_RETURN = bytes.fromhex("b7000000000000009500000000000000")
_KPROBE, _SOCKET_FILTER, _XDP = 2, 1, 6
_HASH, _ARRAY, _PROG_ARRAY, _SOCKMAP, _ARRAY_OF_MAPS = 1, 2, 3, 15, 12
_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 0)
_SECCOMP = {"x86_64": 317, "aarch64": 277}.get(platform.machine(), 0)

#: Keeps buffers alive that calls point to.
_kept: list[object] = []


def attack(
    library: Library | KpmdError, limits: dict[str, Any], head: dict[str, Any], elf: bytes
) -> dict[str, Any]:
    """In place of ``loader_child.load_object``."""
    result = ATTACKS[elf.decode()]()
    return result if isinstance(result, dict) else told(result)


def told(result: object) -> dict[str, Any]:
    """What an attack found out."""
    return problem(BadObject(f"told: {result}"))


def tried(call: Callable[[], object]) -> str:
    """The errno's name, or that it worked."""
    try:
        result = call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return f"worked: {result}"


def all_of(*calls: Callable[[], object]) -> str:
    """What became of several."""
    return " ".join(dict.fromkeys(tried(call) for call in calls))


def address(content: bytes) -> int:
    """Where a copy of the bytes lies."""
    buffer = ctypes.create_string_buffer(content, max(1, len(content)))
    _kept.append(buffer)
    return ctypes.addressof(buffer)


def raw_bpf(cmd: int, where: int, size: int) -> int:
    """bpf(2) with anything."""
    result: int = _libc.syscall(
        ctypes.c_long(_BPF), ctypes.c_int(cmd), ctypes.c_void_p(where), ctypes.c_uint(size)
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), "bpf")
    return result


def make_map(kind: int = _ARRAY, value: int = 8, entries: int = 1, **more: Any) -> int:
    """A map."""
    attr = MapCreateAttr(map_type=kind, key_size=4, value_size=value, max_entries=entries, **more)
    return bpf(Cmd.MAP_CREATE, attr)


def load(code: bytes = _RETURN, kind: int = _KPROBE, **more: Any) -> int:
    """A program."""
    fields = {"insn_cnt": len(code) // 8, "insns": address(code), "license": address(b"GPL\0")}
    return bpf(Cmd.PROG_LOAD, ProgLoadAttr(prog_type=kind, **{**fields, **more}))


def update(map_fd: int, value: bytes) -> int:
    """Put a value at 0."""
    attr = MapElemAttr(map_fd=map_fd, key=address(bytes(4)), value=address(value))
    return bpf(Cmd.MAP_UPDATE_ELEM, attr)


def number(fd: int) -> bytes:
    """An FD as the value of a map."""
    return struct.pack("=I", fd)


def uses_map(fd: int, source: int = 1) -> bytes:
    """A program with a reference to a map."""
    return struct.pack("=BBhi", 0x18, 1 | source << 4, 0, fd) + bytes(8) + _RETURN


def a_map(fd: object, **changed: Any) -> dict[str, Any]:
    """What a parser says of a map."""
    return {"name": "m", "fd": fd, "key_type": 0, "value_type": 0, **changed}


def honest(**changed: Any) -> dict[str, Any]:
    """What a true parser says, or nearly."""
    program, map_ = load(), make_map()
    answer: dict[str, Any] = {
        "programs": [{"name": "p", "fd": program, "log": None}],
        "maps": [a_map(map_)],
        "btf": "",
    }
    return {**answer, **changed}


def claim(fd: object, map_: object = None) -> Callable[[], dict[str, Any]]:
    """An answer with an FD that is not what it is said to be."""
    maps = [] if map_ is None else [a_map(map_)]
    programs = [{"name": "p", "fd": fd, "log": None}]
    return lambda: honest(programs=programs, maps=maps)


def fork_everything() -> object:
    """Start a process."""
    return os.fork()


def run_a_shell() -> object:
    """Become another program."""
    return _libc.execv(b"/bin/sh", None)


def make_code() -> object:
    """Memory that can be executed."""
    made = _libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, 0x22, -1, 0)
    return hex(made)


def turn_to_code() -> object:
    """Memory of its own made executable."""
    area = mmap.mmap(-1, 4096)
    where = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return _libc.mprotect(ctypes.c_void_p(where), ctypes.c_size_t(4096), 7)


def send_fd() -> object:
    """Pass an FD on."""
    channel = socket.socket(fileno=os.dup(0))
    return socket.send_fds(channel, [b"x"], [0])


def crowd() -> object:
    """As many calls as time allows."""
    while True:
        tried(lambda: os.open("/etc/shadow", os.O_RDONLY))


def wait_for_ever() -> object:
    """Say nothing."""
    lock = threading.Lock()
    return lock.acquire() and lock.acquire()


def burn() -> object:
    """Take processor time."""
    while True:
        pass


def eat() -> object:
    """Take memory."""
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


def talk() -> object:
    """Say more than anybody wants to hear."""
    return {"error": "bad-object", "detail": "x" * (8 << 20)}


def many_maps() -> object:
    """Maps without end."""
    while True:
        make_map()


def many_probes() -> str:
    """Programs that are none of kpmd's kinds, without end."""
    return all_of(*[lambda: load(kind=_SOCKET_FILTER) and "probe"] * 100)


def hand_out_number(fd: int) -> Callable[[], object]:
    """Write to the end of a log that is not the parser's to have."""
    return lambda: load(log_level=1, log_size=4096, log_buf=fd)


_NONE = 1 << 62  # an address of nothing

ATTACKS: dict[str, Callable[[], object]] = {
    "nothing": honest,
    # Files.
    "open": lambda: all_of(
        lambda: os.open("/etc/passwd", os.O_RDONLY),
        lambda: os.open("/proc/self/mem", os.O_RDWR),
        lambda: os.open("/sys/kernel/btf/../btf/vmlinux", os.O_RDONLY),
        lambda: os.open("sys/kernel/btf/vmlinux", os.O_RDONLY),
        lambda: os.open("/" + "x" * 300, os.O_RDONLY),
    ),
    "open-write": lambda: all_of(
        lambda: os.open("/sys/devices/system/cpu/possible", os.O_RDWR),
        lambda: os.open("/sys/devices/system/cpu/possible", os.O_RDONLY | os.O_CREAT),
    ),
    "open-allowed": lambda: all_of(
        lambda: os.read(os.open("/sys/devices/system/cpu/possible", os.O_RDONLY), 1)
    ),
    "stat": lambda: all_of(lambda: os.stat("/etc/passwd"), lambda: os.readlink("/proc/self/exe")),
    "unlink": lambda: os.unlink("/tmp/x"),
    "chdir": lambda: os.chdir("/"),
    "mkdir": lambda: os.mkdir("/tmp/x"),
    # The rest of the machine.
    "socket": lambda: socket.socket(),
    "socketpair": lambda: socket.socketpair(),
    "fork": fork_everything,
    "thread": lambda: threading.Thread(target=int).start(),
    "exec": run_a_shell,
    "ptrace": lambda: _libc.ptrace(16, os.getpid(), 0, 0),
    "kill-itself": lambda: os.kill(os.getpid(), 19),
    "kill-broker": lambda: os.kill(os.getppid(), 9),
    "prctl": lambda: _libc.prctl(4, 1, 0, 0, 0),
    "seccomp": lambda: _libc.syscall(_SECCOMP, 0, 0, 0),
    "ioctl": lambda: all_of(lambda: struct.pack("i", os.get_terminal_size(0).columns)),
    "dup": lambda: os.dup(0),
    "send-fd": send_fd,
    "make-code": make_code,
    "turn-to-code": turn_to_code,
    "abort": os.abort,
    # Time and memory.
    "crowd": crowd,
    "wait": wait_for_ever,
    "burn": burn,
    "eat": eat,
    "talk": talk,
    "many-maps": many_maps,
    "many-probes": many_probes,
    # bpf(2).
    "commands": lambda: all_of(
        *(
            lambda cmd=cmd: raw_bpf(cmd, address(bytes(64)), 64)
            for cmd in range(-1, 64)
            if cmd not in (0, 2, 5, 18, 22, 35)
        )
    ),
    "attr-nowhere": lambda: all_of(
        *(
            lambda cmd=cmd, at=at: raw_bpf(cmd, at, 64)
            for cmd in (0, 2, 5, 18)
            for at in (0, 4096, _NONE, 1 << 63, (1 << 64) - 64)
        )
    ),
    "attr-large": lambda: all_of(
        lambda: raw_bpf(0, address(bytes(8192)), 8192),
        lambda: raw_bpf(0, address(bytes(8192)), 0xFFFFFFFF),
        lambda: raw_bpf(0, address(b"\1" * 128), 128),
        lambda: raw_bpf(5, address(b"\0" * 119 + b"\1"), 120),
    ),
    "program-types": lambda: all_of(
        *(
            lambda kind=kind: load(kind=kind)
            for kind in (0, 3, 4, _XDP, 7, 8, 13, 17, 26, 28, 29, 31, 99)
        )
    ),
    "program-attach": lambda: all_of(
        lambda: load(expected_attach_type=24),
        lambda: load(attach_btf_id=1),
        lambda: load(prog_flags=16),
        lambda: load(prog_ifindex=1),
        lambda: load(_RETURN * 9, _SOCKET_FILTER),
    ),
    "program-large": lambda: all_of(
        lambda: load(insn_cnt=0xFFFFFFFF),
        lambda: load(insn_cnt=1_000_001),
    ),
    "program-nowhere": lambda: all_of(
        lambda: load(insns=_NONE),
        lambda: load(license=_NONE),
        lambda: load(insn_cnt=1_000_000),
        lambda: load(func_info=_NONE, func_info_cnt=1, func_info_rec_size=8),
        lambda: load(line_info=_NONE, line_info_cnt=1, line_info_rec_size=16),
        lambda: bpf(Cmd.BTF_LOAD, BtfLoadAttr(btf=_NONE, btf_size=100)),
    ),
    "records": lambda: all_of(
        lambda: load(func_info=address(bytes(64)), func_info_cnt=3, func_info_rec_size=8),
        lambda: load(line_info=address(bytes(64)), line_info_cnt=1, line_info_rec_size=1 << 30),
        lambda: load(log_level=255, log_size=64, log_buf=address(bytes(64))),
        lambda: load(log_level=1, log_size=0xFFFFFFFF, log_buf=address(bytes(64))),
    ),
    "license": lambda: all_of(lambda: load(license=address(b"x" * 5000))),
    "foreign-maps": lambda: all_of(
        *(
            lambda fd=fd, source=source: load(uses_map(fd, source))
            for fd in (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50)
            for source in (1, 2, 5, 6)
        )
    ),
    "foreign-fds": lambda: all_of(
        lambda: update(60, bytes(8)),
        lambda: bpf(Cmd.MAP_FREEZE, MapFreezeAttr(map_fd=60)),
        lambda: bpf(Cmd.PROG_BIND_MAP, ProgBindMapAttr(prog_fd=load(), map_fd=60)),
        lambda: bpf(Cmd.PROG_BIND_MAP, ProgBindMapAttr(prog_fd=60, map_fd=make_map())),
        lambda: make_map(_ARRAY_OF_MAPS, 4, inner_map_fd=60),
        lambda: make_map(btf_fd=60),
        lambda: load(prog_btf_fd=60),
        # Not a map, but a program: and the other way round.
        lambda: update(load(), bytes(8)),
        lambda: bpf(Cmd.MAP_FREEZE, MapFreezeAttr(map_fd=load())),
        lambda: load(uses_map(load())),
        lambda: make_map(btf_fd=make_map()),
        lambda: load(prog_btf_fd=load()),
    ),
    "tail-calls": lambda: all_of(
        *(lambda fd=fd: update(make_map(_PROG_ARRAY, 4), number(fd)) for fd in (0, 3, 5, 50)),
        lambda: update(make_map(_PROG_ARRAY, 4), number(make_map())),
        lambda: update(make_map(_PROG_ARRAY, 4), number(load(kind=_SOCKET_FILTER))),
        lambda: update(make_map(_ARRAY_OF_MAPS, 4, inner_map_fd=make_map()), number(load())),
    ),
    "tail-call": lambda: all_of(lambda: update(make_map(_PROG_ARRAY, 4), number(load()))),
    "other-maps": lambda: all_of(
        lambda: update(make_map(_HASH), bytes(8)),
        lambda: update(make_map(6), bytes(64)),
    ),
    "map-fields": lambda: all_of(
        lambda: make_map(map_flags=1 << 15),
        lambda: make_map(map_flags=1 << 16),
        lambda: make_map(map_ifindex=1),
        lambda: make_map(btf_vmlinux_value_type_id=5),
    ),
    "map-large": lambda: all_of(lambda: make_map(value=1 << 20, entries=1 << 20)),
    "hidden-map": lambda: all_of(
        lambda: make_map(value=1 << 20, entries=1 << 20, map_name=b"libbpf_global")
    ),
    # Of no entries, and so of no bytes.
    "hidden-type": lambda: all_of(lambda: make_map(29, entries=0, map_name=b"libbpf_global")),
    "real-program": lambda: os.pread(load(), 1, 0),
    "log": lambda: all_of(hand_out_number(_NONE), hand_out_number(4096), hand_out_number(0)),
    # Lies.
    "lie-nothing": dict,
    "lie-list": lambda: {"programs": 1, "maps": 2},
    "lie-number": claim(4000),
    "lie-null": claim(0),
    "lie-text": claim("3"),
    "lie-float": claim(3.5),
    "lie-list-fd": claim([3]),
    "lie-map-as-program": lambda: honest(programs=[{"name": "p", "fd": make_map(), "log": None}]),
    "lie-program-as-map": lambda: honest(maps=[a_map(load())]),
    "lie-probe": lambda: honest(
        programs=[{"name": "p", "fd": load(kind=_SOCKET_FILTER), "log": None}]
    ),
    "lie-btf": lambda: honest(maps=[a_map(os.memfd_create("x"))]),
    "lie-deep": lambda: honest(programs=_nested(500)),
    "lie-forbidden": lambda: {"error": "forbidden", "detail": "x", "fields": {"refused": ["y"]}},
    "lie-quota": lambda: {"error": "quota", "detail": "x", "fields": {"limit": "programs"}},
    "lie-error": lambda: {"error": ["bad-object"], "detail": "x"},
    "lie-words": lambda: {"error": "bad-object", "detail": {"x": 1}},
    "lie-log": lambda: honest(programs=[{"name": "p", "fd": load(), "log": "x" * 70_000}]),
    "lie-name": lambda: honest(programs=[{"name": 7, "fd": load(), "log": None}]),
    "lie-type": lambda: honest(maps=[a_map(make_map(), key_type="1")]),
    "lie-no-type": lambda: honest(maps=[{"name": "m", "fd": make_map()}]),
    "lie-types": lambda: honest(btf="?"),
    "lie-long-types": lambda: honest(btf="A" * 600_000),
    "lie-no-types": lambda: honest(btf=None),
    "lie-twice": lambda: honest(maps=[a_map(make_map())] * 200),
}


def _nested(depth: int) -> object:
    nested: object = []
    for _ in range(depth):
        nested = [nested]
    return nested
