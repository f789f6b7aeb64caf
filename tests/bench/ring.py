"""What the steps of a stream cost for each record, without a kernel: finding, framing, decoding."""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable
from functools import partial

from kpmd.core.ring import Batch, as_ndjson, as_octets, scan_ring
from kpmd.core.types import ObjectTypes
from kpmd.runtime.buffers import BATCH_BYTES, BATCH_RECORDS
from tests.bench.records import OBJECT, SIZES
from tests.bench.report import Row, say
from tests.unit.btf import section

#: struct event of the object, and what kernel/bpf/ringbuf.c puts before a record.
_EVENT = struct.Struct("<QQII16sq")
_HEADER = struct.Struct("<II")


def _memory(size: int) -> bytes:
    """A batch of records as they stand in a ring buffer."""
    data = bytes(size - _EVENT.size) if size > _EVENT.size else b""
    records = []
    stride = _HEADER.size + (size + 7 & ~7)
    for number in range(min(BATCH_RECORDS, BATCH_BYTES // stride)):
        event = _EVENT.pack(number, 0xFFFFFFFF81000000, 4711, 2, b"records_write", -1)
        record = _HEADER.pack(size, 0) + (event + data)[:size]
        records.append(record.ljust(stride, b"\0"))
    return b"".join(records)


def _nanoseconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - begun)
    return statistics.median(times)


def measure(quick: bool) -> list[Row]:
    """A row for each size of records."""
    say("the steps of a stream")
    rounds = 20 if quick else 200
    codec = ObjectTypes(section(OBJECT, ".BTF")).record("events", "event")
    rows = []
    for size in SIZES:
        raw = _memory(size)
        view, words = memoryview(raw), memoryview(raw).cast("I")

        scan = partial(scan_ring, words, 0, len(raw), BATCH_RECORDS, BATCH_BYTES)
        runs, _, count = scan()
        batch = Batch(raw, runs, count)
        steps: dict[str, Callable[[], object]] = {
            "find": scan,
            "copy": partial(bytes, view),
            "as octets": partial(as_octets, batch),
            "as NDJSON": partial(as_ndjson, batch, None),
            "as NDJSON, decoded": partial(as_ndjson, batch, codec),
        }
        shown = ", ".join(
            f"{what} {_nanoseconds(work, rounds) / count:.0f}" for what, work in steps.items()
        )
        rows.append(Row(f"ns for each record of {size} bytes, {count} at once", shown))
    return rows
