"""A fake kernel on which functions are called: the builtins' maps tell more each time."""

from __future__ import annotations

import math
import struct
import time
from typing import Any

from kpmd.bpf.kernel import Loaded, LoadedMap
from kpmd.bpf.objects import MapDetails
from tests.fakes.content import CPUS, FakeContent
from tests.fakes.kernel import FUNCTIONS, FakeKernel

#: Calls per second of each function, on each CPU.
CALLS = {
    "vfs_read": 1200,
    "vfs_write": 340,
    "vfs_open": 75,
    "vprintk": 2,
    "inet6_release": 9,
    "nf_hook": 5000,
}
#: How the calls of any function are spread over the buckets of its histogram, from 2^8 ns on.
SPREAD = (1, 8, 21, 34, 19, 9, 4, 2, 1, 1)
_FIRST = 8


class TrafficKernel(FakeKernel):
    """Objects of the builtins ``count`` and ``latency`` have their programs and maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._began = time.monotonic()

    def load_object(self, elf: bytes, *others: Any, **more: Any) -> Loaded:
        """Any other object is as with ``FakeKernel``."""
        if b"\0latencies\0" in elf:
            return self._builtin("latency", "kprobe_session", "latencies", 67 * 8)
        if b"\0counts_by_process\0" in elf:
            return self._builtin("count", "kprobe_multi", "counts", 8)
        return super().load_object(elf, *others, **more)

    def _builtin(self, program: str, attach: str, map_: str, value_size: int) -> Loaded:
        details = MapDetails(next(self._ids), map_, "percpu_hash", 5, 8, value_size, 1024)
        made = LoadedMap(map_, self._map(details), details, 0, 0)
        return Loaded([self._program(program, attach, (details.kernel_id,))], [made])

    def content(self, map_: Any, details: MapDetails) -> FakeContent:
        """What the functions did to which a program with this map is attached."""
        value = {"counts": _count, "latencies": _latency}.get(details.name)
        if value is None or not details.percpu:
            return super().content(map_, details)
        seconds = time.monotonic() - self._began
        # They come in waves, and never backwards.
        waves = seconds + 1.6 * math.sin(seconds / 2)
        attached = {
            address
            for link in self.attached
            if details.kernel_id in self.program_details(link.program).map_ids
            for address in link.addresses
        }
        entries = {
            FUNCTIONS[name][0].to_bytes(8, "little"): [value(int(calls * waves))] * CPUS
            for name, calls in CALLS.items()
            if FUNCTIONS[name][0] in attached
        }
        return FakeContent(self.enter, map_, details, entries, self.queue)


def _count(calls: int) -> bytes:
    return calls.to_bytes(8, "little")


def _latency(calls: int) -> bytes:
    slots = [0] * 64
    for index, share in enumerate(SPREAD, _FIRST):
        slots[index] = calls * share // sum(SPREAD)
    total = sum(many * 3 * 2**index // 2 for index, many in enumerate(slots))
    return struct.pack("<67Q", sum(slots), total, 2 ** (_FIRST + len(SPREAD)) - 7, *slots)
