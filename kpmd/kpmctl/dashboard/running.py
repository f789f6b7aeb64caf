"""The life of ``kpmctl dashboard``: from the daemon's first answer to a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import tempfile
import webbrowser
from collections.abc import Iterator

import click

from kpmd.client import AsyncClient
from kpmd.client.errors import ClientError
from kpmd.kpmctl.dashboard.server import listen, serve
from kpmd.kpmctl.dashboard.watch import Watcher
from kpmd.kpmctl.output import Settings

#: Seconds to wait for the daemon, which answers within milliseconds.
_PATIENCE = 5.0


async def run(settings: Settings, port: int, open_: bool) -> None:
    """Serve on this port of loopback (0: a free one) until a signal comes. Raises ClientError.

    ``open_``: open the page in the user's browser.
    """
    async with contextlib.AsyncExitStack() as last:
        stop = last.enter_context(_stop())
        kpmd = await last.enter_async_context(AsyncClient(settings.socket, timeout=_PATIENCE))
        await kpmd.version()  # whoever is not let in is told now, and not on a page
        listener = last.enter_context(_listen(port))
        watcher = Watcher(kpmd)
        last.push_async_callback(watcher.close)
        token = secrets.token_urlsafe(32)
        runner = await serve(watcher, listener, token)
        last.push_async_callback(runner.cleanup)
        # Behind the #: browsers never send that.
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/#{token}"
        _tell(settings, url)
        if open_:
            page = last.enter_context(_way_to(url))
            if not await asyncio.to_thread(webbrowser.open, f"file://{page}"):
                click.echo("kpmctl: there is no browser here to open it with", err=True)
        await stop.wait()


def _listen(port: int) -> socket.socket:
    try:
        return listen(port)
    except OSError as error:
        raise ClientError(
            f"cannot listen on port {port} of loopback ({error.strerror}); "
            "without --port a free one is taken"
        ) from error


def _tell(settings: Settings, url: str) -> None:
    if settings.json:
        settings.write_json({"url": url})
        return
    click.echo(url)
    click.echo("Whoever has this address sees what you may see. Ctrl-C ends it.", err=True)


@contextlib.contextmanager
def _stop() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set; the second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    # What is ignored, as for a shell's background job, stays ignored.
    numbers = [
        each
        for each in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(each) is not signal.SIG_IGN
    ]

    def set_() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        loop.add_signal_handler(number, set_)
    yield stop


@contextlib.contextmanager
def _way_to(url: str) -> Iterator[str]:
    """A file that leads a browser there: every user can see the arguments of its process."""
    folder = os.environ.get("XDG_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="kpmctl-", dir=folder) as private:
        path = os.path.join(private, "dashboard.html")
        with open(path, "w", encoding="ascii") as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={url}">\n')
        yield path
