"""How ``kpmctl count`` shows its reports: live on a terminal, as tables, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kpmd.kpmctl.live import Line, LiveView, View, fitted
from kpmd.kpmctl.output import Column, Settings, Table, on_terminal, prepare

if TYPE_CHECKING:
    from kpmd.kpmctl.counting import Report, Row


def make_view(settings: Settings, top: int | None, by_process: bool = False) -> View[Report]:
    """The view for what stdout is and what was asked for; ``top``: rows at the most."""
    if settings.json:
        return _JsonView(settings, top)
    prepare()
    if not on_terminal():
        return _PlainView(top, by_process)

    def draw(report: Report, width: int, height: int | None) -> list[Line]:
        return drawn(report, width, height, top, by_process)

    return LiveView(draw)


def heading(report: Report, width: int | None = None) -> list[str]:
    """What there is to say beside the calls, in lines of at most ``width`` where that can be."""
    missed = "unknown" if report.missed is None else str(report.missed)
    parts = [
        f"{report.attached} {'function' if report.attached == 1 else 'functions'} attached",
        f"attach took {report.attach_seconds * 1000:.1f} ms",
        f"missed calls {missed}",
        f"elapsed {report.elapsed:.1f} s",
    ]
    if report.dropped:
        parts.append(f"{report.dropped} calls not counted")
    return fitted(parts, width)


def table(report: Report, most: int | None, by_process: bool = False) -> Table:
    """The calls; ``most``: rows at the most."""
    columns = [Column("CALLS", right=True), Column("CALLS/s", right=True)]
    if by_process:
        columns += [Column("PID", right=True), Column("COMMAND")]
    made = Table([*columns, Column("FUNCTION", cut=True)])
    for row in report.rows[:most]:
        rate = f"{row.rate:.0f}" if row.rate >= 100 else f"{row.rate:.1f}"
        process = [row.pid, row.command] if by_process else []
        name = f"{row.name} [{row.module}]" if row.module else row.name
        made.add(row.calls, rate, *process, name)
    return made


def remark(report: Report, shown: int) -> str | None:
    """What the table does not say by itself."""
    if not report.rows:
        return "no calls yet"
    left = len(report.rows) - shown
    return f"… and {left} more" if left > 0 else None


class _JsonView:
    """One JSON object a line, the last of them with ``"last": true``."""

    def __init__(self, settings: Settings, top: int | None) -> None:
        self._settings = settings
        self._top = top

    def update(self, report: Report) -> None:
        self._write(report, last=False)

    def last(self, report: Report) -> None:
        self._write(report, last=True)

    def close(self) -> None:
        pass

    def _write(self, report: Report, *, last: bool) -> None:
        self._settings.write_json(
            {
                "attached": report.attached,
                "attach_seconds": round(report.attach_seconds, 6),
                "elapsed_seconds": round(report.elapsed, 6),
                "missed": report.missed,
                "dropped": report.dropped,
                "last": last,
                "functions": [_json(row) for row in report.rows[: self._top]],
            }
        )


def _json(row: Row) -> dict[str, object]:
    made: dict[str, object] = {
        "symbol": row.name,
        "module": row.module,
        "address": f"0x{row.address:016x}",
        "calls": str(row.calls),
        "calls_per_second": round(row.rate, 3),
    }
    if row.pid is not None:
        made |= {"pid": row.pid, "uid": row.uid, "command": row.command}
    return made


class _PlainView:
    """A table each time, with nothing cut."""

    def __init__(self, top: int | None, by_process: bool) -> None:
        self._top = top
        self._by_process = by_process
        self._first = True

    def update(self, report: Report) -> None:
        made = table(report, self._top, self._by_process)
        lines = [] if self._first else [""]
        lines += heading(report) + made.lines()
        if said := remark(report, len(made.rows)):
            lines.append(said)
        click.echo("\n".join(lines))
        self._first = False

    def last(self, report: Report) -> None:
        self.update(report)

    def close(self) -> None:
        pass


def drawn(
    report: Report,
    width: int,
    height: int | None,
    top: int | None = None,
    by_process: bool = False,
) -> list[Line]:
    """A report for a terminal of this size; ``height`` None: all of it."""
    said = heading(report, width)
    most = top
    if height is not None:
        # The heading, the titles and the remark take lines too.
        rows = max(height - len(said) - 2, 1)
        most = rows if top is None else min(rows, top)
    made = table(report, most, by_process)
    titles, *rest = made.lines(width)
    shown = [[(each, "")] for each in said] + [[(titles, "bold")]]
    shown += [[(row, "")] for row in rest]
    if left := remark(report, len(made.rows)):
        shown.append([(left, "dim")])
    return shown
