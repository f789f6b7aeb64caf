"""Records out of ring buffers and perf buffers: found, and sent, whatever is in them."""

from __future__ import annotations

import json
import struct
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core.ring import (
    Batch,
    RingError,
    as_ndjson,
    as_octets,
    lost_line,
    lost_octets,
    scan_perf,
    scan_ring,
)
from tests.fakes.rings import BUSY, DISCARD, FakeBuffer, FakeRing

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

#: Of few lengths, so that there are runs of the same.
RECORDS = st.lists(
    st.tuples(st.sampled_from([0, 1, 8, 13, 16, 16, 16, 64]), st.sampled_from([0, 0, 0, DISCARD])),
    max_size=60,
)


def data(number: int, length: int) -> bytes:
    return bytes((number + index) & 0xFF for index in range(length))


def ring_of(written: list[tuple[int, int]], before: int) -> FakeRing:
    """A ring buffer that has been written to; ``before``: bytes that were read already."""
    ring = FakeRing(8192)
    while ring.producer < before:
        ring.write(bytes(8))
    ring.consumer = ring.producer
    for number, (length, flags) in enumerate(written):
        ring.write(data(number, length), flags=flags)
    return ring


def take(ring: FakeRing, most: int = 1 << 20, most_bytes: int = 1 << 20) -> tuple[Batch, int]:
    """What is in it, as the daemon takes it, and how far that is."""
    words = memoryview(ring.memory).cast("I")
    start = ring.consumer % ring.size
    end = start + ring.producer - ring.consumer
    runs, taken, count = scan_ring(words, start, end, most, most_bytes)
    return Batch(bytes(ring.memory[start : start + taken]), runs, count), taken


def frames(raw: bytes) -> list[bytes]:
    """A raw stream, read as its description says."""
    found = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        found.append(raw[4 : 4 + length])
        assert len(found[-1]) == length
        raw = raw[4 + length :]
    return found


@quick
@given(RECORDS, st.integers(0, 8191).map(lambda place: place & ~7))
def test_all_records_come_out_in_order(written: list[tuple[int, int]], before: int) -> None:
    batch, taken = take(ring := ring_of(written, before))
    expected = [data(number, length) for number, (length, flags) in enumerate(written) if not flags]
    assert frames(as_octets(batch)) == expected
    assert batch.count == len(expected)
    assert taken == ring.producer - ring.consumer
    lines = as_ndjson(batch, None).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"data": each.hex()} for each in expected]


@quick
@given(RECORDS, st.integers(1, 20), st.integers(8, 400))
def test_piece_by_piece_they_are_the_same(
    written: list[tuple[int, int]], most: int, most_bytes: int
) -> None:
    ring = ring_of(written, 0)
    found: list[bytes] = []
    while ring.consumer < ring.producer:
        batch, taken = take(ring, most, most_bytes)
        assert taken > 0
        assert batch.count <= most
        # The last record may go beyond, and no other.
        assert taken < most_bytes + 8 + 64
        found += frames(as_octets(batch))
        ring.consumer += taken
    assert found == [
        data(number, size) for number, (size, flags) in enumerate(written) if not flags
    ]


@quick
@given(RECORDS, RECORDS)
def test_it_stops_at_a_record_that_is_being_written(
    before: list[tuple[int, int]], behind: list[tuple[int, int]]
) -> None:
    batch, taken = take(ring_of([*before, (16, BUSY), *behind], 0))
    expected = [data(number, size) for number, (size, flags) in enumerate(before) if not flags]
    assert frames(as_octets(batch)) == expected
    assert taken == sum(8 + (length + 7 & ~7) for length, _ in before)


def test_records_of_one_length_are_one_run() -> None:
    lengths = [16] * 90 + [8] * 3 + [16] * 17
    batch, _ = take(ring_of([(length, 0) for length in lengths], 0))
    assert [(run.length, run.count) for run in batch.runs] == [
        (length, len(list(group))) for length, group in groupby(lengths)
    ]


def test_a_record_longer_than_what_is_there() -> None:
    ring = FakeRing(8192)
    ring.write(bytes(64))
    ring.producer -= 8
    with pytest.raises(RingError):
        take(ring)


def test_a_head_that_is_none() -> None:
    """Where somebody moved the position into the middle of a record, its data is the head."""
    ring = FakeRing(8192)
    ring.write(b"\xff\xff\xff\x3f" * 4)
    ring.consumer = 8
    with pytest.raises(RingError):
        take(ring)


def perf_of(*samples: bytes | int) -> bytes:
    """A perf buffer with samples, and with the news that some were lost."""
    buffer = FakeBuffer(lambda: None)
    for each in samples:
        if isinstance(each, int):
            buffer.lose(each)
        else:
            buffer.sample(each)
    return buffer.raw


@quick
@given(
    st.lists(st.binary(max_size=40) | st.just(bytes(20)) | st.integers(1, 2**63), max_size=40),
    st.integers(1, 50),
)
def test_samples_and_losses(samples: list[bytes | int], most: int) -> None:
    raw = perf_of(*samples)
    found: list[bytes] = []
    lost = 0
    while raw:
        runs, taken, count, more = scan_perf(raw, most)
        assert taken > 0
        assert count <= most
        found += frames(as_octets(Batch(raw[:taken], runs, count)))
        lost += more
        raw = raw[taken:]
    expected = [each for each in samples if isinstance(each, bytes)]
    # The kernel pads a sample, and its length says so.
    assert [each[: len(own)] for each, own in zip(found, expected, strict=True)] == expected
    assert all(len(each) % 8 == 4 for each in found)
    assert lost == sum(each for each in samples if isinstance(each, int))


@quick
@given(st.binary(max_size=64))
def test_perf_buffers_that_are_none(raw: bytes) -> None:
    try:
        runs, taken, count, _ = scan_perf(raw, 1000)
    except RingError:
        return
    assert taken <= len(raw)
    assert len(frames(as_octets(Batch(raw[:taken], runs, count)))) == count


def test_what_is_lost() -> None:
    assert lost_octets(7) == b"\xff\xff\xff\xff" + (7).to_bytes(8, "little")
    assert json.loads(lost_line(7, "why")) == {"lost": 7, "reason": "why"}
