"""Histograms by powers of two of nanoseconds: their sums and quantiles, and how they are drawn."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from kpmd.client.errors import ProtocolError

#: ``slots[i]`` are the calls of 2^i to 2^(i+1)-1 ns; the first those of 0 ns, too.
SLOTS = 64

#: struct latency of the builtin: calls, total_ns, max_ns, slots.
_LATENCY = struct.Struct(f"={3 + SLOTS}Q")

#: Its size.
SIZE = _LATENCY.size

_UNITS = ((10**9, "s"), (10**6, "ms"), (10**3, "µs"), (1, "ns"))

#: Eighths of a character's width.
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"

#: Characters beyond ASCII that a histogram is drawn with where the encoding has them.
SIGNS = f"{_EIGHTHS}{_FULL}µ≤"

#: Columns between two columns.
_GAP = 2


@dataclass
class Histogram:
    """How long calls took."""

    calls: int = 0
    total_ns: int = 0
    max_ns: int = 0
    slots: list[int] = field(default_factory=lambda: [0] * SLOTS)

    def add(self, other: Histogram) -> None:
        """Take another one's calls as well."""
        self.calls += other.calls
        self.total_ns += other.total_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.slots = [mine + its for mine, its in zip(self.slots, other.slots, strict=True)]

    @property
    def mean_ns(self) -> int:
        """The mean; 0 where there are no calls."""
        return round(self.total_ns / self.calls) if self.calls else 0

    def quantile_ns(self, part: float) -> int:
        """What ``part`` of the calls took at most, by the upper end of the slot that it lies in."""
        wanted, seen = part * sum(self.slots), 0
        for slot, calls in enumerate(self.slots):
            seen += calls
            if calls and seen >= wanted:
                return min((2 << slot) - 1, self.max_ns)
        return 0


def together(histograms: Iterable[Histogram]) -> Histogram:
    """One of them all."""
    made = Histogram()
    for each in histograms:
        made.add(each)
    return made


def parse(value: str | list[str]) -> Histogram:
    """A value of the builtin's map ``latencies``: a histogram for each CPU. Raises ProtocolError"""
    made = []
    for text in [value] if isinstance(value, str) else value:
        try:
            calls, total, longest, *slots = _LATENCY.unpack(bytes.fromhex(text))
        except (TypeError, ValueError, struct.error):
            raise ProtocolError("the daemon's answer has a value that is no histogram") from None
        made.append(Histogram(calls, total, longest, slots))
    return together(made)


def span(ns: int, unicode: bool = True) -> str:
    """A time in the unit that fits, with three digits."""
    digits = len(str(ns))
    rounded = round(ns, min(3 - digits, 0))
    factor, unit = next((each for each in _UNITS if rounded >= each[0]), _UNITS[-1])
    whole = len(str(rounded // factor))
    text = str(rounded) if factor == 1 else f"{rounded / factor:.{max(3 - whole, 0)}f}"
    return f"{text} {unit if unicode else unit.replace('µ', 'u')}"


def bar(part: float, width: int, unicode: bool = True) -> str:
    """A bar that takes ``part`` of the width; one that is more than nothing can be seen."""
    if part <= 0 or width <= 0:
        return ""
    if not unicode:
        return "#" * max(round(part * width), 1)
    full, eighths = divmod(max(round(part * width * 8), 1), 8)
    return _FULL * full + (_EIGHTHS[eighths] if eighths else "")


def rows(histogram: Histogram, width: int, unicode: bool = True) -> list[tuple[str, str]]:
    """A line for each slot, from the first to the last that has calls: label and count, and bar.

    A line takes ``width`` columns at the most, where that leaves room for a bar.
    """
    used = [slot for slot, calls in enumerate(histogram.slots) if calls]
    if not used:
        return []
    most = max(histogram.slots)
    digits = len(str(most))
    made = []
    for slot in range(used[0], used[-1] + 1):
        low = span(1 << slot if slot else 0, unicode)
        calls = histogram.slots[slot]
        label = f"{low:>7} - {span(2 << slot, unicode):>7}{'':{_GAP}}{calls:>{digits}}"
        room = max(width - len(label) - _GAP, 1)
        made.append((label, bar(calls / most, room, unicode)))
    return made
