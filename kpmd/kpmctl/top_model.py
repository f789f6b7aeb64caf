"""What ``kpmctl top`` shows: counts over time, sorted, filtered, held still. Draws nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from kpmd.kpmctl.output import clean

if TYPE_CHECKING:
    from kpmd.kpmctl.counting import Report

#: Samples that are kept of each function.
HISTORY = 60

#: Not up to the full block, which would touch the line above.
_BARS = "▁▂▃▄▅▆▇"


class Column(Enum):
    """What can be shown of a function, and sorted by."""

    RATE = "CALLS/s"
    RECENT = "RECENT"
    CALLS = "CALLS"
    SHARE = "SHARE"
    FUNCTION = "FUNCTION"


@dataclass(frozen=True)
class Line:
    """A function that was called: ``recent`` are its rates, the newest last.

    ``share`` is its part, from 0 to 1, of all calls that were counted.
    """

    rate: float
    recent: tuple[float, ...]
    calls: int
    share: float
    function: str
    module: str | None

    @property
    def name(self) -> str:
        """The function, with its module behind it."""
        return f"{self.function} [{self.module}]" if self.module else self.function


@dataclass(frozen=True)
class Summary:
    """What there is to say of all functions together; ``missed`` is None where nobody knows."""

    attached: int
    called: int
    rate: float
    missed: int | None
    dropped: int
    elapsed: float


class Model:
    """Takes reports in, and gives out the lines to be shown.

    While it is ``paused`` it goes on taking them in, and gives out what it had.
    """

    def __init__(self) -> None:
        self.sort = Column.RATE
        self.reverse = False
        self.paused = False
        self.summary: Summary | None = None
        self.sample = 0  # the number of the sample that is shown, for `sparkline`
        self._matches: re.Pattern[str] | None = None
        self._newest: Report | None = None
        self._base: Report | None = None
        self._taken = 0
        self._recent: dict[int, tuple[float, ...]] = {}
        self._shown: list[Line] = []
        self._lines: list[Line] | None = None

    def filter(self, text: str) -> None:
        """Show the functions with this in their names, in any case; ``*`` and ``?`` are wildcards.

        An empty text shows all.
        """
        pattern = re.escape(text).replace(r"\*", ".*").replace(r"\?", ".")
        self._matches = re.compile(pattern, re.IGNORECASE) if text else None
        self._lines = None

    @property
    def filtered(self) -> bool:
        """Whether a filter is set."""
        return self._matches is not None

    def add(self, report: Report) -> None:
        """Take a report in."""
        self._taken += 1
        self._newest = report
        before = self._recent
        self._recent = {
            row.address: (*before.get(row.address, ())[1 - HISTORY :], row.rate)
            for row in report.rows
        }
        if not self.paused:
            self._show()

    def lines(self) -> list[Line]:
        """Those that the filter lets through, in order."""
        if self._lines is None:
            matches = self._matches
            lines = [each for each in self._shown if matches is None or matches.search(each.name)]
            lines.sort(key=_KEYS[self.sort], reverse=self.reverse)
            self._lines = lines
        return self._lines

    def sort_by(self, column: Column) -> None:
        """Sort by this column, the most first; once more, and the order is reversed."""
        self.reverse = column is self.sort and not self.reverse
        self.sort, self._lines = column, None

    def pause(self, paused: bool) -> None:
        """Hold what is shown still, or no longer."""
        self.paused = paused
        if not paused:
            self._show()

    def reset(self) -> None:
        """Count from zero, and show it."""
        self._base = self._newest
        self.pause(False)

    def _show(self) -> None:
        report, base = self._newest, self._base
        if report is None:
            return
        had = {row.address: row.calls for row in base.rows} if base else {}
        called = [(row, row.calls - had.get(row.address, 0)) for row in report.rows]
        total = sum(calls for _, calls in called)
        self._shown = [
            Line(
                row.rate,
                self._recent[row.address],
                calls,
                calls / total,
                clean(row.name),
                clean(row.module) if row.module else None,
            )
            for row, calls in called
            if calls > 0
        ]
        self._lines, self.sample = None, self._taken
        missed = report.missed
        if missed is not None and base is not None:
            missed -= base.missed or 0
        self.summary = Summary(
            report.attached,
            len(self._shown),
            sum(row.rate for row in report.rows),
            missed,
            report.dropped - (base.dropped if base else 0),
            report.elapsed - (base.elapsed if base else 0.0),
        )


#: What is sorted by: the most first, and names in their order.
_KEYS: dict[Column, Callable[[Line], Any]] = {
    Column.RATE: lambda line: (-line.rate, line.name),
    Column.RECENT: lambda line: (-sum(line.recent), line.name),
    Column.CALLS: lambda line: (-line.calls, line.name),
    Column.SHARE: lambda line: (-line.calls, line.name),
    Column.FUNCTION: lambda line: line.name,
}


def sparkline(recent: Sequence[float], sample: int, cells: int) -> str:
    """The rates as bars, the newest to the right; no bar where there is none of them.

    The bars of all functions, and of one from sample to sample, are of the same times: ``sample``
    is the number of the newest. The highest bar is as high as can be, the lowest one is for zero.
    ``cells`` divides ``HISTORY``.
    """
    size = HISTORY // cells
    first, last = sample - len(recent) + 1, sample // size
    sums: dict[int, tuple[float, int]] = {}
    for number, rate in enumerate(recent, first):
        so_far, count = sums.get(number // size, (0.0, 0))
        sums[number // size] = (so_far + rate, count + 1)
    means = {number: total / count for number, (total, count) in sums.items()}
    most = max((means.get(number, 0.0) for number in range(last - cells + 1, last + 1)), default=0)
    return "".join(
        _bar(means[number], most) if number in means else " "
        for number in range(last - cells + 1, last + 1)
    )


def _bar(value: float, most: float) -> str:
    if value <= 0:
        return _BARS[0]
    return _BARS[max(1, round(value / most * (len(_BARS) - 1)))]


def amount(number: float, width: int) -> str:
    """A number for people, in no more than ``width`` characters, from 6 on."""
    text = f"{number:,.0f}"
    if len(text) <= width:
        return text
    power = 0
    while round(number, 1) >= 1000:
        number /= 1000
        power += 1
    return f"{number:.1f}{' kMGTPE'[power]}"


def rate(number: float, width: int) -> str:
    """As ``amount``; of small ones a decimal place tells something, too."""
    return f"{number:.1f}" if number < 100 else amount(number, width)


def clock(seconds: float) -> str:
    """A time as ``1:02:03``, or ``02:03``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"
