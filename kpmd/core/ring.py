"""Records out of the memory of ring buffers and perf buffers, and what is sent of them.

Records come by the hundred thousand a second, so nothing here is done record by record where their
sizes are the same: they are found by looking at every n-th word, and taken apart by ``struct``.
Little-endian, as kpmd's machines are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from kpmd.core.codec import Codec
from kpmd.core.codec_rows import Around

#: A record of a ring buffer (kernel/bpf/ringbuf.c): its length with two flags, a number of the
#: kernel's own, its data; the next one begins at a multiple of 8.
_RING_HEADER = 8
_BUSY, _DISCARD, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1

#: A record of a perf buffer (include/uapi/linux/perf_event.h): type, flags and size of the whole;
#: of a sample then the length of its data, and the data.
_PERF_HEADER = struct.Struct("<IHH")
_PERF_SAMPLE, _PERF_LOST = 9, 2
_PERF_BEFORE = 12

#: In place of a length in a raw stream: the number of records lost follows, in 64 bits.
LOST_MARK = 0xFFFFFFFF
_LOST = struct.Struct("<IQ")

_U32 = struct.Struct("<I")

#: Records that are taken apart at once: each time costs a tuple.
_ROWS = 32

#: Characters of a line beside those of what is in it.
_LINE = 28


class RingError(ValueError):
    """The positions or lengths make no sense: another holder of the map has moved them."""


@dataclass(frozen=True, slots=True)
class Run:
    """Records of the same length behind each other: where the first of them begins, and how many.

    Each takes ``stride`` bytes; its data stands at ``at``.
    """

    start: int
    count: int
    stride: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Records in a buffer, or taken out of it: its bytes, and where in them they are."""

    raw: bytes | memoryview
    runs: Sequence[Run]
    count: int

    def copy(self) -> Batch:
        """The same in memory of its own."""
        return Batch(bytes(self.raw), self.runs, self.count)


