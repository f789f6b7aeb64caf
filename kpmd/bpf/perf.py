"""Kprobes one by one, through perf events: for kernels without kprobe multi.

Each target costs a file descriptor: a link to a perf event, or before kernel 5.15 the event itself,
which both end with their FD. May import: ``kpmd.bpf.{abi,fd,objects,progress,syscall}``,
``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kpmd.bpf.abi import (
    LINK_TO_PERF_EVENT,
    PERF_EVENT_KPROBES,
    PERF_FLAG_FD_CLOEXEC,
    AttachType,
    Cmd,
    InfoAttr,
    LinkCreatePerfEventAttr,
    LinkInfoPerfEvent,
    PerfEventAttr,
)
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.objects import LinkDetails, program_info, program_load
from kpmd.bpf.progress import Progress
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import KernelError, NotSupported, TooLarge

#: The kprobe PMU (kernel 4.17, CONFIG_KPROBE_EVENTS).
PMU = "/sys/bus/event_source/devices/kprobe"

#: The most targets in one set. Each takes a file descriptor, of which a process may have 4096 where
#: nothing else is set, and time: 512 were made in 5 to 10 s and removed in 2 to 15 s (5.10, 6.1,
#: 6.12 and 7.3, emulated), and what others do to the machine's trace events waits meanwhile.
MAX_PERF_TARGETS = 512

#: Threads that close links: from 6.1 to 6.12 a close waits 40 ms for other CPUs, and two to four
#: of them wait side by side (200 closes: 8 s one by one, 4 s with these; more threads gain
#: nothing). An event on 5.10 closes in 4 ms, and threads are slower.
_CLOSERS = 4

#: __NR_perf_event_open by machine, as in kpmd.bpf.syscall.
_NUMBERS = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "s390x": 331, "ppc64le": 319}

#: PERF_EVENT_IOC_ENABLE and _SET_BPF: powerpc writes the direction of an ioctl in other bits.
IOC_ENABLE, IOC_SET_BPF = (
    (0x20002400, 0x80042408) if platform.machine() == "ppc64le" else (0x2400, 0x40042408)
)

#: ``r0 = 0; exit``
_RETURN_ZERO = bytes.fromhex("b7000000000000009500000000000000")
_NO_FD = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class PerfAttachError(OSError):
    """A target was not attached to: ``errno``, the ``call`` that gave it, the target's ``index``.

    ``call`` says whose fault it is. ``perf_event_open``: the target's.

    - ENOENT: no such symbol; from about 6.1 on also an address outside the kernel's text.
    - EADDRNOTAVAIL: several functions have this name: give the address. (From 6.7 on, and in the
      stable kernels of its time; others take the first.)
    - EINVAL: cannot be probed: blacklisted, or ``notrace`` (what tracefs does not list is refused
      unless CONFIG_KPROBE_EVENTS_ON_NOTRACE is set), or for a return probe no function's start;
      before 6.1 also an address outside the kernel's text; and a symbol that is no function.
    - EILSEQ: the address is inside an instruction.
    - EPERM: an address from which nothing can be read.
    - E2BIG: the name is longer than the kernel's symbols are (128 characters before 6.1, else 512).
    - EACCES: kpmd lacks CAP_PERFMON; or, on Debian's kernels while kernel.perf_event_paranoid is 3
      or more (their default), CAP_SYS_ADMIN.
    - EMFILE, ENFILE, ENOMEM: as everywhere.

    ``LINK_CREATE`` or ``SET_BPF``: the program's.

    - EINVAL: not a kprobe program, or (LINK_CREATE) one made for kprobe multi.
    - EEXIST: the event has this program already; cannot happen to an event of one's own.

    ``kprobe PMU``: ENOENT where the kernel has none.
    """

    def __init__(self, number: int, call: str, index: int = 0) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call
        self.index = index

    def __str__(self) -> str:
        return f"target {self.index}: {self.call}: {self.strerror}"


@functools.cache
def has_perf_links() -> bool:
    """Whether the kernel makes links to perf events, and so has cookies for them (5.15).

    Asked with an event that is none: a kernel that knows them says EBADF. It takes a program of
    the right attach type to hear that, so one is loaded. Raises KernelError, BpfError.
    """
    with program_load(_RETURN_ZERO, "probe_perf_link", "GPL", AttachType.NONE)[0] as program:
        attr = LinkCreatePerfEventAttr(target_fd=_NO_FD, attach_type=LINK_TO_PERF_EVENT)
        try:
            with program.borrow() as attr.prog_fd:
                bpf(Cmd.LINK_CREATE, attr)
        except BpfError as error:
            if error.errno == errno.EINVAL:
                return False
            if error.errno != errno.EBADF:
                raise
    return True


def _pmu(retprobe: bool) -> tuple[int, int]:
    """The PMU's number, and the config word for probes at entry or at return."""

    def read(name: str) -> str:
        with open(f"{PMU}/{name}", encoding="ascii") as file:
            return file.read().strip()

    try:
        kind = int(read("type"))
        # "config:0": the bit that asks for a return probe.
        return kind, 1 << int(read("format/retprobe").rpartition(":")[2]) if retprobe else 0
    except OSError as error:
        raise PerfAttachError(error.errno or errno.ENOENT, "kprobe PMU") from error


