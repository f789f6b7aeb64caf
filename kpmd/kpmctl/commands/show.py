"""Commands that only look: capabilities, programs, links, link, symbols."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kpmd.kpmctl.output import Column, Settings, Table, clean, write_table
from kpmd.kpmctl.parameters import FUNCTION, id_of

if TYPE_CHECKING:
    from kpmd.client import answers

_SUPPORTED = {True: "yes", False: "no", None: "unknown"}

_RESTART = {
    True: "survived by persistent things, leases, and what belongs to a living process",
    False: "survived by nothing: what is attached ends with the daemon",
}


@click.command()
@click.option("--refresh", is_flag=True, help="Run the feature tests again (administrators).")
@click.pass_obj
def capabilities(settings: Settings, refresh: bool) -> None:
    """Show what the kernel and the daemon can do for you."""
    with settings.client() as client:
        found = client.capabilities(refresh)
    if settings.json:
        settings.write_json(found)
        return
    kernel = found["kernel"]
    click.echo(clean(f"kernel    {kernel['release']} ({kernel['machine']})"))
    click.echo(clean(f"API       version {found['api']['version']}"))
    click.echo(clean(f"builtins  {', '.join(found['builtins']) or '-'}"))
    click.echo(f"restart   {_RESTART[found['survives_restart']]}")
    click.echo(clean(f"policy    {summary(found['policy'])}; `kpmctl policy show` tells more"))
    click.echo()
    table = Table([Column(title) for title in ("FEATURE", "SUPPORTED", "SINCE KERNEL", "REASON")])
    for name, feature in found["features"].items():
        table.add(name, _SUPPORTED[feature["supported"]], feature["min_kernel"], feature["reason"])
    write_table(table)
    click.echo()
    limits = Table([Column("LIMIT"), Column("VALUE", right=True)])
    for name, value in found["limits"].items():
        limits.add(name, limit_cell(value))
    write_table(limits)


def summary(policy: answers.Policy) -> str:
    """The policy in a few words."""
    if policy["administrator"]:
        return "you are an administrator, and may do everything"
    if policy["rule"] is None:
        return "no rule is about you: you may do nothing but look at what is yours"
    return f"rule {policy['rule']} ({', '.join(policy['calls']) or 'no calls'})"


def limit_cell(value: int | float | None) -> str:
    """A limit as a number."""
    if value is None:
        return "unlimited"
    return f"{value:g}" if isinstance(value, float) else str(value)


@click.command()
@click.pass_obj
def programs(settings: Settings) -> None:
    """List your programs."""
    with settings.client() as client:
        table = program_table()
        settings.write_list(client.programs(), table, program_cells)


def program_table() -> Table:
    """A table of programs, without rows."""
    return Table(
        [
            Column("PROGRAM"),
            Column("KERNEL ID", right=True),
            Column("NAME"),
            Column("ATTACH"),
            Column("LINKS", right=True),
            Column("LIFETIME"),
            Column("OWNER"),
            Column("CREATED"),
        ]
    )


def program_cells(program: answers.Program) -> list[object]:
    """A program as a row."""
    return [
        program["id"],
        program["kernel_id"],
        program["name"],
        program["attach"],
        program["links"],
        lifetime_cell(program["lifetime"]),
        owner_cell(program["owner"]),
        program["created_at"],
    ]


@click.command()
@click.option(
    "--program", type=id_of("prg"), metavar="PROGRAM_ID", help="Only the links of this program."
)
@click.option(
    "--client", "owner", type=id_of("cli"), metavar="CLIENT_ID", help="Only those it made."
)
@click.option(
    "--lease", type=id_of("lse"), metavar="LEASE_ID", help="Only those that end with this lease."
)
@click.pass_obj
def links(settings: Settings, program: str | None, owner: str | None, lease: str | None) -> None:
    """List your links.

    A link whose STATE is detaching has ended, for the reason behind it, but is in the kernel still:
    its program runs on until it is gone from the list.
    """
    with settings.client() as client:
        settings.write_list(client.links(program, owner, lease), link_table(), link_cells)


def link_table() -> Table:
    """A table of links, without rows."""
    return Table(
        [
            Column("LINK"),
            Column("KERNEL ID", right=True),
            Column("PROGRAM"),
            Column("KIND"),
            Column("FUNCTIONS", right=True),
            Column("MISSED", right=True),
            Column("LIFETIME"),
            Column("STATE"),
            Column("OWNER"),
            Column("CREATED"),
        ]
    )


def link_cells(link: answers.Link) -> list[object]:
    """A link as a row."""
    return [
        link["id"],
        link["kernel_id"],
        link["program"],
        link["kind"],
        link["count"],
        link["missed"],
        lifetime_cell(link["lifetime"]),
        f"detaching: {link.get('reason')}" if link["state"] == "detaching" else link["state"],
        owner_cell(link["owner"]),
        link["created_at"],
    ]


@click.command()
@click.argument("link_id", type=id_of("lnk"))
@click.option("--targets", is_flag=True, help="List the functions that it is attached to.")
@click.option("--skipped", is_flag=True, help="List what it is not attached to, and why.")
@click.pass_obj
def link(settings: Settings, link_id: str, targets: bool, skipped: bool) -> None:
    """Show one link.

    MISSED are the calls that the kernel could not run the program for; a dash where the kernel
    (before 6.6) does not tell.
    """
    with settings.client() as client:
        found = client.link(link_id)
        listed = list(client.targets(link_id)) if targets else []
        missing = list(client.skipped(link_id)) if skipped else []
    if settings.json:
        lists: dict[str, object] = {"targets": listed} if targets else {}
        # ``skipped`` is a number in the link; what it counts stands beside it.
        lists |= {"skipped_items": missing} if skipped else {}
        settings.write_json({**found, **lists})
        return
    table = link_table()
    table.add(*link_cells(found))
    write_table(table)
    if targets:
        click.echo()
        functions = Table(
            [Column("ADDRESS"), Column("COOKIE", right=True), Column("FUNCTION"), Column("MODULE")]
        )
        for each in listed:
            functions.add(each["address"], each["cookie"], each["symbol"], each["module"])
        write_table(functions)
    if skipped:
        click.echo()
        left_out = Table([Column("FUNCTION"), Column("MODULE"), Column("REASON")])
        for gap in missing:
            left_out.add(gap["symbol"], gap["module"], f"{gap['reason']}: {gap['detail']}")
        write_table(left_out)


@click.command()
@click.argument("pattern", default="*", type=FUNCTION)
@click.pass_obj
def symbols(settings: Settings, pattern: str) -> None:
    """List the functions that can be traced, all or those that match PATTERN.

    PATTERN is a glob with * and ? (quote it), with its module behind it where you want only that
    one's: 'nft_*[nf_tables]'.
    """
    table = Table([Column("FUNCTION"), Column("MODULE"), Column("ADDRESS"), Column("AMBIGUOUS")])
    with settings.client() as client:
        settings.write_list(
            client.symbols(pattern),
            table,
            lambda each: [
                each["symbol"],
                each["module"],
                each["address"],
                "yes" if each["ambiguous"] else None,
            ],
        )


def owner_cell(owner: answers.Owner) -> str:
    """A user's name, or else number."""
    return owner["user"] or f"uid {owner['uid']}"


def lifetime_cell(lifetime: answers.Lifetime) -> str:
    """What a thing ends with; a lease by its id."""
    return lifetime.get("lease") or lifetime["kind"]
