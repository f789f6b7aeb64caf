"""``kpmctl dashboard``."""

from __future__ import annotations

import importlib.util

import click

from kpmd.client.errors import ClientError
from kpmd.kpmctl.output import Settings

_EPILOG = """\b
It works on this machine alone; from another, use the same port on both sides of an ssh:
  ssh -L 8000:127.0.0.1:8000 HOST kpmctl dashboard --port 8000
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Listen on this port of loopback.  [default: a free one]",
)
@click.option("--open", "open_", is_flag=True, help="Open the page in your browser.")
@click.pass_obj
def dashboard(settings: Settings, port: int, open_: bool) -> None:
    """Serve a page that shows what is yours, until Ctrl-C.

    It shows links, clients, programs and leases, how often functions are called and how long they
    take (where the builtins count and latency are attached), and events as they happen. An
    administrator sees everyone's. It only looks: nothing can be changed with it.

    The address has a token in it, and is for your eyes only.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise ClientError(
            "the dashboard is served by aiohttp, which is not installed: "
            "pip install 'kpmd-client[dashboard]'"
        )
    import asyncio

    from kpmd.kpmctl.dashboard.running import run

    asyncio.run(run(settings, port, open_))
