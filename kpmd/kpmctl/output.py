"""What commands share: their settings, and tables for people, files and pipes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kpmd.client.client import Client

#: Columns between two columns of a table.
_GAP = 2

#: The width of a table that nothing limits.
_WIDEST = 10_000


def clean(text: str, keep: str = "") -> str:
    """The text with its control characters written out: names are not ours to trust."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


@functools.lru_cache(maxsize=1024)
def user_name(uid: int) -> str:
    """A user's name, or else number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


@dataclass(frozen=True)
class Column:
    """A column: numbers stand to the right; ``cut`` ones give way where a line must be short."""

    title: str
    right: bool = False
    cut: bool = False


@dataclass
class Table:
    """Rows under titles, laid out the same for a terminal and for a file."""

    columns: Sequence[Column]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Add a row; None is shown as a dash."""
        self.rows.append(["-" if cell is None else clean(str(cell)) for cell in cells])

    def _all(self) -> list[list[str]]:
        return [[column.title for column in self.columns], *self.rows]

    def lines(self, most: int | None = None) -> list[str]:
        """The lines, the titles first, no blanks at their ends.

        ``most``: what a line may take; columns with ``cut`` give way, the others never do.
        """
        import rich.table
        from rich.console import Console
        from rich.text import Text

        columns = range(len(self.columns))
        widths = [max(len(row[index]) for row in self._all()) for index in columns]
        # rich itself narrows all columns alike.
        excess = sum(widths) + _GAP * (len(widths) - 1) - (most or _WIDEST)
        drawn = rich.table.Table(box=None, show_edge=False, pad_edge=False, padding=(0, _GAP, 0, 0))
        for width, column in zip(widths, self.columns, strict=True):
            less = max(min(excess, width - len(column.title)), 0) if column.cut else 0
            excess -= less
            drawn.add_column(
                Text(column.title),
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=width - less,
            )
        for row in self.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console = Console(width=_WIDEST, file=io.StringIO(), color_system=None)
        with console.capture() as captured:
            console.print(drawn)
        return [line.rstrip() for line in captured.get().splitlines()]


def prepare() -> None:
    """Import what draws tables: as long as a command waits for something, that costs no time."""
    import rich.console
    import rich.table  # noqa: F401


def on_terminal() -> bool:
    """Whether stdout is a terminal that can do more than print lines."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@dataclass(frozen=True)
class Settings:
    """The options of ``kpmctl`` itself."""

    socket: str
    json: bool

    def client(self) -> Client:
        """A client of the daemon."""
        from kpmd.client.client import Client

        return Client(self.socket)

    def write_json(self, data: object) -> None:
        """One JSON document on a line of its own."""
        click.echo(json.dumps(data))

    def write_list(self, items: Iterable[Any], table: Table, cells: Any) -> None:
        """A list as the daemon's JSON, in one page, or as a table: ``cells`` makes a row's."""
        if self.json:
            self.write_json({"items": list(items), "next": None})
            return
        for item in items:
            table.add(*cells(item))
        write_table(table)


def end_each(
    ctx: click.Context,
    ids: Iterable[str],
    end: Callable[[Client, str], None],
    done_as: str = "deleted",
) -> None:
    """End each of these by ``end``. Goes on where one cannot be, and leaves with its status.

    With --json those that were ended are written, as ``done_as``.
    """
    from kpmd.client.errors import ApiError
    from kpmd.kpmctl import failures

    settings: Settings = ctx.obj
    status, done = 0, []
    with settings.client() as client:
        for each in ids:
            try:
                end(client, each)
            except ApiError as error:
                failed = failures.report(error) or failures.OTHER
                status = status or failed
            else:
                done.append(each)
    if settings.json:
        settings.write_json({done_as: done})
    ctx.exit(status)


def write_table(table: Table) -> None:
    """A table on stdout. Nothing of it is cut; a terminal wraps what it has no room for."""
    titles, *rows = table.lines()
    click.echo(click.style(titles, bold=True) if on_terminal() else titles)
    if rows:
        click.echo("\n".join(rows))


def draw(text: str) -> None:
    """Write to stderr's terminal what is no line yet; nothing where the terminal is gone."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
