"""``kpmctl top``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from kpmd.client.errors import ClientError
from kpmd.kpmctl import filters
from kpmd.kpmctl.filters import Wanted
from kpmd.kpmctl.output import Settings
from kpmd.kpmctl.parameters import seconds

if TYPE_CHECKING:
    from kpmd.kpmctl.counting import Counter


@click.command()
@filters.options
@click.option(
    "--interval",
    type=seconds(0.1),
    default="1",
    show_default=True,
    metavar="SECONDS",
    help="Time between two samples.",
)
@click.pass_context
def top(ctx: click.Context, wanted: Wanted, duration: float | None, interval: float) -> None:
    """Watch on the whole terminal which functions are called most.

    FUNCTION is a name, or a glob with * and ? (quote it), with its module behind it where you want
    only that one's: 'nft_*[nf_tables]'. Globs leave out what is on the daemon's deny list.

    The keys: q quits and detaches, / filters by name, left and right choose the column to sort by,
    Space holds the display still, z counts from zero, ? tells the rest. Functions that were not
    called are not shown.
    """
    settings: Settings = ctx.obj
    if settings.json:
        raise click.UsageError("top draws, and has no JSON: use `kpmctl --json count`", ctx)
    if not _on_terminal():
        raise click.UsageError(
            "top needs a terminal to draw on: elsewhere `kpmctl count` tells the same", ctx
        )
    if find_spec("textual") is None:
        raise ClientError(
            "top draws with textual, which is not installed: pip install 'kpmd-client[top]'"
        )
    from kpmd.kpmctl.top_sampler import Sampler

    @contextlib.contextmanager
    def attached() -> Iterator[Counter]:
        from kpmd.kpmctl.counting import Counter
        from kpmd.kpmctl.tracing import explained

        with settings.client() as client, contextlib.ExitStack() as last:
            counter = Counter(client)
            last.callback(counter.close)
            counter.start(wanted, "kprobe")
            with explained():
                yield counter

    sampler, status = Sampler(attached, interval), 0
    sampler.start()
    try:
        # This import takes a while, in which the daemon attaches.
        from kpmd.kpmctl.top_view import TopApp

        if sampler.failure is None:
            names = " ".join(wanted.functions)
            app = TopApp(sampler, names, _host(settings.socket), interval, duration)
            app.run()
            status = app.return_code or 0
    finally:
        sampler.stop()
        sampler.wait()
    if sampler.failure is not None:
        raise sampler.failure
    ctx.exit(status)


def _on_terminal() -> bool:
    """Whether keys can be read, and a screen be drawn; textual draws on stderr."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return os.environ.get("TERM", "dumb") != "dumb" and all(
        each is not None and each.isatty() for each in streams
    )


def _host(address: str) -> str:
    """The machine whose functions are counted."""
    if address.startswith("ssh://"):
        return address.removeprefix("ssh://").partition("/")[0].rpartition("@")[2]
    return os.uname().nodename
