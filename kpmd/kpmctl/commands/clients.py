"""Commands about clients: clients, release."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kpmd.kpmctl.output import Column, Settings, Table, end_each, user_name
from kpmd.kpmctl.parameters import id_of

if TYPE_CHECKING:
    from kpmd.client import answers


@click.command()
@click.pass_obj
def clients(settings: Settings) -> None:
    """List your processes that are connected to the daemon, or hold something.

    LINKS, PROGRAMS and LEASES are how many each of them made that there are still;
    `kpmctl links --client CLIENT_ID` lists the links. This kpmctl is one of them.
    """
    table = Table(
        [
            Column("CLIENT"),
            Column("PID", right=True),
            Column("COMMAND"),
            Column("USER"),
            Column("LINKS", right=True),
            Column("PROGRAMS", right=True),
            Column("LEASES", right=True),
            Column("SINCE"),
        ]
    )
    with settings.client() as client:
        settings.write_list(client.clients(), table, _cells)


def _cells(client: answers.ClientRecord) -> list[object]:
    return [
        client["id"],
        client["pid"],
        client["command"],
        user_name(client["uid"]),
        client["links"],
        client["programs"],
        client["leases"],
        client["since"],
    ]


@click.command()
@click.argument("ids", type=id_of("cli"), metavar="CLIENT_ID...", nargs=-1, required=True)
@click.pass_context
def release(ctx: click.Context, ids: tuple[str, ...]) -> None:
    """End all that clients made: links, programs and leases, persistent things too.

    When it returns, all that is detached. The processes go on, and may make more. Goes on where one
    cannot be released; the exit status is then that of the first failure.
    """
    end_each(ctx, ids, lambda client, id_: client.release_client(id_), "released")
