"""Commands that change something: load, attach, detach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import click

from kpmd.kpmctl.commands.maps import map_cells, map_table
from kpmd.kpmctl.commands.show import program_cells, program_table
from kpmd.kpmctl.output import Column, Settings, Table, clean, end_each, write_table
from kpmd.kpmctl.parameters import FUNCTION, id_of, is_glob, number, size, variable
from kpmd.kpmctl.progress import shown

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.client.client import Client

_lease_option = click.option(
    "--lease",
    type=id_of("lse"),
    metavar="LEASE_ID",
    help="Let it end with this lease.  [default: it is persistent]",
)


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--builtin", metavar="NAME", help="Load a program that ships with kpmd instead.")
@click.option(
    "--program", "names", metavar="NAME", multiple=True, help="Load only this program; repeatable."
)
@click.option(
    "--attach",
    type=click.Choice(["kprobe_multi", "kprobe_session"]),
    help="How it will be attached, where the program's section does not say.",
)
@click.option(
    "--global",
    "variables",
    type=variable,
    metavar="NAME=VALUE",
    multiple=True,
    help="Set a global variable to a number, or to bytes with hex:0011; repeatable.",
)
@click.option(
    "--max-entries",
    "sizes",
    type=size,
    metavar="MAP=N",
    multiple=True,
    help="Set a map's size; repeatable.",
)
@click.option(
    "--signature",
    type=click.File("rb"),
    metavar="FILE",
    help="An Ed25519 signature of the object, where the policy asks for one.",
)
@_lease_option
@click.pass_obj
def load(
    settings: Settings,
    file: BinaryIO | None,
    builtin: str | None,
    names: tuple[str, ...],
    attach: Literal["kprobe_multi", "kprobe_session"] | None,
    variables: tuple[tuple[str, int | bytes], ...],
    sizes: tuple[tuple[str, int], ...],
    signature: BinaryIO | None,
    lease: str | None,
) -> None:
    """Load the BPF programs of the ELF object FILE (- for standard input).

    They get the lifetime "persistent", and stay until `kpmctl detach PROGRAM_ID`; or they end with
    a lease (see `kpmctl lease`), though not before the last link that needs them. With the API's
    default lifetime they would end with kpmctl itself, at once.

    A signature is made with `openssl pkeyutl -sign -rawin -inkey KEY -in FILE`.
    """
    if (file is None) == (builtin is None):
        raise click.UsageError("give either FILE or --builtin NAME")
    if builtin is not None and names:
        raise click.UsageError("--program chooses from FILE; a builtin is loaded whole")
    if builtin is not None and signature is not None:
        raise click.UsageError("--signature is FILE's; a builtin needs none")
    with settings.client() as client:
        term = None if lease is None else client.lease(lease)
        elf = b"" if file is None else file.read()
        signed = None if signature is None else signature.read()
        with shown(settings, "load"):
            if builtin is None:
                made = client.load_object(
                    elf,
                    programs=names or None,
                    attach=attach,
                    globals=dict(variables),
                    max_entries=dict(sizes),
                    lifetime=lease or "persistent",
                    signature=signed,
                )
            else:
                made = client.load_builtin(
                    builtin,
                    attach=attach,
                    globals=dict(variables),
                    max_entries=dict(sizes),
                    lifetime=lease or "persistent",
                )
    if settings.json:
        settings.write_json(made)
        return
    programs, maps = program_table(), map_table()
    for program in made["programs"]:
        programs.add(*program_cells(program))
    write_table(programs)
    if made["maps"]:
        for each in made["maps"]:
            maps.add(*map_cells(each))
        click.echo()
        write_table(maps)
    ids = " ".join(program["id"] for program in made["programs"])
    click.echo()
    _say_until("loaded", ids, term)


@click.command()
@click.argument("program_id", type=id_of("prg"))
@click.argument("functions", type=FUNCTION, metavar="[FUNCTION]...", nargs=-1)
@click.option(
    "--exclude", metavar="GLOB", multiple=True, help="Leave out what matches; repeatable."
)
@click.option(
    "--address",
    "addresses",
    type=number,
    metavar="NUMBER",
    multiple=True,
    help="A function by the address where it starts; repeatable.",
)
@click.option(
    "--cookie",
    "cookies",
    type=number,
    metavar="NUMBER",
    multiple=True,
    help="What bpf_get_attach_cookie gives at each function, in their order; repeatable.",
)
@click.option(
    "--kind",
    type=click.Choice(["kprobe", "kretprobe", "session"]),
    help="At the function's entry, its return, or both.  [default: what the program is for]",
)
@click.option("--kretprobe", is_flag=True, help="The same as --kind kretprobe.")
@click.option("--dry-run", is_flag=True, help="Attach nothing; show what would be, and what not.")
@_lease_option
@click.pass_obj
def attach(
    settings: Settings,
    program_id: str,
    functions: tuple[str, ...],
    exclude: tuple[str, ...],
    addresses: tuple[int, ...],
    cookies: tuple[int, ...],
    kind: Literal["kprobe", "kretprobe", "session"] | None,
    kretprobe: bool,
    dry_run: bool,
    lease: str | None,
) -> None:
    """Attach a program to functions: to all of them or, where one cannot be, to none.

    FUNCTION is a name, or a glob with * and ? (quote it), with its module behind it where you want
    only that one's: 'nft_*[nf_tables]'.

    The link gets the lifetime "persistent", and stays until `kpmctl detach LINK_ID`; or it ends
    with a lease (see `kpmctl lease`). With the API's default lifetime it would end with kpmctl
    itself, at once.
    """
    if bool(functions) == bool(addresses):
        raise click.UsageError("give either FUNCTIONs or --address")
    if kretprobe and kind not in (None, "kretprobe"):
        raise click.UsageError(f"--kretprobe and --kind {kind} exclude each other")
    globs = bool(exclude) or any(is_glob(each) for each in functions)
    targets: dict[str, Any] = {
        "symbols": functions if functions and not globs else None,
        "patterns": functions if globs else None,
        "exclude": exclude,
        "addresses": addresses or None,
    }
    with settings.client() as client:
        term = None if lease is None else client.lease(lease)
        way = "kretprobe" if kretprobe else kind or _kind(client, program_id)
        if dry_run:
            _show_plan(settings, client.plan(program_id, way, **targets))
            return
        with shown(settings, "attach"):
            made = client.attach(
                program_id, way, cookies=cookies or None, lifetime=lease or "persistent", **targets
            )
    if settings.json:
        settings.write_json(made)
        return
    click.echo(clean(f"{made['id']}: attached to {made['count']} function(s) as {made['kind']}."))
    if made["skipped"]:
        click.echo(f"{made['skipped']} skipped: `kpmctl link {made['id']} --skipped` tells why.")
    _say_until("attached", made["id"], term)


def _say_until(what: str, ids: str, lease: answers.Lease | None) -> None:
    """When what was made will end: unless it is persistent, with the ``lease``."""
    if lease is None:
        click.echo(clean(f"Persistent: {what} until `kpmctl detach {ids}`."))
        return
    id_, until = lease["id"], lease["expires_at"]
    click.echo(clean(f"Leased: {what} until {until}, or longer with `kpmctl lease renew {id_}`."))


def _show_plan(settings: Settings, plan: answers.Plan) -> None:
    if settings.json:
        settings.write_json(plan)
        return
    table = Table([Column("FUNCTION"), Column("MODULE"), Column("OUTCOME")])
    for target in plan["targets"]:
        table.add(target["symbol"] or target["address"], target["module"], "attach")
    for skipped in plan["skipped"]:
        table.add(skipped["symbol"], skipped["module"], f"{skipped['reason']}: {skipped['detail']}")
    write_table(table)
    click.echo()
    click.echo(
        f"{plan['count']} function(s) would be attached to by {plan['mechanism']}, "
        f"{len(plan['skipped'])} not."
    )
    if plan["refusal"]:
        click.echo(clean(f"Without --dry-run this request fails: {plan['refusal']['detail']}"))


def _kind(client: Client, program_id: str) -> answers.Kind:
    made_for = client.program(program_id)["attach"]
    return "session" if made_for == "kprobe_session" else "kprobe"


@click.command()
@click.argument("ids", type=id_of("lnk", "prg"), metavar="ID...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Unload programs that have links; detach those first.")
@click.pass_context
def detach(ctx: click.Context, ids: tuple[str, ...], force: bool) -> None:
    """Detach links (lnk-…) and unload programs (prg-…).

    Goes on where one cannot be; the exit status is then that of the first failure.
    """

    def end(client: Client, id_: str) -> None:
        with shown(ctx.obj, "detach", [id_]):
            if id_.startswith("lnk-"):
                client.detach(id_)
            else:
                client.delete_program(id_, force)

    end_each(ctx, ids, end)
