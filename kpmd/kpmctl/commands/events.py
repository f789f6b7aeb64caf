"""``kpmctl events``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from kpmd.client.errors import ConnectionFailed
from kpmd.kpmctl.output import Settings, clean, user_name
from kpmd.kpmctl.stopping import Stop, Stopped

if TYPE_CHECKING:
    from kpmd.client import answers


@click.command()
@click.option(
    "--since",
    metavar="SEQ",
    help="Begin behind this event; its seq is what --json shows. Fails with status 8 where the "
    "daemon no longer has what came after it: it keeps some thousand, and none over a restart.",
)
@click.pass_obj
def events(settings: Settings, since: str | None) -> None:
    """Show what is made and what ends, and why, as it happens, until Ctrl-C.

    A line each: when, what, what happened, its id, whose it is, and behind that why it ends. A link
    that ends is detaching first, and ended when the kernel has let go of it.

    Ends with status 3 when the daemon stops, and also when what is written here is not read as fast
    as it comes: events are never left out.
    """
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        last.enter_context(contextlib.suppress(Stopped))
        client = last.enter_context(settings.client())
        with stop.breakable():
            found = client.events(since)
        while True:
            with stop.breakable():
                event = next(found, None)
            if event is None:
                raise ConnectionFailed("the daemon has ended the events: it is stopping", "lost")
            if settings.json:
                settings.write_json(event)
            else:
                click.echo(line(event))


def line(event: answers.Event) -> str:
    """An event for people."""
    return clean(
        f"{event['time']}  {event['what']:<7}  {event['event']:<9}  {event['id']:<28}  "
        f"{user_name(event['uid'])}  {_details(event)}"
    )


def _details(event: answers.Event) -> str:
    """Why, and what else there is to tell."""
    parts = []
    if "name" in event:
        parts.append(event["name"])
    if "kind" in event:
        many = event.get("count", 0)
        parts.append(f"{event['kind']} of {many} {'function' if many == 1 else 'functions'}")
    if "program" in event:
        parts.append(event["program"])
    if "pid" in event:
        parts.append(f"{event.get('command')}[{event['pid']}]")
    if "client" in event:
        parts.append(event["client"])
    reason = f"{event['reason']}: " if "reason" in event else ""
    return reason + ", ".join(parts)
