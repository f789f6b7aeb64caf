"""``kpmctl latency``."""

from __future__ import annotations

import contextlib

import click

from kpmd.kpmctl import filters
from kpmd.kpmctl.filters import Wanted
from kpmd.kpmctl.live import wait, watch
from kpmd.kpmctl.output import Settings, on_terminal
from kpmd.kpmctl.parameters import seconds
from kpmd.kpmctl.stopping import Stop

#: Functions that have a histogram of their own, unless --top says how many.
_TOP = 5


@click.command()
@filters.options
@click.option(
    "--interval",
    type=seconds(0.05),
    metavar="SECONDS",
    help="Time between two histograms.  [default: 1 on a terminal; else there is just the last]",
)
@click.option("--each", is_flag=True, help="A histogram for each function, not one for all.")
@click.option(
    "--top",
    type=click.IntRange(1),
    metavar="N",
    help=f"With --each: the N functions that took most time together.  [default: {_TOP}]",
)
@click.pass_context
def latency(
    ctx: click.Context,
    wanted: Wanted,
    duration: float | None,
    interval: float | None,
    each: bool,
    top: int | None,
) -> None:
    """Show how long functions take, as a histogram by powers of two.

    FUNCTION is a name or a glob, as for `kpmctl count`.

    Ctrl-C, SIGTERM or the end of --duration shows the last histogram and detaches. A line has the
    time from its first number to less than its second, the calls that took so long, and a bar. p50,
    p90 and p99 are what half of the calls, 90 % and 99 % of them took at the most, as far as the
    histogram can tell: the upper end of a line. Calls that have not returned yet are not in it.

    Calls that are not in the histogram, because they were under way when it was attached, or for
    lack of room, or because the kernel missed them, are told of on standard error. With --json
    there is a line for each time, with the histogram of each function: slots[i] are the calls of
    2^i to 2^(i+1)-1 ns.
    """
    from kpmd.kpmctl.latencies import Latencies
    from kpmd.kpmctl.latency_view import make_view
    from kpmd.kpmctl.tracing import announce, begin, explained, warn

    if top is not None and not each:
        raise click.UsageError("--top takes --each")
    settings: Settings = ctx.obj
    live = on_terminal() and not settings.json
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        client = last.enter_context(settings.client())
        latencies = Latencies(client)
        last.callback(latencies.close)
        begin(settings, stop, lambda: latencies.start(wanted))
        if not live:
            announce(settings, latencies.tracing, duration is not None)
        view = make_view(settings, (top or _TOP) if each else None)
        last.callback(view.close)
        with explained():
            if live or interval:
                watch(
                    stop,
                    interval or 1.0,
                    duration,
                    latencies.report,
                    view.update,
                    lambda report: not report.functions,
                    latencies.tracing.began,
                )
            else:
                wait(stop, duration)
            latencies.end()
            report = latencies.report()
            view.last(report)
        warn(report.missed, report.lost)
