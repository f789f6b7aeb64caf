"""The memory of ring buffers and of perf buffers, mapped: where records are, not what they are.

All of it is shared with the kernel, and a ring buffer's consumer position also with whom the map
was handed over to: positions are to be checked. Layouts are those of kernel/bpf/ringbuf.c and of
struct perf_event_mmap_page in include/uapi/linux/perf_event.h. May import:
``kpmd.bpf.{abi,fd,perf,syscall}``, ``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import threading
from collections.abc import Sequence

from kpmd.bpf.abi import Cmd, MapElemAttr, PerfEventAttr
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.perf import IOC_ENABLE, PerfAttachError, open_event
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import KernelError, KpmdError, NotSupported

_PAGE = mmap.PAGESIZE

#: Pages of each CPU's perf buffer; a power of two. What is mapped without CAP_IPC_LOCK counts
#: against kernel.perf_event_mlock_kb (516 for each CPU), and beyond it against RLIMIT_MEMLOCK.
_PERF_PAGES = 16

#: PERF_TYPE_SOFTWARE, PERF_COUNT_SW_BPF_OUTPUT, PERF_SAMPLE_RAW.
_SOFTWARE, _BPF_OUTPUT, _SAMPLE_RAW = 1, 10, 1 << 10

#: In 64-bit words from the start of the first page: data_head, data_tail, data_offset, data_size.
_HEAD, _TAIL, _DATA_OFFSET, _DATA_SIZE = 128, 129, 130, 131

_ONLINE = "/sys/devices/system/cpu/online"

_barrier = threading.Lock()


def _fence() -> None:
    """Let no processor take loads and stores of before this for later, or the other way round.

    A lock's release and the next acquire are in order on all machines that Python runs on; x86-64,
    where all of this was tested, would not need it.
    """
    with _barrier:
        pass
    with _barrier:
        pass


class RingMemory:
    """A ring buffer, mapped. Its methods are for one thread."""

    def __init__(self, map_: OwnedFd, size: int) -> None:
        """``size``: the map's max_entries. Raises KernelError. Blocks."""
        self.size = size
        with contextlib.ExitStack() as undo, map_.borrow() as number:
            try:
                self.fd = OwnedFd(os.dup(number), f"ring of {map_.what}")
                undo.callback(self.fd.close)
                self._own = mmap.mmap(number, _PAGE)
                undo.callback(self._own.close)
                # The producer's page, then the data, twice.
                length = _PAGE + 2 * size
                self._theirs = mmap.mmap(number, length, prot=mmap.PROT_READ, offset=_PAGE)
            except (OSError, ValueError) as error:
                raise _unmapped(error) from error
            undo.pop_all()
        self._consumer = memoryview(self._own).cast("Q")
        self._producer = memoryview(self._theirs)[:8].cast("Q")
        #: The data, twice behind itself, so that no record ends before it has begun.
        self.data = memoryview(self._theirs)[_PAGE:]
        self.words = self.data.cast("I")

    def positions(self) -> tuple[int, int]:
        """Where the next record is read, and where the next one is written; they only grow."""
        found = self._consumer[0], self._producer[0]
        _fence()
        return found

    def consume(self, position: int) -> None:
        """Everything before ``position`` may be written over."""
        _fence()
        self._consumer[0] = position

    def fileno(self) -> int:
        """What becomes readable when there are records."""
        return self.fd.fileno()

    def close(self) -> None:
        """Unmap it. May be called again."""
        if not self.fd.closed:
            for view in (self.words, self.data, self._producer, self._consumer):
                view.release()
            self._theirs.close()
            self._own.close()
            self.fd.close()


