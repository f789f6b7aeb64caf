"""``kpmctl count``."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

import click

from kpmd.client.count_view import View, make_view
from kpmd.client.errors import ClientError
from kpmd.client.output import Settings
from kpmd.client.parameters import seconds
from kpmd.client.stopping import Stop, Stopped

if TYPE_CHECKING:
    from kpmd.client.counting import Counter


@click.command()
@click.argument("functions", metavar="FUNCTION...", nargs=-1, required=True)
@click.option(
    "--exclude", metavar="GLOB", multiple=True, help="Leave out what matches; repeatable."
)
@click.option(
    "--interval",
    type=seconds(0.05),
    default="1",
    show_default=True,
    metavar="SECONDS",
    help="Time between two tables.",
)
@click.option(
    "--duration",
    type=seconds(0),
    metavar="SECONDS",
    help="End after this time.  [default: go on until Ctrl-C]",
)
@click.option(
    "--pid",
    type=click.IntRange(1, (1 << 32) - 1),
    help="Count the calls of this process alone (its id outside of containers).",
)
@click.option("--kretprobe", is_flag=True, help="Count returns instead of calls.")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Show N functions at the most.")
@click.pass_context
def count(
    ctx: click.Context,
    functions: tuple[str, ...],
    exclude: tuple[str, ...],
    interval: float,
    duration: float | None,
    pid: int | None,
    kretprobe: bool,
    top: int | None,
) -> None:
    """Count the calls of functions, and show those called most.

    FUNCTION is a name, or a glob with * and ? (quote it), with its module behind it where you want
    only that one's: 'nft_*[nf_tables]'. Globs leave out what is on the daemon's deny list.

    Ctrl-C, SIGTERM or the end of --duration shows the last table and detaches. The columns: calls
    since it was attached, calls a second over the last interval, the function. Functions that were
    not called are not shown. With --json each table is one line.
    """
    from kpmd.client.counting import Counter, explain_loss

    settings: Settings = ctx.obj
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        client = last.enter_context(settings.client())
        counter = Counter(client)
        last.callback(counter.close)
        try:
            with stop.breakable():
                counter.start(functions, pid, "kretprobe" if kretprobe else "kprobe", exclude)
        except Stopped:
            # What is just being made has no id for us yet, but ends with this process.
            raise KeyboardInterrupt from None
        view = make_view(settings, top)
        last.callback(view.close)
        try:
            _show(counter, view, stop, interval, duration)
            # The last table is of all the calls there were until it was detached.
            counter.end()
            view.last(counter.report(interval))
        except ClientError as error:
            raise explain_loss(error) from error


def _show(
    counter: Counter, view: View, stop: Stop, interval: float, duration: float | None
) -> None:
    """Show a report each interval, until a signal comes or ``duration`` is over."""
    now = time.monotonic()
    tick, end = now, math.inf if duration is None else now + duration
    with contextlib.suppress(Stopped):
        while True:
            # Where a report took longer than an interval the next one is due after a whole one.
            tick = tick + interval if tick + interval > now else now + interval
            stop.wait(min(tick, end) - now)
            if time.monotonic() >= end:
                return
            with stop.breakable():
                report = counter.report(interval)
            view.update(report)
            now = time.monotonic()
