"""The full-screen view of ``kpmctl top``. It and ``top_widgets`` alone import textual."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, ClassVar

from rich.table import Table
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static

from kpmd.kpmctl.output import clean
from kpmd.kpmctl.top_model import HISTORY, Column, Model
from kpmd.kpmctl.top_widgets import Head, Rows, Titles, layout

if TYPE_CHECKING:
    from textual.binding import BindingType

    from kpmd.kpmctl.top_sampler import Sampler

#: What to press, and what it does; then what is shown, and what it is.
_HELP = (
    ("q, Ctrl-C", "quit, and detach"),
    ("/", "filter by a part of the name; * and ? are wildcards"),
    ("Enter", "leave the filter's line, and keep the filter"),
    ("Esc", "show all again"),
    ("← →, 1 to 5", "sort by another column; a click on its title does it, too"),
    ("r", "reverse the order; a second click does it, too"),
    ("Space", "hold the display still, while counting goes on; or go on"),
    ("z", "count from zero"),
    ("↑ ↓ k j", "scroll; also PgUp, PgDn, Home, End"),
    ("", ""),
    ("CALLS/s", "calls a second, since the sample before"),
    ("LAST …", "calls a second over time; each function's highest bar is its own most"),
    ("CALLS", "since it was attached, or since z"),
    ("SHARE", "the function's part of all of these calls"),
    ("missed", "calls that the kernel could not run the program for"),
    ("dropped", "calls that the program had no room for in its map"),
)


class Sampled(Message):
    """The sampler has news."""


class Help(ModalScreen[None]):
    """The keys, and what the columns are."""

    CSS = """
    Help { align: center middle; }
    Help VerticalScroll {
        width: 76; max-width: 100%; height: auto; max-height: 100%;
        border: round $primary; padding: 0 1; scrollbar-size-vertical: 1;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter,space", "dismiss", "Back")
    ]

    def compose(self) -> ComposeResult:
        """One table, which scrolls where it must."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for what, does in _HELP:
            table.add_row(what, does)
        with VerticalScroll() as scrolled:
            scrolled.border_title = "kpmctl top"
            yield Static(table)


class TopApp(App[None]):
    """Shows what the sampler, which runs already, samples.

    ``what`` is told in the first line: the functions that were asked for; ``host`` is where they
    are. It ends by itself after ``duration``, and where the sampler has a ``failure``.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Head { height: 2; }
    Titles { height: 1; }
    Rows { height: 1fr; scrollbar-size-vertical: 1; scrollbar-gutter: stable; overflow-x: hidden; }
    #filter { height: 1; display: none; }
    #filter Static { width: auto; text-style: bold; }
    #filter Input { width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "Quit"),
        Binding("ctrl+c,ctrl+q", "leave", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False, priority=True),
        # What moves the focus has priority: the very next key is for what has it then.
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("enter", "keep", "Keep", key_display="Enter", priority=True),
        Binding("escape", "clear", "All", key_display="Esc", priority=True),
        Binding("space", "pause", "Pause", key_display="Space"),
        Binding("z", "reset", "Zero"),
        Binding("r", "reverse", show=False),
        Binding("left", "beside(-1)", "Sort", key_display="←→"),
        Binding("right", "beside(1)", show=False),
        *(Binding(str(n), f"column({n - 1})", show=False) for n in range(1, len(Column) + 1)),
        Binding("question_mark", "help", "Help", key_display="?"),
    ]

    def __init__(
        self,
        sampler: Sampler,
        what: str,
        host: str,
        interval: float,
        duration: float | None = None,
    ) -> None:
        # The terminal's own colours, and with NO_COLOR none at all.
        super().__init__(ansi_color=True)
        self.theme = "ansi-dark"
        self.animation_level = "none"
        self.model = Model()
        self._sampler = sampler
        self._what = what
        self._host = host
        self._duration = duration
        seconds = HISTORY * interval
        self._recent = "LAST MINUTE" if seconds == 60 else f"LAST {seconds:g} s"

    def compose(self) -> ComposeResult:
        """From the top down."""
        yield Head(self.model, self._what, self._host)
        yield Titles(self.model, self._recent)
        yield Rows(self.model)
        with Horizontal(id="filter"):
            yield Static("Filter ", markup=False)
            yield Input(compact=True, placeholder="a part of the name")
        yield Footer(compact=True)

    def on_load(self) -> None:
        """Signals end it as q does: in order, and with the terminal as it was."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.action_leave)

    def on_mount(self) -> None:
        """Look at what came already, and be woken for the rest."""
        self.query_one(Rows).focus()
        if self._duration is not None:
            asyncio.get_running_loop().call_later(self._duration, self.action_leave)
        self._sampler.wake = lambda: self.post_message(Sampled())
        self.post_message(Sampled())

    def on_sampled(self) -> None:
        """Take in what came."""
        while not self._sampler.news.empty():
            self.model.add(self._sampler.news.get_nowait())
        if self._sampler.failure is not None:
            self.exit()
        else:
            self._show()

    def on_resize(self) -> None:
        """Lay out anew."""
        self.call_after_refresh(self._show)

    def on_titles_chosen(self, message: Titles.Chosen) -> None:
        """Sort by it."""
        self.model.sort_by(message.column)
        self._show()

    def on_input_changed(self, message: Input.Changed) -> None:
        """Filter while it is typed."""
        self.model.filter(message.value.strip())
        self.query_one(Rows).scroll_home()
        self._show_filter()
        self._show()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys do something; all others go to who has the focus."""
        if len(self.screen_stack) > 1:
            return action in ("leave", "suspend_process")
        typing = isinstance(self.focused, Input)
        if action == "clear":
            return typing or self.model.filtered
        return typing if action == "keep" else not (action == "filter" and typing)

    def action_leave(self) -> None:
        """End; it is detached while the terminal becomes what it was."""
        self._sampler.stop()
        self.exit()

    def action_filter(self) -> None:
        """Type a filter."""
        self.query_one("#filter").display = True
        self.screen.set_focus(self.query_one(Input))

    def action_keep(self) -> None:
        """Back to the rows."""
        self.screen.set_focus(self.query_one(Rows))
        self._show_filter()

    def action_clear(self) -> None:
        """Show all again."""
        self.query_one(Input).value = ""
        self.model.filter("")
        self.action_keep()

    def action_pause(self) -> None:
        """Stand still, or go on."""
        self.model.pause(not self.model.paused)
        self._show()

    def action_reset(self) -> None:
        """From zero."""
        self.model.reset()
        self._show()

    def action_reverse(self) -> None:
        """The least first."""
        self.model.sort_by(self.model.sort)
        self._show()

    def action_beside(self, step: int) -> None:
        """Sort by the column to the left or right, of those in sight."""
        columns = list(layout(self.size.width - 1))
        at = columns.index(self.model.sort) if self.model.sort in columns else 0
        self.model.sort_by(columns[(at + step) % len(columns)])
        self._show()

    def action_column(self, number: int) -> None:
        """Sort by the column of this number."""
        self.model.sort_by(list(Column)[number])
        self._show()

    def action_help(self) -> None:
        """Tell of the keys."""
        self.push_screen(Help())

    def _show_filter(self) -> None:
        typing = isinstance(self.focused, Input)
        self.query_one("#filter").display = typing or self.model.filtered

    def _show(self) -> None:
        main = self.screen_stack[0]  # the help may lie above it
        main.query_one(Head).refresh()
        main.query_one(Titles).refresh()
        main.query_one(Rows).show(self._remark())

    def _remark(self) -> str:
        """Why there is no line."""
        summary = self.model.summary
        if summary is None:
            return f"attaching to {clean(self._what)} …"
        if summary.called:
            return "no function that was called has a name like that: Esc shows all"
        return "no calls yet"
