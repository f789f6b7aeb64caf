"""Reports that come again and again: when they are made, and how a terminal shows them."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from kpmd.kpmctl.stopping import Stop, Stopped

if TYPE_CHECKING:
    from rich.text import Text

_SEPARATOR = ", "

#: Seconds from attaching to the first report, where there is something to tell.
_FIRST = 0.2

#: Seconds that are slept at once at the most.
_LONG = 3600.0

#: A line of a terminal: texts, each with its style as rich names it, or "".
Line = list[tuple[str, str]]

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class View(Protocol[R_contra]):
    """Shows reports."""

    def update(self, report: R_contra) -> None:
        """Show one of many."""

    def last(self, report: R_contra) -> None:
        """Show the last one, to stay."""

    def close(self) -> None:
        """Leave the terminal as it was; to be called again, and where no last one came."""


def watch(
    stop: Stop,
    interval: float,
    duration: float | None,
    report: Callable[[], R],
    update: Callable[[R], None],
    is_empty: Callable[[R], bool],
    begin: float | None = None,
) -> None:
    """Report each ``interval``, until a signal comes or ``duration`` is over.

    The first one comes sooner, if it is not empty: it is what somebody waits for. A ``report``
    may be broken off, an ``update`` is not. ``begin``: since when there is something to report, as
    ``time.monotonic`` has it; None: from now on.
    """
    now = time.monotonic()
    begin = now if begin is None else begin
    end = math.inf if duration is None else begin + duration
    tick, shown = begin, False
    with contextlib.suppress(Stopped):
        while True:
            step = interval if shown else min(_FIRST, interval)
            # Where a report took longer than an interval the next one is due after a whole one.
            tick = tick + step if tick + step > now else now + step
            stop.wait(min(tick, end) - now)
            now = time.monotonic()
            if now >= end:
                return
            with stop.breakable():
                made = report()
            if shown or not is_empty(made) or now - begin >= interval:
                update(made)
                shown = True
            now = time.monotonic()


def wait(stop: Stop, duration: float | None) -> None:
    """Wait until a signal comes or ``duration`` is over."""
    with contextlib.suppress(Stopped), stop.after(duration):
        while True:
            stop.wait(_LONG)


def fitted(parts: Sequence[str], width: int | None) -> list[str]:
    """The parts in lines of at most ``width``, where that can be; None: in one line."""
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


def can_show(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class LiveView(Generic[R]):
    """A report that is drawn over, and no higher than the terminal; the last one is whole."""

    def __init__(self, draw: Callable[[R, int, int | None], Sequence[Line]]) -> None:
        """``draw`` is given a report, the width and the height there is (None: no end)."""
        from rich.console import Console
        from rich.live import Live

        self._draw = draw
        self._newest: R | None = None
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def update(self, report: R) -> None:
        """Draw it over the one before."""
        self._newest = report
        # A line to spare: the cursor's.
        self._live.update(self._text(report, self._console.height - 1), refresh=True)

    def last(self, report: R) -> None:
        """Draw it whole, to stay."""
        self._newest = report
        self.close()

    def close(self) -> None:
        """Where no last one came, in a failure, the newest stays."""
        self._live.stop()
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._console.print(self._text(newest, None))

    def _text(self, report: R, height: int | None) -> Text:
        from rich.text import Text

        lines = self._draw(report, self._console.width, height)
        joined = Text("\n").join(Text.assemble(*line) for line in lines)
        joined.no_wrap, joined.overflow = True, "ellipsis"
        return joined