class PerfMemory:
    """One CPU's perf buffer, mapped."""

    def __init__(self, cpu: int) -> None:
        """Raises PerfAttachError, OSError."""
        self.cpu = cpu
        attr = PerfEventAttr(
            type=_SOFTWARE,
            size=ctypes.sizeof(PerfEventAttr),
            config=_BPF_OUTPUT,
            sample_period=1,
            sample_type=_SAMPLE_RAW,
            wakeup_events=1,
        )
        self.fd = open_event(attr, cpu, f"perf buffer of CPU {cpu}")
        try:
            fcntl.ioctl(self.fd.fileno(), IOC_ENABLE, 0)
            self._memory = mmap.mmap(self.fd.fileno(), (1 + _PERF_PAGES) * _PAGE)
        except BaseException:
            self.fd.close()
            raise
        self._page = memoryview(self._memory)[:_PAGE].cast("Q")
        # Kernels before 4.1 do not tell; kpmd's are newer.
        start, self._size = self._page[_DATA_OFFSET], self._page[_DATA_SIZE]
        self._data = memoryview(self._memory)[start : start + self._size]

    def content(self) -> bytes:
        """All that is written and not yet consumed."""
        head, tail = self._page[_HEAD], self._page[_TAIL]
        _fence()
        start, length = tail % self._size, head - tail
        first = bytes(self._data[start : start + length])
        return first if len(first) == length else first + bytes(self._data[: length - len(first)])

    def consume(self, length: int) -> None:
        """The first ``length`` bytes of ``content`` may be written over."""
        _fence()
        self._page[_TAIL] += length

    def close(self) -> None:
        """Unmap and end it. May be called again."""
        if not self.fd.closed:
            self._data.release()
            self._page.release()
            self._memory.close()
            self.fd.close()


class PerfBuffers:
    """The buffers of a perf event array, one for each CPU that is online."""

    def __init__(self, map_: OwnedFd, cpus: Sequence[int] | None = None) -> None:
        """Puts the buffers into the map. Raises KernelError, NotSupported. Blocks."""
        self._map = map_
        self.buffers: list[PerfMemory] = []
        self._ready = select.epoll()
        try:
            for cpu in online_cpus() if cpus is None else cpus:
                self.buffers.append(PerfMemory(cpu))
                self._put(self.buffers[-1])
                self._ready.register(self.buffers[-1].fd.fileno(), select.EPOLLIN)
        except BpfError as error:
            self.close()
            if error.errno == errno.E2BIG:
                raise NotSupported(
                    "the map has no entry for each CPU: leave max_entries out, or make it as large"
                    " as the machine has CPUs"
                ) from error
            raise _unmapped(error) from error
        except (OSError, ValueError) as error:
            self.close()
            raise _unopened(error) from error
        except BaseException:
            self.close()
            raise

    def _put(self, buffer: PerfMemory) -> None:
        key, value = ctypes.c_uint32(buffer.cpu), ctypes.c_uint32(buffer.fd.fileno())
        attr = MapElemAttr(key=ctypes.addressof(key), value=ctypes.addressof(value))
        with self._map.borrow() as attr.map_fd:
            bpf(Cmd.MAP_UPDATE_ELEM, attr)

    def fileno(self) -> int:
        """What becomes readable when there are records."""
        return self._ready.fileno()

    def close(self) -> None:
        """Take the buffers out of the map, and end them. May be called again. Blocks."""
        self._ready.close()
        for buffer in self.buffers:
            key = ctypes.c_uint32(buffer.cpu)
            attr = MapElemAttr(key=ctypes.addressof(key))
            # The map may be closed already, and its holder may have emptied it.
            with contextlib.suppress(OSError, ValueError), self._map.borrow() as attr.map_fd:
                bpf(Cmd.MAP_DELETE_ELEM, attr)
            buffer.close()


def online_cpus(text: str | None = None) -> list[int]:
    """The CPUs that are online; ``text``: in the form of /sys/devices/system/cpu/online."""
    if text is None:
        with open(_ONLINE, encoding="ascii") as file:
            text = file.read()
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _unmapped(error: Exception) -> KernelError:
    number = error.errno if isinstance(error, OSError) else None
    return KernelError(f"the map's memory cannot be had: {error}", number or errno.EINVAL)


def _unopened(error: Exception) -> KpmdError:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, PerfAttachError) and number in (errno.EACCES, errno.EPERM):
        return NotSupported(
            "the kernel gives kpmd no perf buffers: the administrator must set"
            " kernel.perf_event_paranoid to 2 or less; a ring buffer map needs none",
            errno=errno.errorcode[number],
        )
    if number == errno.EPERM:
        return KernelError(
            "the kernel lets kpmd lock no more memory for perf buffers: close other streams, or"
            " let the administrator raise LimitMEMLOCK= or kernel.perf_event_mlock_kb",
            number,
        )
    return _unmapped(error)