def _open_event(address: int | None, symbol: str | None, retprobe: bool) -> OwnedFd:
    """A kprobe as a perf event, and nothing attached to it."""
    kind, config = _pmu(retprobe)
    attr = PerfEventAttr(type=kind, size=ctypes.sizeof(PerfEventAttr), config=config)
    name = ctypes.create_string_buffer((symbol or "").encode())
    if address is not None:
        attr.config2 = address
    else:
        attr.config1 = ctypes.addressof(name)
    # CPU 0: where the event would be counted. Its BPF program runs on every CPU.
    return open_event(attr, 0, f"kprobe on {symbol if address is None else hex(address)}")


def open_event(attr: PerfEventAttr, cpu: int, what: str) -> OwnedFd:
    """An event of any process on one CPU. Raises PerfAttachError."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise PerfAttachError(errno.ENOSYS, "perf_event_open")
    result: int = _libc.syscall(
        ctypes.c_long(number),
        ctypes.byref(attr),
        ctypes.c_int(-1),
        ctypes.c_int(cpu),
        ctypes.c_int(-1),
        ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC),
    )
    if result < 0:
        raise PerfAttachError(ctypes.get_errno(), "perf_event_open")
    return OwnedFd(result, what)


def _join(program: OwnedFd, event: OwnedFd, cookie: int) -> OwnedFd:
    """Attach the program to the event: the FD that holds the two. Raises OSError."""
    if not has_perf_links():
        with program.borrow() as number:
            fcntl.ioctl(event.fileno(), IOC_SET_BPF, number)
        fcntl.ioctl(event.fileno(), IOC_ENABLE, 0)
        return event
    attr = LinkCreatePerfEventAttr(
        target_fd=event.fileno(), attach_type=LINK_TO_PERF_EVENT, bpf_cookie=cookie
    )
    with program.borrow() as attr.prog_fd:
        link = OwnedFd(bpf(Cmd.LINK_CREATE, attr), f"link to {event.what}")
    # The link holds the event; and ends it, once it is closed itself.
    event.close()
    return link


def attach_one(
    program: OwnedFd, address: int | None, symbol: str | None, *, retprobe: bool, cookie: int
) -> OwnedFd:
    """Attach ``program``, loaded with AttachType.NONE, to one function: until the FD is closed.

    By ``address`` where it is given, else by ``symbol``: 5.10 takes four times as long for that. It
    may be a function's start as kallsyms has it, but the kernel takes any instruction of one that
    can be probed: whether it is a start is for the caller to know. Raises PerfAttachError, and
    NotSupported where the kernel has no cookies and ``cookie`` is not 0.
    """
    if cookie and not has_perf_links():
        raise _no_cookies()
    event = _open_event(address, symbol, retprobe)
    try:
        return _join(program, event, cookie)
    except OSError as error:
        event.close()
        call = error.cmd.name if isinstance(error, BpfError) else "SET_BPF"
        raise PerfAttachError(error.errno or errno.EIO, call) from error
    except BaseException:
        event.close()
        raise


def _no_cookies() -> NotSupported:
    return NotSupported(
        "this kernel attaches to functions one by one, and has cookies for that from 5.15 on only;"
        " attach without them, or from a program of its own for each function",
        needs="kernel 5.15",
    )


def _close_all(fds: Sequence[OwnedFd], threads: int, progress: Progress) -> None:
    """Close all, about the last first, and raise the first error once that is done."""
    progress.phase, progress.done, progress.total = "detaching", 0, len(fds)

    def close(fd: OwnedFd) -> OSError | None:
        try:
            fd.close()
        except OSError as error:
            return error
        return None

    failed: list[OSError] = []

    def take(errors: Iterable[OSError | None]) -> None:
        for done, error in enumerate(errors, 1):
            progress.done = done
            if error is not None:
                failed.append(error)

    if threads > 1 and len(fds) > threads:
        # RuntimeError: no thread can be started. Then this one does what is left.
        with (
            contextlib.suppress(RuntimeError),
            ThreadPoolExecutor(threads, "kpmd-close") as pool,
        ):
            take(pool.map(close, reversed(fds)))
    take(map(close, reversed(fds)))
    if failed:
        raise failed[0]


class PerfLinks:
    """Kprobes on many functions, kept like one link. All methods may be called from any thread."""

    def __init__(self, fds: Sequence[OwnedFd], program_kernel_id: int, links: bool) -> None:
        self._fds = tuple(fds)
        self._program_kernel_id = program_kernel_id
        self._links = links
        self._closing = threading.Lock()
        #: How far ``close`` is.
        self.detaching = Progress(total=len(self._fds))
        #: The links' ids in the kernel, in the targets' order; none before kernel 5.15.
        self.kernel_ids: tuple[int, ...] = (
            tuple(_link_info(fd).id for fd in self._fds) if links else ()
        )

    def __len__(self) -> int:
        return len(self._fds)

    @property
    def handles(self) -> Sequence[OwnedFd]:
        """The file descriptor of each target."""
        return self._fds

    def details(self) -> LinkDetails:
        """All targets together. Raises Closed where it is closed already.

        ``kernel_id`` is the first link's, 0 where the kernel has none; ``missed`` is told from 6.7
        on, and by 6.6 as 0.
        """
        missed: int | None = 0 if self._links else None
        for fd in self._fds:
            if missed is None:
                fd.fileno()
                break
            info = _link_info(fd)
            missed = missed + info.missed if info.event_type in PERF_EVENT_KPROBES else None
        return LinkDetails(
            kernel_id=self.kernel_ids[0] if self._links else 0,
            program_kernel_id=self._program_kernel_id,
            count=len(self._fds),
            missed=missed,
        )

    def close(self) -> None:
        """Detach from all functions, the last first: from all of them, even where one fails.

        Returns when that is done, also where another thread does it. May be called again.
        """
        with self._closing:
            _close_all(self._fds, _CLOSERS if self._links else 1, self.detaching)


def adopt(fds: Sequence[OwnedFd]) -> PerfLinks:
    """The FDs of a ``PerfLinks`` of another process as one here. Takes them over."""
    links = has_perf_links()
    program_kernel_id = _link_info(fds[0]).prog_id if links else 0
    return PerfLinks(fds, program_kernel_id, links)


def _link_info(fd: OwnedFd) -> LinkInfoPerfEvent:
    info = LinkInfoPerfEvent()
    attr = InfoAttr(info_len=ctypes.sizeof(info), info=ctypes.addressof(info))
    try:
        with fd.borrow() as attr.bpf_fd:
            bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
    except BpfError as error:
        raise KernelError(
            f"the kernel gave no information on {fd.what}: {error.strerror}", error.errno or 0
        ) from error
    return info


def attach_all(
    program: OwnedFd,
    addresses: Sequence[int],
    symbols: Sequence[str],
    cookies: Sequence[int],
    retprobe: bool,
    progress: Progress | None = None,
) -> PerfLinks:
    """Attach ``program`` to every target, one after the other: to all of them or to none.

    Exactly one of ``addresses`` and ``symbols``, and ``cookies`` as many or none; see
    ``attach_one``. ``progress`` counts them meanwhile. Raises PerfAttachError with the index of the
    target that failed, NotSupported (cookies before 5.15), TooLarge.
    """
    count = len(addresses) or len(symbols)
    if not count or (addresses and symbols) or len(cookies) not in (0, count):
        raise ValueError("give either symbols or addresses, and as many cookies or none")
    if count > MAX_PERF_TARGETS:
        raise TooLarge(
            f"this kernel attaches to functions one by one, and kpmd to {MAX_PERF_TARGETS} at the"
            f" most in one link: {count} are too many; use several links, or a kernel with kprobe"
            " multi (5.18)"
        )
    links = has_perf_links()
    if cookies and not links:
        raise _no_cookies()
    program_kernel_id = program_info(program).kernel_id
    made: list[OwnedFd] = []
    progress = progress or Progress()
    progress.phase, progress.done, progress.total = "attaching", 0, count
    try:
        for index in range(count):
            try:
                fd = attach_one(
                    program,
                    addresses[index] if addresses else None,
                    None if addresses else symbols[index],
                    retprobe=retprobe,
                    cookie=cookies[index] if cookies else 0,
                )
            except PerfAttachError as error:
                raise PerfAttachError(error.errno or errno.EIO, error.call, index) from error
            made.append(fd)
            progress.done = index + 1
        return PerfLinks(made, program_kernel_id, links)
    except BaseException:
        with contextlib.suppress(OSError):
            _close_all(made, _CLOSERS if links else 1, progress)
        raise
