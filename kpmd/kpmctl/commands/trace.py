"""``kpmctl trace``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from kpmd.client.errors import ProtocolError
from kpmd.kpmctl import filters
from kpmd.kpmctl.filters import Wanted
from kpmd.kpmctl.output import Settings, clean, on_terminal
from kpmd.kpmctl.stopping import Stop, Stopped

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.kpmctl.call_lines import Call
    from kpmd.kpmctl.tracing import Tracing

#: Arguments that the builtin tells.
_ARGUMENTS = 6


@click.command()
@filters.options
@click.option(
    "--entry-only", is_flag=True, help="Show calls when they begin, not when they return."
)
@click.option(
    "--args",
    "arguments",
    type=click.IntRange(0, _ARGUMENTS),
    default=3,
    show_default=True,
    metavar="N",
    help="Show the first N arguments, whether the function has them or not.",
)
@click.option(
    "--slower-than",
    type=filters.duration,
    metavar="TIME",
    help="Show only calls that took longer: 20us, 1.5ms, 2s.",
)
@click.option("--max", "most", type=click.IntRange(1), metavar="N", help="End after N calls.")
@click.option("--elapsed", is_flag=True, help="Show seconds since the first call, not time of day.")
@click.pass_context
def trace(
    ctx: click.Context,
    wanted: Wanted,
    duration: float | None,
    entry_only: bool,
    arguments: int,
    slower_than: int | None,
    most: int | None,
    elapsed: bool,
) -> None:
    """Show each call of functions: when, how long, by whom, its arguments, what it returned.

    FUNCTION is a name or a glob, as for `kpmctl count`. Ctrl-C, SIGTERM, the end of --duration or
    --max calls end it and detach.

    A line for each call, in the order in which they return; the time is when it began. Arguments
    and return values are what the registers hold: large ones in hexadecimal, negative ones with the
    name of the error. A function that returns nothing leaves anything there.

    Calls that are lost on the way, because there are more than can be shown, or because the daemon
    was restarted meanwhile, are told of on standard error. With --json each call is one line.
    """
    from kpmd.kpmctl.tracing import Tracing, announce, begin, explained, warn

    if entry_only and slower_than is not None:
        raise click.UsageError("--slower-than looks at what has returned, --entry-only does not")
    settings: Settings = ctx.obj
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        client = last.enter_context(settings.client())
        tracing = Tracing(client, "trace")
        last.callback(tracing.close)

        def start() -> None:
            tracing.load(wanted, {"entry_only": 1} if entry_only else None)
            # Read before there is anything: the first calls may come faster than there is room.
            stream = client.records(tracing.map("events"), "trace_event", on_gap=_say)
            opened.append(iter(last.enter_context(stream)))
            tracing.attach(wanted, entries_only=entry_only)
            tracing.names()

        opened: list[Iterator[answers.Record]] = []
        begin(settings, stop, start)
        announce(settings, tracing, duration is not None or most is not None)
        show = _writer(settings, tracing, arguments, entry_only, elapsed)
        with explained():
            with contextlib.suppress(Stopped), stop.after(duration):
                _follow(stop, opened[0], show, slower_than or 0, most)
            tracing.end()
            missed, lost = tracing.missed(), tracing.lost()
        warn(missed, lost)


def _say(text: str) -> None:
    click.echo(f"kpmctl: {text}", err=True)


def _follow(
    stop: Stop,
    records: Iterator[answers.Record],
    show: _Writer,
    slower_than: int,
    most: int | None,
) -> None:
    """Show calls until there are enough of them, or the map ends. Raises Stopped."""
    from kpmd.kpmctl.call_lines import Call

    shown = 0
    while most is None or shown < most:
        with stop.breakable():
            record = next(records, None)
        if record is None:
            return
        if "lost" in record:
            reason = clean(str(record.get("reason")))
            _say(f"{record['lost']} calls lost: {reason}")
            continue
        decoded = record.get("decoded")
        if not isinstance(decoded, dict):
            raise ProtocolError("the daemon sent a record that it did not decode")
        call = Call(decoded)
        if call.duration_ns >= slower_than:
            show(call)
            shown += 1


class _Writer:
    """Writes calls on stdout."""

    def __init__(self, settings: Settings, tracing: Tracing, arguments: int) -> None:
        self.settings = settings
        self.tracing = tracing
        self.arguments = arguments

    def __call__(self, call: Call) -> None:
        """As one JSON object."""
        symbol, module = self.tracing.name(call.function)
        shown: dict[str, object] = {
            "time_ns": str(call.time_ns),
            "symbol": symbol,
            "module": module,
            "address": f"0x{call.function:016x}",
            "arguments": [str(each) for each in call.arguments[: self.arguments]],
            "pid": call.pid,
            "tid": call.tid,
            "uid": call.uid,
            "gid": call.gid,
            "cpu": call.cpu,
            "command": call.command,
        }
        if call.returned:
            shown |= {
                "duration_ns": str(call.duration_ns),
                "return_value": str(call.return_value),
            }
        self.settings.write_json(shown)


class _TextWriter(_Writer):
    """Writes calls as lines under a heading."""

    def __init__(
        self, settings: Settings, tracing: Tracing, arguments: int, entry_only: bool, elapsed: bool
    ) -> None:
        from kpmd.kpmctl.call_lines import CallLines
        from kpmd.kpmctl.live import can_show

        super().__init__(settings, tracing, arguments)
        # Another machine's clock began at another time.
        remote = str(settings.socket).startswith("ssh://")
        epoch = None if elapsed or remote else time.time_ns() - time.monotonic_ns()
        self._lines = CallLines(arguments, epoch, entry_only, can_show("µ"))
        heading = self._lines.heading()
        click.echo(click.style(heading, bold=True) if on_terminal() else heading)

    def __call__(self, call: Call) -> None:
        """As a line."""
        symbol, module = self.tracing.name(call.function)
        name = f"{symbol}[{module}]" if module else symbol
        click.echo(self._lines.line(call, name))


def _writer(
    settings: Settings, tracing: Tracing, arguments: int, entry_only: bool, elapsed: bool
) -> _Writer:
    if settings.json:
        return _Writer(settings, tracing, arguments)
    return _TextWriter(settings, tracing, arguments, entry_only, elapsed)
