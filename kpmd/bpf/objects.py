"""Programs, links and maps: one typed function per thing that bpf(2) makes or tells of them."""

from __future__ import annotations

import ctypes
import errno
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kpmd.bpf.abi import (
    MAP_TYPES,
    MAX_INSNS,
    OBJ_NAME_LEN,
    PERCPU_TYPES,
    AttachType,
    Cmd,
    InfoAttr,
    KprobeMultiFlag,
    LinkCreateKprobeMultiAttr,
    LinkInfoKprobeMulti,
    MapInfo,
    ProgInfo,
    ProgLoadAttr,
    ProgType,
)
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import KernelError, TooLarge, VerifierRejected

#: Bytes of a verifier log that a client gets at the most: its end, where the reason stands.
LOG_SHOWN = 64 << 10

_LOG_FIRST = 256 << 10
_LOG_MOST = 16 << 20


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel tells of a program (BPF_OBJ_GET_INFO_BY_FD)."""

    kernel_id: int
    name: str
    tag: str
    verified_instructions: int
    jited_bytes: int
    map_ids: tuple[int, ...]


@dataclass(frozen=True)
class MapDetails:
    """What the kernel tells of a map."""

    kernel_id: int
    name: str
    type: str
    type_number: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0

    @property
    def percpu(self) -> bool:
        """Whether it keeps a value for each possible CPU."""
        return self.type_number in PERCPU_TYPES


@dataclass(frozen=True)
class LinkDetails:
    """What the kernel tells of a link, or of all the links to perf events that stand for one.

    ``count`` needs kernel 6.6 and ``missed`` (calls that were not counted) 6.7; older ones tell
    neither, and both are None there.
    """

    kernel_id: int
    program_kernel_id: int
    count: int | None
    missed: int | None


def clip_log(raw: bytes) -> tuple[str, bool]:
    """The last ``LOG_SHOWN`` bytes of a verifier log as text, and whether more was cut off."""
    raw = raw.rstrip(b"\0")
    truncated = len(raw) > LOG_SHOWN
    return raw[-LOG_SHOWN:].decode("utf-8", "replace"), truncated


def _explain(error: BpfError, what: str) -> KernelError:
    number = error.errno or 0
    hints = {
        errno.EPERM: "kpmd lacks CAP_BPF and CAP_PERFMON, or the kernel is locked down",
        errno.ENOMEM: "the kernel is out of memory; ask for less at once or try later",
        errno.EMFILE: "the daemon has no file descriptor left; detach something and try again",
        errno.ENOSYS: "this kernel has no bpf(2)",
    }
    hint = hints.get(number, error.strerror or "")
    return KernelError(f"{what}: {hint}", number)


def program_load(
    instructions: bytes,
    name: str,
    license_: str,
    attach: AttachType,
    *,
    want_log: bool = False,
) -> tuple[OwnedFd, str | None]:
    """Load raw eBPF instructions as a kprobe program for links of type ``attach``.

    ``name`` is cut to the 15 bytes that the kernel keeps. Returns the program's FD and, with
    ``want_log``, the verifier's log. Raises VerifierRejected, TooLarge, KernelError. Needs CAP_BPF
    and CAP_PERFMON. Success proves nothing about the attach type: the kernel looks at it only when
    it links (seen on 6.12).
    """
    count = len(instructions) // 8
    if count > MAX_INSNS:
        raise TooLarge(
            f"the program has {count} instructions; the kernel takes {MAX_INSNS} at the most"
        )
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licensed = ctypes.create_string_buffer(license_.encode())
    attr = ProgLoadAttr(
        prog_type=ProgType.KPROBE,
        insn_cnt=count,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(licensed),
        prog_name=name.encode()[: OBJ_NAME_LEN - 1],
        expected_attach_type=attach,
    )
    if not want_log:
        try:
            return OwnedFd(bpf(Cmd.PROG_LOAD, attr), f"program {name}"), None
        except BpfError as error:
            # The verifier is asked again for its words only where words may be had.
            if error.errno in (errno.EPERM, errno.ENOMEM, errno.ENOSYS, errno.EMFILE):
                raise _explain(error, "the kernel did not load the program") from error
    size = _LOG_FIRST
    while True:
        log = ctypes.create_string_buffer(size)
        attr.log_level, attr.log_size, attr.log_buf = 1, size, ctypes.addressof(log)
        try:
            fd = OwnedFd(bpf(Cmd.PROG_LOAD, attr), f"program {name}")
        except BpfError as error:
            if error.errno == errno.ENOSPC and size < _LOG_MOST:
                size *= 4
                continue
            text, truncated = clip_log(log.value)
            if text:
                raise VerifierRejected(
                    "the kernel's verifier refused the program; verifier_log says where and why",
                    text,
                    truncated or error.errno == errno.ENOSPC,
                    errno=errno.errorcode.get(error.errno or 0),
                ) from error
            raise _explain(error, "the kernel did not load the program") from error
        return fd, clip_log(log.value)[0]


def _info(fd: OwnedFd, info: ctypes.Structure) -> None:
    with fd.borrow() as number:
        attr = InfoAttr(bpf_fd=number, info_len=ctypes.sizeof(info), info=ctypes.addressof(info))
        try:
            bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
        except BpfError as error:
            raise _explain(error, f"the kernel gave no information on {fd.what}") from error


def program_info(fd: OwnedFd) -> ProgramInfo:
    """What the kernel tells of the program behind ``fd``."""
    info = ProgInfo()
    _info(fd, info)
    ids: tuple[int, ...] = ()
    if info.nr_map_ids:
        numbers = (ctypes.c_uint32 * info.nr_map_ids)()
        info = ProgInfo(nr_map_ids=len(numbers), map_ids=ctypes.addressof(numbers))
        _info(fd, info)
        ids = tuple(numbers)
    return ProgramInfo(
        kernel_id=info.id,
        name=info.name.decode("ascii", "replace"),
        tag=bytes(info.tag).hex(),
        verified_instructions=info.verified_insns,
        jited_bytes=info.jited_prog_len,
        map_ids=ids,
    )


def map_info(fd: OwnedFd) -> MapDetails:
    """What the kernel tells of the map behind ``fd``."""
    info = MapInfo()
    _info(fd, info)
    return MapDetails(
        kernel_id=info.id,
        name=info.name.decode("ascii", "replace"),
        type=MAP_TYPES.get(info.type, f"type_{info.type}"),
        type_number=info.type,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
    )


def link_info(fd: OwnedFd) -> LinkDetails:
    """What the kernel tells of the kprobe-multi link behind ``fd``, without its list of targets."""
    info = LinkInfoKprobeMulti()
    _info(fd, info)
    # A kernel before 6.6 leaves count at 0, which no real link has; missed came a release later,
    # where it is told as 0 by 6.6 too: None there would need the release, and 0 misleads nobody.
    known = info.count > 0
    return LinkDetails(
        kernel_id=info.id,
        program_kernel_id=info.prog_id,
        count=info.count if known else None,
        missed=info.missed if known else None,
    )


def link_type(fd: OwnedFd) -> int:
    """The type of the link behind ``fd`` (enum bpf_link_type)."""
    info = LinkInfoKprobeMulti()
    _info(fd, info)
    number: int = info.type
    return number


def link_addresses(fd: OwnedFd, count: int) -> list[tuple[int, int]]:
    """The (address, cookie) pairs of a link in the kernel's order, which is by address.

    ``count`` is that of ``link_info``. Addresses are zeros unless the caller may see kernel
    addresses (CAP_SYSLOG and kptr_restrict at 1 or lower); cookies need kernel 6.9.
    """
    addresses = (ctypes.c_uint64 * count)()
    cookies = (ctypes.c_uint64 * count)()
    info = LinkInfoKprobeMulti(
        addrs=ctypes.addressof(addresses), count=count, cookies=ctypes.addressof(cookies)
    )
    _info(fd, info)
    return list(zip(addresses, cookies, strict=True))


def _u64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * len(values)).from_buffer_copy(array("Q", values))


def link_create(
    program: OwnedFd,
    attach: AttachType,
    *,
    retprobe: bool = False,
    addresses: Sequence[int] = (),
    symbols: Sequence[bytes] = (),
    cookies: Sequence[int] = (),
) -> OwnedFd:
    """Attach ``program`` to every target in one BPF_LINK_CREATE: all of them or none.

    Exactly one of ``addresses`` (function starts, as kallsyms has them: by another one the program
    reads cookie 0) and ``symbols``. Raises ``BpfError`` as the kernel gave it: what an errno means
    depends on the feature test (see kpmd.bpf.kernel).
    """
    count = len(addresses) or len(symbols)
    attr = LinkCreateKprobeMultiAttr(
        attach_type=attach,
        kprobe_multi_flags=KprobeMultiFlag.RETURN if retprobe else 0,
        cnt=count,
    )
    # Locals keep the buffers alive through the call.
    if addresses:
        address_array = _u64s(addresses)
        attr.addrs = ctypes.addressof(address_array)
    else:
        names = (ctypes.c_char_p * count)(*symbols)
        attr.syms = ctypes.addressof(names)
    if cookies:
        cookie_array = _u64s(cookies)
        attr.cookies = ctypes.addressof(cookie_array)
    with program.borrow() as attr.prog_fd:
        return OwnedFd(bpf(Cmd.LINK_CREATE, attr), f"link of {program.what}")
