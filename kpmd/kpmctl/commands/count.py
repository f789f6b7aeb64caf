"""``kpmctl count``."""

from __future__ import annotations

import contextlib

import click

from kpmd.kpmctl import filters
from kpmd.kpmctl.count_view import make_view
from kpmd.kpmctl.filters import Wanted
from kpmd.kpmctl.live import watch
from kpmd.kpmctl.output import Settings
from kpmd.kpmctl.parameters import seconds
from kpmd.kpmctl.stopping import Stop


@click.command()
@filters.options
@click.option(
    "--interval",
    type=seconds(0.05),
    default="1",
    show_default=True,
    metavar="SECONDS",
    help="Time between two tables; the first comes as soon as there are calls.",
)
@click.option("--by-process", is_flag=True, help="Count the calls of each process apart.")
@click.option("--kretprobe", is_flag=True, help="Count returns instead of calls.")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Show N functions at the most.")
@click.pass_context
def count(
    ctx: click.Context,
    wanted: Wanted,
    duration: float | None,
    interval: float,
    by_process: bool,
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
    from kpmd.kpmctl.counting import Counter
    from kpmd.kpmctl.tracing import begin, explained

    settings: Settings = ctx.obj
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        client = last.enter_context(settings.client())
        counter = Counter(client)
        last.callback(counter.close)

        def start() -> None:
            counter.start(wanted, "kretprobe" if kretprobe else "kprobe", by_process)

        begin(settings, stop, start)
        view = make_view(settings, top, by_process)
        last.callback(view.close)
        with explained():
            watch(
                stop,
                interval,
                duration,
                lambda: counter.report(interval),
                view.update,
                lambda report: not report.rows,
                counter.tracing.began,
            )
            # The last table is of all the calls there were until it was detached.
            counter.end()
            view.last(counter.report(interval))
