"""The buffers that records are taken out of, batch by batch, for the pumps of ``records``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kpmd.core.ring import Batch, RingError, scan_perf, scan_ring
from kpmd.runtime.kernel import PerfRings, RingBuffer

#: Records, and about so many bytes of them, that are taken at once.
BATCH_RECORDS = 4096
BATCH_BYTES = 128 << 10

#: Bytes of a record that is sent. Larger ones are for who has the map itself.
MOST_BYTES = 256 << 10


@dataclass(frozen=True)
class Lost:
    """Records that a reader does not get: how many, and whose fault that is."""

    number: int
    reason: str


#: The kernel had no room left in a perf buffer; a record is over MOST_BYTES.
NO_ROOM, TOO_LARGE = "buffer-full", "too-large"


class Source(Protocol):
    """A buffer, and where in it we are."""

    #: A record is still being written.
    busy: bool
    #: There was more than what was taken last.
    more: bool
    #: That there is something is told once, not for as long as it is there.
    told_once: bool

    def take(self) -> tuple[Batch | None, Lost | None]:
        """The next records, still in the buffer, and what was lost behind them.

        None and None: there is nothing now.
        """

    def taken(self) -> None:
        """What ``take`` gave last is not needed any more: it may be written over."""

    def fileno(self) -> int:
        """What becomes readable when there are records."""

    def close(self) -> None:
        """Blocks."""


class Ring:
    """A ring buffer."""

    told_once = False

    def __init__(self, memory: RingBuffer) -> None:
        self._memory = memory
        self._position = 0
        self.busy = self.more = False
        self.fileno, self.close = memory.fileno, memory.close

    def take(self) -> tuple[Batch | None, Lost | None]:
        """See ``Source``. Raises RingError."""
        memory = self._memory
        consumer, producer = memory.positions()
        there = producer - consumer
        if not 0 <= there <= memory.size or consumer % 8:
            raise RingError("the buffer's positions make no sense")
        self.busy = False
        if not there:
            return None, None
        start = consumer & (memory.size - 1)
        end = start + there
        runs, length, count = scan_ring(memory.words, start, end, BATCH_RECORDS, BATCH_BYTES)
        if not length:
            self.busy = True
            return None, None
        lost = None
        if length > BATCH_BYTES + MOST_BYTES and count > 1:
            # The last of them is too large, and the next time alone.
            runs, length, count = scan_ring(memory.words, start, end, count - 1, BATCH_BYTES)
        elif length > BATCH_BYTES + MOST_BYTES and count:
            lost = Lost(count, TOO_LARGE)
            runs, count = [], 0
        self.more = length < there
        self._position = consumer + length
        return Batch(memory.data[start : start + length], runs, count), lost

    def taken(self) -> None:
        """See ``Source``."""
        self._memory.consume(self._position)


class Perf:
    """All CPUs' buffers, one after the other."""

    busy = False
    # Whoever asks whether there is news takes the news away (perf_poll in kernel/events/core.c).
    told_once = True

    def __init__(self, rings: PerfRings) -> None:
        self._rings = rings
        self._next = self._length = 0
        self.more = False
        self.fileno, self.close = rings.fileno, rings.close

    def take(self) -> tuple[Batch | None, Lost | None]:
        """See ``Source``. Raises RingError."""
        buffers = self._rings.buffers
        for _ in buffers:
            self._next = (self._next + 1) % len(buffers)
            raw = buffers[self._next].content()
            runs, self._length, count, lost = scan_perf(raw, BATCH_RECORDS)
            if self._length:
                self.more = self._length < len(raw)
                return Batch(raw, runs, count), Lost(lost, NO_ROOM) if lost else None
        return None, None

    def taken(self) -> None:
        """See ``Source``."""
        self._rings.buffers[self._next].consume(self._length)
