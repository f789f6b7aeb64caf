"""How ``kpmctl count`` shows its reports: live on a terminal, as tables, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import click

from kpmd.client.output import Column, Settings, Table, on_terminal

if TYPE_CHECKING:
    import rich.text

    from kpmd.client.counting import Report

_SEPARATOR = ", "


class View(Protocol):
    """Shows reports."""

    def update(self, report: Report) -> None:
        """Show one of many."""

    def last(self, report: Report) -> None:
        """Show the last one, to stay."""

    def close(self) -> None:
        """Leave the terminal as it was; to be called again, and where no last one came."""


def make_view(settings: Settings, top: int | None) -> View:
    """The view for what stdout is and what was asked for; ``top``: rows at the most."""
    if settings.json:
        return _JsonView(settings, top)
    return _LiveView(top) if on_terminal() else _PlainView(top)


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
    if width is None:
        return [_SEPARATOR.join(parts)]
    lines = [parts[0]]
    for part in parts[1:]:
        longer = lines[-1] + _SEPARATOR + part
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def table(report: Report, most: int | None) -> Table:
    """The calls; ``most``: rows at the most."""
    made = Table(
        [
            Column("CALLS", right=True),
            Column("CALLS/s", right=True),
            Column("FUNCTION", cut=True),
        ]
    )
    for row in report.rows[:most]:
        rate = f"{row.rate:.0f}" if row.rate >= 100 else f"{row.rate:.1f}"
        made.add(row.calls, rate, f"{row.name} [{row.module}]" if row.module else row.name)
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
                "functions": [
                    {
                        "symbol": row.name,
                        "module": row.module,
                        "address": f"0x{row.address:016x}",
                        "calls": str(row.calls),
                        "calls_per_second": round(row.rate, 3),
                    }
                    for row in report.rows[: self._top]
                ],
            }
        )


class _PlainView:
    """A table each time, with nothing cut."""

    def __init__(self, top: int | None) -> None:
        self._top = top
        self._first = True

    def update(self, report: Report) -> None:
        made = table(report, self._top)
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


class _LiveView:
    """A table that is drawn over, and no higher than the terminal; the last one is whole."""

    def __init__(self, top: int | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._top = top
        self._newest: Report | None = None
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def update(self, report: Report) -> None:
        self._newest = report
        width, height = self._console.size
        # Heading, titles, the remark, and a line to spare.
        rows = max(height - len(heading(report, width)) - 3, 1)
        if self._top is not None:
            rows = min(rows, self._top)
        self._live.update(self._drawn(report, rows), refresh=True)

    def last(self, report: Report) -> None:
        self._newest = report
        self.close()

    def close(self) -> None:
        """Where no last one came, in a failure, the newest stays."""
        self._live.stop()
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._console.print(self._drawn(newest, self._top))

    def _drawn(self, report: Report, most: int | None) -> rich.text.Text:
        from rich.text import Text

        width = self._console.width
        made = table(report, most)
        titles, *rows = made.lines(width)
        drawn = Text("\n".join([*heading(report, width), ""]), no_wrap=True, overflow="ellipsis")
        drawn.append(titles, style="bold")
        for row in rows:
            drawn.append(f"\n{row}")
        if said := remark(report, len(made.rows)):
            drawn.append(f"\n{said}", style="dim")
        return drawn
