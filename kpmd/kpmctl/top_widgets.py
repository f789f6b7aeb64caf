"""The widgets of ``kpmctl top`` that draw what its model has: the head, the titles, the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.binding import Binding
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from kpmd.kpmctl.output import clean
from kpmd.kpmctl.top_model import Column, Line, Model, amount, clock, rate, sparkline

if TYPE_CHECKING:
    from textual import events
    from textual.binding import BindingType

_GAP = 2

#: How many cells a function's bars may take: what divides HISTORY, and the title fits into.
_BAR_CELLS = (60, 30, 20, 12)

#: Cells that a function's name has at the least, before other columns give way.
_NAME = 18

# Colours by their names: what they look like is up to the terminal's owner.
_RATE = Style(bold=True)
_BARS = Style(color="green")
_DIM = Style(dim=True)
_MODULE = Style(color="cyan")
_WARNING = Style(color="yellow", bold=True)
_BADGE = Style(color="yellow", bold=True, reverse=True)
_TITLES = Style(reverse=True)
_SORTED = Style(reverse=True, bold=True)


def layout(width: int) -> dict[Column, int]:
    """The columns that there is room for, and how many cells each gets.

    ``width`` is that of the screen without the scroll bar.
    """
    wide = width >= 90
    widths = {
        Column.RATE: 11 if wide else 9,
        Column.RECENT: _BAR_CELLS[0],
        Column.CALLS: 15 if wide else 9,
        Column.SHARE: 6,
    }

    def rest() -> int:
        return width - sum(each + _GAP for each in widths.values())

    for bars in _BAR_CELLS:
        widths[Column.RECENT] = bars
        if bars <= width // 3 and rest() >= _NAME:
            break
    for given_up in (Column.SHARE, Column.RECENT, Column.CALLS):
        if rest() < _NAME:
            del widths[given_up]
    return {**widths, Column.FUNCTION: max(rest(), 1)}


class Head(Widget):
    """Two lines: what is counted, where and for how long; and what all of it comes to."""

    def __init__(self, model: Model, what: str, host: str) -> None:
        super().__init__()
        self._model = model
        self._what = clean(what)
        self._host = clean(host)

    def render(self) -> Text:
        """Both lines; what there is no room for is left out."""
        return Text("\n", no_wrap=True).join([self._first(), self._second()])

    def _first(self) -> Text:
        summary = self._model.summary
        ago = clock(summary.elapsed) if summary else "--:--"
        right = f"{self._host}  {ago}" if self.size.width >= 40 else ago
        badge = " PAUSED " if self._model.paused else ""
        room = max(self.size.width - len(right) - len(badge) - 4, 1)
        what = self._what if len(self._what) <= room else self._what[: room - 1] + "…"
        drawn = Text(f" {what} ", style=Style(bold=True))
        drawn.append(badge, _BADGE)
        drawn.append(" " * max(self.size.width - drawn.cell_len - len(right) - 1, 1))
        return drawn.append(right, Style(bold=False))

    def _second(self) -> Text:
        summary = self._model.summary
        if summary is None:
            return Text()
        functions = "function" if summary.attached == 1 else "functions"
        shown = len(self._model.lines())
        of = f"{shown:,} of " if self._model.filtered else ""
        # What is lost matters more than what is only nice to know: in order of the numbers.
        parts = [
            (0, f"{summary.attached:,} {functions} attached", None),
            (4, f"{of}{summary.called:,} called", None),
            (3, f"{rate(summary.rate, 9)} calls/s", None),
            (1, _missed(summary.missed), _WARNING if summary.missed else None),
            (2, f"dropped {summary.dropped:,}", _WARNING if summary.dropped else None),
        ]
        while sum(len(text) + 3 for _, text, _ in parts) > self.size.width and len(parts) > 1:
            parts.remove(max(parts, key=lambda part: part[0]))
        drawn = Text()
        for _, text, style in parts:
            drawn.append(" · " if drawn else " ", _DIM).append(text, style)
        return drawn


def _missed(missed: int | None) -> str:
    return "missed unknown" if missed is None else f"missed {missed:,}"


class Titles(Widget):
    """The columns' titles; a click sorts."""

    def __init__(self, model: Model, recent: str) -> None:
        super().__init__()
        self._model = model
        self._recent = recent

    def render(self) -> Text:
        """One line."""
        drawn = Text(no_wrap=True, overflow="crop", style=_TITLES)
        for column, width in layout(self.size.width - 1).items():
            title = self._recent if column is Column.RECENT else column.value
            style = _TITLES
            if column is self._model.sort:
                # The most first is downwards; of names the first ones are.
                title += "▲" if self._model.reverse else "▼"
                style = _SORTED
            left = column in (Column.RECENT, Column.FUNCTION)
            title = title.ljust(width) if left else title.rjust(width)
            drawn.append(title[:width], style)
            drawn.append(" " * _GAP, _TITLES)
        return drawn

    class Chosen(Message):
        """A column was clicked."""

        def __init__(self, column: Column) -> None:
            super().__init__()
            self.column = column

    def on_click(self, event: events.Click) -> None:
        """Find the column there."""
        end = 0
        for column, width in layout(self.size.width - 1).items():
            end += width + _GAP
            if event.x < end:
                self.post_message(self.Chosen(column))
                return


class Rows(ScrollView, can_focus=True, inherit_bindings=False):
    """The functions. Of thousands only those in sight are drawn."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_up", show=False),
        Binding("down,j", "scroll_down", show=False),
        Binding("pageup", "page_up", show=False),
        Binding("pagedown", "page_down", show=False),
        Binding("home", "scroll_home", show=False),
        Binding("end", "scroll_end", show=False),
    ]

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self._lines: Sequence[Line] = ()
        self._remark = ""

    def show(self, remark: str) -> None:
        """Draw the model's lines, or the remark where there is none."""
        self._lines = self._model.lines()
        self._remark = remark
        self.virtual_size = Size(self.scrollable_content_region.width, len(self._lines))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """The line ``y`` from the top of what is in sight."""
        width, number = self.scrollable_content_region.width, y + self.scroll_offset.y
        if number < len(self._lines):
            return Strip(self._drawn(self._lines[number], width)).adjust_cell_length(width)
        if not self._lines and y == 1:
            return Strip([Segment(f"  {self._remark}", _DIM)]).adjust_cell_length(width)
        return Strip.blank(width)

    def _drawn(self, line: Line, width: int) -> list[Segment]:
        drawn = []
        for column, cells in layout(width).items():
            if column is Column.RATE:
                style = _RATE if line.rate else _DIM
                drawn.append(Segment(rate(line.rate, cells).rjust(cells), style))
            elif column is Column.RECENT:
                bars = sparkline(line.recent, self._model.sample, cells)
                drawn.append(Segment(bars, _BARS))
            elif column is Column.CALLS:
                drawn.append(Segment(amount(line.calls, cells).rjust(cells)))
            elif column is Column.SHARE:
                drawn.append(Segment(f"{line.share:.1%}".rjust(cells)))
            else:
                drawn += _name(line, cells)
            drawn.append(Segment(" " * _GAP))
        return drawn[:-1]


def _name(line: Line, cells: int) -> list[Segment]:
    """The function and its module, cut where there is no room for all of it."""
    text = line.name if len(line.name) <= cells else f"{line.name[: cells - 1]}…"
    name, module = text[: len(line.function)], text[len(line.function) :]
    return [Segment(name), Segment(module, _MODULE)]
