"""``kpmctl support-bundle``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from kpmd.client.errors import ClientError
from kpmd.kpmctl.output import Settings, clean, draw
from kpmd.kpmctl.parameters import seconds

if TYPE_CHECKING:
    from kpmd.kpmctl.support.collect import Bundle, Wanted

#: Seconds until it is shown what is waited for, and between two looks at the clock.
_PATIENCE, _PAUSE = 0.5, 0.3

#: 128 + SIGTERM, as shells have it.
_TERMINATED = 143

_EPILOG = """\b
As root it has most; as somebody else it has what that user may know:
  sudo kpmctl support-bundle
  kpmctl support-bundle --no-lists --output trouble.tar.gz
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write this file, which must not be there yet.  [default: kpmd-support-TIME.tar.gz]",
)
@click.option(
    "--redact/--no-redact",
    default=True,
    show_default=True,
    help="Put placeholders for users, groups, commands, labels, paths and this machine's name.",
)
@click.option("--no-lists", is_flag=True, help="Leave out programs, links, maps, clients, leases.")
@click.option("--no-config", is_flag=True, help="Leave out the configuration and the policy.")
@click.option("--no-journal", is_flag=True, help="Leave out the daemon's log and audit trail.")
@click.option(
    "--journal-lines",
    type=click.IntRange(1, 5000),
    default=1000,
    show_default=True,
    metavar="N",
    help="That many of the last lines of the log.",
)
@click.option(
    "--timeout",
    type=seconds(0.1),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for each part.",
)
@click.pass_obj
def support_bundle(
    settings: Settings,
    output: Path | None,
    redact: bool,
    no_lists: bool,
    no_config: bool,
    no_journal: bool,
    journal_lines: int,
    timeout: float,
) -> None:
    """Collect what somebody who helps you needs, in one file that you can look at and send.

    It has the daemon's answers about itself, about you and about what is yours (an administrator
    sees everyone's): features, policy, programs, links, the functions they are attached to, maps,
    clients, leases, metrics; and of this machine the kernel, mounts, sysctls, what `kpmd --check`
    says, kpmd's units with the end of their log, and the configuration. No map's content, and no
    environment. What cannot be had is left out, and the file says why: a daemon that is dead gives
    a bundle, too.

    It is for others to read: names of people, commands, labels and paths are replaced, each by the
    same placeholder everywhere. Functions, programs, maps and rules keep their names.

    With --json the bundle's manifest is written.
    """
    from kpmd.kpmctl.support import archive
    from kpmd.kpmctl.support.collect import Wanted, save

    now = datetime.now(UTC)
    path = output or Path(f"kpmd-support-{now:%Y%m%dT%H%M%SZ}.tar.gz")
    wanted = Wanted(
        address=settings.socket,
        redact=redact,
        lists=not no_lists,
        journal=0 if no_journal else journal_lines,
        config=not no_config,
        limit=timeout,
    )
    try:
        archive.check(path)
        bundle = asyncio.run(_collected(wanted))
        with _ended_by_sigterm():
            save(bundle, path)
    except asyncio.CancelledError:
        sys.exit(_TERMINATED)
    except OSError as error:
        raise ClientError(f"no bundle was made: {_reason(error)}") from error
    if settings.json:
        settings.write_json({"bundle": str(path), **bundle.manifest})
        return
    _tell(path, bundle, redact)


def _reason(error: OSError) -> str:
    if error.strerror is None:
        return str(error)  # our own words
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


async def _collected(wanted: Wanted) -> Bundle:
    """The bundle; where that takes long, a terminal is told what is waited for.

    Cancelled by SIGTERM.
    """
    from kpmd.kpmctl.support.collect import collect

    waiting: list[str] = []
    task = asyncio.current_task()
    if task is not None:
        # As asyncio does at SIGINT: what has been started is ended in order.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)

    def tell(files: Sequence[str]) -> None:
        waiting[:] = files

    shown = asyncio.create_task(_show(waiting))
    try:
        return await collect(wanted, tell)
    finally:
        shown.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await shown


async def _show(waiting: Sequence[str]) -> None:
    """Draw one line on stderr, over and over, and take it away when cancelled."""
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return
    begun = time.monotonic()
    await asyncio.sleep(_PATIENCE)
    try:
        while True:
            text = f"waiting for {', '.join(waiting)}"
            took = f" {time.monotonic() - begun:.1f} s"
            room = shutil.get_terminal_size().columns - 1 - len(took)
            text = text if len(text) <= room else f"{text[: room - 1]}…"
            draw(f"\r{text}{took}\x1b[K")
            await asyncio.sleep(_PAUSE)
    finally:
        draw("\r\x1b[K")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A block that SIGTERM ends by an exception, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(path: Path, bundle: Bundle, redacted: bool) -> None:
    """Where it is, what is missing in it, and what to do with it."""
    missing: dict[str, list[str]] = {}
    for each in bundle.results:
        if each.outcome != "got":
            missing.setdefault(f"{each.outcome}: {each.detail}", []).append(each.part.file)
    got = sum(each.outcome == "got" for each in bundle.results)
    click.echo(clean(f"{path}: {got} of {len(bundle.results)} parts"))
    for why, files in missing.items():
        click.echo(clean(f"  {why}"))
        click.echo(
            textwrap.fill(", ".join(files), 96, initial_indent="    ", subsequent_indent="    ")
        )
    click.echo()
    if redacted:
        click.echo("Names of people, commands, labels and paths have placeholders.")
    else:
        click.echo("It names people, commands, labels and paths: do not put it where all may read.")
    click.echo("Look at it before you send it:")
    click.echo(f"  tar -xOzf {clean(shlex.quote(str(path)))} | less")
