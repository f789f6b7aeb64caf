"""A ring buffer and perf buffers in plain memory, as the kernel lays them out."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable

from kpmd.bpf.fd import OwnedFd

BUSY, DISCARD = 1 << 31, 1 << 30


class _Ready:
    """Readable while there is something, as long as it is open."""

    def __init__(self) -> None:
        self._is = False
        self._fd: OwnedFd | None = None
        self._lock = threading.RLock()  # it is closed in the pool

    def set(self, ready: bool) -> None:
        self._is = ready
        with self._lock:
            if self._fd is not None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._fd.fileno())
                if ready:
                    os.eventfd_write(self._fd.fileno(), 1)

    def open(self) -> None:
        assert self._fd is None, "it is open already"
        self._fd = OwnedFd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), "fake buffer")
        self.set(self._is)

    def fileno(self) -> int:
        assert self._fd is not None
        return self._fd.fileno()

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                self._fd.close()
                self._fd = None


class FakeRing:
    """What a ring buffer map holds; written by the test in the place of a BPF program."""

    def __init__(self, size: int = 16384) -> None:
        self.size = size
        self.memory = bytearray(2 * size)
        self.consumer = self.producer = 0
        self.dropped = 0
        self.opened = 0
        self.ready = _Ready()

    def write(self, *records: bytes, flags: int = 0) -> int:
        """Write records as bpf_ringbuf_output does; the position of the last one."""
        place = self.producer
        for record in records:
            stride = 8 + (len(record) + 7 & ~7)
            if self.producer + stride - self.consumer > self.size:
                self.dropped += 1
                continue
            place = self.producer
            raw = struct.pack("<II", len(record) | flags, place >> 12) + record
            for index, byte in enumerate(raw):
                at = (place + index) % self.size
                self.memory[at] = self.memory[at + self.size] = byte
            self.producer += stride
        self.ready.set(self.producer > self.consumer)
        return place

    def commit(self, place: int, flags: int = 0) -> None:
        """End the writing of a record that was written with BUSY."""
        at = place % self.size
        (head,) = struct.unpack_from("<I", self.memory, at)
        for start in (at, at + self.size):
            struct.pack_into("<I", self.memory, start, head & ~BUSY | flags)
        self.ready.set(True)

    def open(self, size: int) -> OpenRing:
        """Map it."""
        assert size == self.size
        return OpenRing(self)


class OpenRing:
    """A mapping of it: ``kpmd.runtime.kernel.RingBuffer``."""

    def __init__(self, ring: FakeRing) -> None:
        self._ring = ring
        ring.opened += 1
        self.size = ring.size
        self.data = memoryview(ring.memory)
        self.words = self.data.cast("I")
        ring.ready.open()

    def positions(self) -> tuple[int, int]:
        return self._ring.consumer, self._ring.producer

    def consume(self, position: int) -> None:
        self._ring.consumer = position
        self._ring.ready.set(self._ring.producer > position)

    def fileno(self) -> int:
        return self._ring.ready.fileno()

    def close(self) -> None:
        self._ring.ready.close()
        self._ring.opened -= 1


class FakeBuffer:
    """One CPU's perf buffer."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.raw = b""
        self._changed = changed

    def sample(self, data: bytes) -> None:
        """Write a sample as bpf_perf_event_output does: padded, and its length says so."""
        length = len(data) + -(len(data) + 4) % 8
        self.raw += struct.pack("<IHHI", 9, 0, 12 + length, length) + data.ljust(length, b"\0")
        self._changed()

    def lose(self, number: int) -> None:
        """Write that samples were lost."""
        self.raw += struct.pack("<IHHQQ", 2, 0, 24, 7, number)
        self._changed()

    def content(self) -> bytes:
        return self.raw

    def consume(self, length: int) -> None:
        self.raw = self.raw[length:]
        self._changed()


class FakePerf:
    """The perf buffers of two CPUs: ``kpmd.runtime.kernel.PerfRings``."""

    def __init__(self) -> None:
        self.buffers = [FakeBuffer(self._changed), FakeBuffer(self._changed)]
        self.opened = 0
        self._ready = _Ready()

    def _changed(self) -> None:
        self._ready.set(any(each.raw for each in self.buffers))

    def open(self) -> FakePerf:
        """Open it."""
        self.opened += 1
        self._ready.open()
        return self

    def fileno(self) -> int:
        return self._ready.fileno()

    def close(self) -> None:
        self._ready.close()
        self.opened -= 1
