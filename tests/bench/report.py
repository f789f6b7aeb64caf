"""Figures, their comparison with a yardstick, and the table that shows them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log

NOT_YET = "not there yet"


@dataclass(frozen=True)
class Row:
    """One line of the table; ``met`` None: a figure without a target."""

    what: str
    kpmd: str
    yardstick: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None

    def line(self) -> str:
        word = {True: "yes", False: "**no**", None: ""}[self.met]
        cells = (self.what, self.kpmd, self.yardstick, self.ratio, self.target, word)
        return f"| {' | '.join(cells)} |"


def ms(seconds: float) -> str:
    """Seconds as milliseconds, with three digits that count."""
    value = seconds * 1000
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} ms"


def at_most(what: str, kpmd: float, yardstick: float, named: str, limit: float) -> Row:
    """A row whose target is a time of at most ``limit`` times the yardstick's."""
    ratio = kpmd / yardstick
    return Row(
        what,
        ms(kpmd),
        f"{ms(yardstick)} ({named})",
        f"{ratio:.2f}",
        f"at most {limit:g}",
        ratio <= limit,
    )


def alternate(
    rounds: int, competitors: Mapping[str, Callable[[], Sequence[float]]]
) -> dict[str, list[float]]:
    """Run each of the competitors in turn, round after round; the medians of what each measured.

    A first round that is not counted warms all of them up.
    """
    found: dict[str, list[Sequence[float]]] = {name: [] for name in competitors}
    for number in range(rounds + 1):
        for name, run in competitors.items():
            measured = run()
            if number:
                found[name].append(measured)
    return {
        name: [statistics.median(column) for column in zip(*each, strict=True)]
        for name, each in found.items()
    }


def exponent(times: Mapping[int, float]) -> float:
    """The b of time = a * n**b, by least squares over the logarithms: 1 is linear."""
    counts = [log(count) for count in times]
    return statistics.linear_regression(counts, [log(each) for each in times.values()]).slope


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def say(text: str) -> None:
    """Tell of progress, apart from the table."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_table(title: Mapping[str, str], rows: Sequence[Row]) -> bool:
    """Print the table; whether all targets are met."""
    for name, value in title.items():
        print(f"- {name}: {value}")
    print()
    print("| what | kpmd | yardstick | ratio | target | met |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(row.line(), flush=True)
    return all(row.met is not False for row in rows)
