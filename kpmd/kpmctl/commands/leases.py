"""Commands about leases: leases, and lease create, renew, end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kpmd.kpmctl.commands.show import owner_cell
from kpmd.kpmctl.output import Column, Settings, Table, clean, end_each
from kpmd.kpmctl.parameters import id_of, label, seconds

if TYPE_CHECKING:
    from kpmd.client import answers

_SHORTEST = 0.1

_EPILOG = """\b
In a script:
  lease=$(kpmctl lease create --ttl 60 --quiet)
  kpmctl attach PROGRAM_ID --lease "$lease" vfs_read
  kpmctl lease renew "$lease"      # at least once a minute
  kpmctl lease end "$lease"
"""


@click.command()
@click.pass_obj
def leases(settings: Settings) -> None:
    """List your leases that have not ended.

    LINKS and PROGRAMS are how many end with it; `kpmctl links --lease LEASE_ID` lists the links.
    """
    table = Table(
        [
            Column("LEASE"),
            Column("TTL", right=True),
            Column("EXPIRES"),
            Column("LINKS", right=True),
            Column("PROGRAMS", right=True),
            Column("OWNER"),
            Column("CREATED"),
            Column("LABELS"),
        ]
    )
    with settings.client() as client:
        settings.write_list(client.leases(), table, _cells)


def _cells(lease: answers.Lease) -> list[object]:
    return [
        lease["id"],
        lease["ttl"],
        lease["expires_at"],
        lease["links"],
        lease["programs"],
        owner_cell(lease["owner"]),
        lease["created_at"],
        ",".join(f"{key}={value}" for key, value in lease["labels"].items()) or None,
    ]


@click.group(epilog=_EPILOG)
def lease() -> None:
    """Make, renew and end leases.

    What is loaded or attached with --lease LEASE_ID ends when the lease does: when it was not
    renewed in time, or by `kpmctl lease end`. A lease belongs to no process, so a script can hold
    what it makes by one, and leaves nothing behind where it fails.
    """


@lease.command()
@click.option(
    "--ttl",
    type=seconds(_SHORTEST),
    required=True,
    metavar="SECONDS",
    help="It ends after this time, unless it is renewed.",
)
@click.option(
    "--label",
    "labels",
    type=label,
    metavar="KEY=VALUE",
    multiple=True,
    help="Words of your own, which `kpmctl leases` shows; repeatable.",
)
@click.option("-q", "--quiet", is_flag=True, help="Write its id and nothing else.")
@click.pass_obj
def create(
    settings: Settings, ttl: float, labels: tuple[tuple[str, str], ...], quiet: bool
) -> None:
    """Make a lease."""
    with settings.client() as client:
        made = client.create_lease(_number(ttl), dict(labels))
    if quiet and not settings.json:
        click.echo(clean(made["id"]))
        return
    _show(settings, made)


@lease.command()
@click.argument("lease_id", type=id_of("lse"))
@click.option(
    "--ttl",
    type=seconds(_SHORTEST),
    metavar="SECONDS",
    help="Another time than it had before, for this renewal and those after it.",
)
@click.pass_obj
def renew(settings: Settings, lease_id: str, ttl: float | None) -> None:
    """Let a lease live for its time, counted from now."""
    with settings.client() as client:
        renewed = client.renew_lease(lease_id, None if ttl is None else _number(ttl))
    _show(settings, renewed)


@lease.command()
@click.argument("ids", type=id_of("lse"), metavar="LEASE_ID...", nargs=-1, required=True)
@click.pass_context
def end(ctx: click.Context, ids: tuple[str, ...]) -> None:
    """End leases, and what was loaded and attached with them.

    When it returns, all that is detached. Goes on where one cannot be ended; the exit status is
    then that of the first failure.
    """
    end_each(ctx, ids, lambda client, id_: client.end_lease(id_))


def _show(settings: Settings, lease: answers.Lease) -> None:
    if settings.json:
        settings.write_json(lease)
        return
    id_, until = lease["id"], lease["expires_at"]
    click.echo(clean(f"{id_}: until {until}, or longer with `kpmctl lease renew {id_}`."))


def _number(seconds: float) -> float:
    """Whole seconds as an int: the daemon answers what it was given, and 60 reads best as 60."""
    return int(seconds) if seconds.is_integer() else seconds