def scan_ring(
    words: memoryview, start: int, end: int, most: int, most_bytes: int
) -> tuple[list[Run], int, int]:
    """The records from the position ``start`` on that are complete, up to ``most`` of them.

    They take about ``most_bytes`` at the most; a single one may take more.

    ``words``: the buffer's data as 32-bit words, in which a record never wraps (the kernel maps the
    data twice). ``end`` is the producer's position counted as ``start`` is, from the beginning of
    ``words``. Returns runs (relative to ``start``), how many bytes they take with what was thrown
    away in between, and how many records they are. Stops at the first that is still being written.
    Raises RingError.
    """
    runs: list[Run] = []
    place, count = start, 0
    last = min(end, start + most_bytes)
    while place < last and count < most:
        head: int = words[place >> 2]
        if head & _BUSY:
            break
        length = head & _LENGTH
        stride = _RING_HEADER + (length + 7 & ~7)
        if place + stride > end:
            raise RingError("a record is longer than what there is")
        if head & _DISCARD:
            place += stride
            continue
        room = max(1, (last - place) // stride)
        number = _same(words, place, head, stride, min(room, most - count))
        runs.append(Run(place - start, number, stride, length, _RING_HEADER))
        count += number
        place += number * stride
    return runs, place - start, count


def _same(words: memoryview, place: int, head: int, stride: int, most: int) -> int:
    """How many records from ``place`` on have the same head, ``most`` at the most; at least one."""
    step = stride >> 2
    first = place >> 2
    known, tried = 1, 2
    while known < most:
        tried = min(tried, most)
        found = words[first + known * step : first + tried * step : step].tobytes()
        wanted = _U32.pack(head) * (tried - known)
        if found != wanted:
            return known + _common(found, wanted)
        known, tried = tried, tried * 16
    return known


def _common(found: bytes, wanted: bytes) -> int:
    """How many words at the beginning of the two are equal. They are not all."""
    low, high = 0, len(wanted) >> 2
    while high - low > 1:
        middle = (low + high) >> 1
        if found[: middle * 4] == wanted[: middle * 4]:
            low = middle
        else:
            high = middle
    return low


def scan_perf(raw: bytes, most: int) -> tuple[list[Run], int, int, int]:
    """The samples in the content of a perf buffer, up to ``most`` of them.

    Returns runs, how many bytes they take with what is no sample, how many samples they are, and
    how many the kernel tells to have lost among them. Raises RingError.
    """
    runs: list[Run] = []
    place = count = lost = 0
    while place + _PERF_HEADER.size <= len(raw) and count < most:
        kind, _, size = _PERF_HEADER.unpack_from(raw, place)
        if size < _PERF_HEADER.size or size % 8 or place + size > len(raw):
            raise RingError("a record is longer than what there is")
        if kind == _PERF_SAMPLE and size >= _PERF_BEFORE:
            (length,) = _U32.unpack_from(raw, place + 8)
            if _PERF_BEFORE + length > size:
                raise RingError("a sample is longer than its record")
            last = runs[-1] if runs else None
            if (
                last is not None
                and (last.stride, last.length) == (size, length)
                and last.start + last.count * size == place
            ):
                runs[-1] = Run(last.start, last.count + 1, size, length, _PERF_BEFORE)
            else:
                runs.append(Run(place, 1, size, length, _PERF_BEFORE))
            count += 1
        elif kind == _PERF_LOST and size >= 24:
            # u64 id, u64 lost
            lost += int.from_bytes(raw[place + 16 : place + 24], "little")
        place += size
    return runs, place, count, lost


def as_octets(batch: Batch) -> bytes:
    """The records one after the other, each behind its length in 4 bytes, little-endian."""
    return b"".join(_framed(batch.raw, run) for run in batch.runs)


def _framed(raw: bytes | memoryview, run: Run) -> bytes:
    """A run's records: as their lengths are the same, so is what stands between them."""
    rows = memoryview(raw)[run.start : run.start + run.count * run.stride]
    length = _U32.pack(run.length)
    return length + length.join(_data(rows, run))


def split(batch: Batch, codec: Codec | None, most: int) -> Iterator[Batch]:
    """The records in batches whose lines have at most so many characters, or are one line.

    However little a record has in it, its type may have very much to be told.
    """
    runs: list[Run] = []
    left = most
    for run in batch.runs:
        each = _LINE + 2 * run.length + (codec.longest(run.length) if codec else 0)
        start, remaining = run.start, run.count
        while remaining:
            number = min(remaining, left // each)
            if not number and runs:
                yield _part(batch, runs)
                runs, left = [], most
                continue
            number = max(1, number)
            runs.append(replace(run, start=start, count=number))
            start += number * run.stride
            remaining -= number
            left -= number * each
    if runs:
        yield _part(batch, runs)


def _part(batch: Batch, runs: list[Run]) -> Batch:
    return Batch(batch.raw, runs, sum(run.count for run in runs))


def as_ndjson(batch: Batch, codec: Codec | None, *, data: bool = True) -> bytes:
    """A line for each record: its ``data`` in hex if it is wanted, and with a codec ``decoded``.

    What is shorter than the codec's type is decoded as null.
    """
    lines = (_lines(batch.raw, run, codec, data) for run in batch.runs)
    return "".join(chain.from_iterable(lines)).encode()


def _lines(raw: bytes | memoryview, run: Run, codec: Codec | None, data: bool) -> Iterable[str]:
    rows = memoryview(raw)[run.start : run.start + run.count * run.stride]
    shown = map(bytes.hex, _data(rows, run)) if data else None
    before = "{" if shown is None else '{"data": "%s"'
    if codec is not None and run.length >= codec.size:
        between = "" if shown is None else ", "
        around = Around(f'{before}{between}"decoded": ', "}\n", shown)
        return codec.rows(rows, run.at, run.stride, run.length, around)
    if codec is not None:
        before += '"decoded": null' if shown is None else ', "decoded": null'
    line = before + "}\n"
    return [line] * run.count if shown is None else map(line.__mod__, shown)


def _data(rows: memoryview, run: Run) -> Iterator[bytes]:
    """The records' data: their lengths are the same."""
    row = f"{run.at}x{run.length}s{run.stride - run.at - run.length}x"
    many = run.count // _ROWS * _ROWS * run.stride
    return chain.from_iterable(
        chain(struct.iter_unpack(row * _ROWS, rows[:many]), struct.iter_unpack(row, rows[many:]))
    )


def lost_octets(number: int) -> bytes:
    """What a raw stream says where records are missing."""
    return _LOST.pack(LOST_MARK, number)


def lost_line(number: int, reason: str) -> bytes:
    """What an NDJSON stream says where records are missing, and why they are."""
    return b'{"lost": %d, "reason": "%b"}\n' % (number, reason.encode())
