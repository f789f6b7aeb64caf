"""How ``kpmctl latency`` shows its histograms: live on a terminal, as text, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kpmd.kpmctl import histogram
from kpmd.kpmctl.histogram import Histogram, span
from kpmd.kpmctl.live import Line, LiveView, View, can_show, fitted
from kpmd.kpmctl.output import Settings, clean, on_terminal

if TYPE_CHECKING:
    from kpmd.kpmctl.latencies import LatencyReport

#: Columns of what is no terminal.
_WIDTH = 80

_QUANTILES = (50, 90, 99)

#: What a line tells: its text, and, of a histogram's, its bar.
Told = tuple[str, str]


def make_view(settings: Settings, top: int | None) -> View[LatencyReport]:
    """The view for what stdout is; ``top``: a histogram for each of so many functions."""
    if settings.json:
        return _JsonView(settings)
    if not on_terminal():
        return _PlainView(top)
    unicode = can_show(histogram.SIGNS)

    def draw(report: LatencyReport, width: int, height: int | None) -> list[Line]:
        return drawn(report, top, width, height, unicode)

    return LiveView(draw)


def lines(report: LatencyReport, top: int | None, width: int, unicode: bool) -> list[Told]:
    """What is shown of a report; ``top`` as for ``make_view``."""
    made = [(each, "") for each in _heading(report, width)]
    if not report.functions:
        return [*made, ("no calls yet", "")]
    if top is None:
        return made + _block(report.together, width, unicode)
    for each in report.functions[:top]:
        name = f"{each.name} [{each.module}]" if each.module else each.name
        made += [("", ""), (clean(name), ""), *_block(each.times, width, unicode)]
    left = len(report.functions) - top
    return [*made, *([("", ""), (f"… and {left} more functions", "")] if left > 0 else [])]


def _heading(report: LatencyReport, width: int) -> list[str]:
    functions = "function" if report.attached == 1 else "functions"
    missed = "unknown" if report.missed is None else str(report.missed)
    parts = [
        f"{report.attached} {functions} attached",
        f"attach took {report.attach_seconds * 1000:.1f} ms",
        f"missed calls {missed}",
        f"elapsed {report.elapsed:.1f} s",
    ]
    return fitted(parts, width)


def _block(times: Histogram, width: int, unicode: bool) -> list[Told]:
    """A histogram under its numbers."""
    mean, longest = span(times.mean_ns, unicode), span(times.max_ns, unicode)
    at_most = "≤" if unicode else "<="
    quantiles = [
        f"p{part} {at_most} {span(times.quantile_ns(part / 100), unicode)}" for part in _QUANTILES
    ]
    told = fitted([f"calls {times.calls}", f"mean {mean}", f"max {longest}"], width)
    told += fitted(quantiles, width)
    return [(each, "") for each in told] + histogram.rows(times, width, unicode)


def _joined(line: Told) -> str:
    text, bar = line
    return f"{text}  {bar}" if bar else text


class _PlainView:
    """All of it, each time."""

    def __init__(self, top: int | None) -> None:
        self._top = top
        self._first = True

    def update(self, report: LatencyReport) -> None:
        shown = lines(report, self._top, _WIDTH, can_show(histogram.SIGNS))
        text = "\n".join(map(_joined, shown))
        click.echo(text if self._first else f"\n{text}")
        self._first = False

    def last(self, report: LatencyReport) -> None:
        self.update(report)

    def close(self) -> None:
        pass


class _JsonView:
    """One JSON object a line, the last of them with ``"last": true``."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def update(self, report: LatencyReport) -> None:
        self._write(report, last=False)

    def last(self, report: LatencyReport) -> None:
        self._write(report, last=True)

    def close(self) -> None:
        pass

    def _write(self, report: LatencyReport, *, last: bool) -> None:
        self._settings.write_json(
            {
                "attached": report.attached,
                "attach_seconds": round(report.attach_seconds, 6),
                "elapsed_seconds": round(report.elapsed, 6),
                "missed": report.missed,
                "lost": dict(report.lost),
                "last": last,
                "functions": [
                    {
                        "symbol": each.name,
                        "module": each.module,
                        "address": f"0x{each.address:016x}",
                        "calls": str(each.times.calls),
                        "total_ns": str(each.times.total_ns),
                        "max_ns": str(each.times.max_ns),
                        "slots": [str(calls) for calls in each.times.slots],
                    }
                    for each in report.functions
                ],
            }
        )


def drawn(
    report: LatencyReport, top: int | None, width: int, height: int | None, unicode: bool
) -> list[Line]:
    """A report for a terminal of this size: what there is no room for is said to be there.

    ``height`` None: all of it; ``top`` as for ``make_view``.
    """
    shown, left = lines(report, top, width, unicode), 0
    if height is not None and len(shown) > height:
        shown, left = shown[: max(height - 1, 1)], len(shown) - max(height - 1, 1)
    made = [[(f"{text}  " if bar else text, ""), (bar, "cyan")] for text, bar in shown]
    return [*made, [(f"… and {left} more lines", "dim")]] if left else made
