"""Rates and histograms out of the entries of the builtins' maps ``counts`` and ``latencies``.

How these lie in memory is told in docs/builtins.md; numbers are in the kernel's byte order.
"""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpmd.client.errors import ProtocolError

if TYPE_CHECKING:
    from kpmd.client import answers

#: Buckets of a histogram: the one at ``i`` has the calls of 2^i to 2^(i+1)-1 ns.
SLOTS = 64

_LATENCY = struct.Struct(f"={3 + SLOTS}Q")

#: Sizes of key and value, which tell these maps from others of the same name.
COUNTS_SIZES = (8, 8)
LATENCIES_SIZES = (8, _LATENCY.size)

#: Rates of a function that are kept.
HISTORY = 60

#: Seconds without a sample after which the rates before them are no picture of the last minute.
_PAUSE = 10.0


@dataclass
class Flow:
    """The calls of one function, and how many there were in each second of late."""

    calls: int
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def lately(self) -> float:
        """How busy it was, over all of the rates that are kept."""
        return sum(self.rates)


class Rates:
    """Calls per second of each function in one map, from one sample to the next."""

    def __init__(self) -> None:
        self.flows: dict[int, Flow] = {}
        self._at: float | None = None

    def sample(self, now: float, calls: dict[int, int]) -> None:
        """Take what has been counted until ``now``, in seconds, by the functions' addresses."""
        seconds = None if self._at is None else now - self._at
        self._at = now
        flows = {}
        for address, many in calls.items():
            flow = self.flows.get(address) or Flow(0 if seconds is not None else many)
            if seconds is None or seconds > _PAUSE:
                flow.rates.clear()
            elif seconds > 0:
                # Less than before: somebody has cleared the map.
                more = many - flow.calls if many >= flow.calls else many
                flow.rates.append(more / seconds)
            flow.calls = many
            flows[address] = flow
        self.flows = flows


@dataclass(frozen=True)
class Histogram:
    """How long the calls of one function took; times are in nanoseconds."""

    calls: int
    total: int
    longest: int
    slots: Sequence[int]

    def quantile(self, share: float) -> int:
        """A time that at least this share of the calls did not exceed: the end of its bucket."""
        wanted, found = share * sum(self.slots), 0
        for index, many in enumerate(self.slots):
            found += many
            if many and found >= wanted:
                return min((2 << index) - 1, self.longest)
        return self.longest


def calls_of(value: str | list[str]) -> int:
    """The calls that a value of ``counts`` tells, of all CPUs. Raises ProtocolError."""
    return sum(int.from_bytes(_bytes(each)[:8], sys.byteorder) for each in _copies(value))


def histogram_of(value: str | list[str]) -> Histogram:
    """The histogram in a value of ``latencies``, of all CPUs. Raises ProtocolError."""
    calls = total = longest = 0
    slots = [0] * SLOTS
    for each in _copies(value):
        raw = _bytes(each)
        if len(raw) < _LATENCY.size:
            raise ProtocolError("the daemon's answer has a histogram that is too short")
        more, nanoseconds, most, *found = _LATENCY.unpack_from(raw)
        if more:
            calls, total, longest = calls + more, total + nanoseconds, max(longest, most)
            slots = [one + other for one, other in zip(slots, found, strict=True)]
    return Histogram(calls, total, longest, slots)


def address_of(entry: answers.Entry) -> int:
    """The function that an entry of these maps is about. Raises ProtocolError."""
    return int.from_bytes(_bytes(entry["key"])[:8], sys.byteorder)


def _copies(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        raise ProtocolError("the daemon's answer has an entry that is not in hex") from None
