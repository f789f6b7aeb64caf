"""Commands that change something: load, attach, detach."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Literal

import click

from kpmd.client.commands.show import map_cells, map_table, program_cells, program_table
from kpmd.client.output import Settings, clean, write_table
from kpmd.client.parameters import number, size, variable

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.client.client import Client


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
@click.pass_obj
def load(
    settings: Settings,
    file: BinaryIO | None,
    builtin: str | None,
    names: tuple[str, ...],
    attach: Literal["kprobe_multi", "kprobe_session"] | None,
    variables: tuple[tuple[str, int | bytes], ...],
    sizes: tuple[tuple[str, int], ...],
) -> None:
    """Load the BPF programs of the ELF object FILE (- for standard input).

    They get the lifetime "persistent", and stay until `kpmctl detach PROGRAM_ID`: with the default
    lifetime they would end with kpmctl itself, at once.
    """
    if (file is None) == (builtin is None):
        raise click.UsageError("give either FILE or --builtin NAME")
    if builtin is not None and names:
        raise click.UsageError("--program chooses from FILE; a builtin is loaded whole")
    with settings.client() as client:
        if file is not None:
            made = client.load_object(
                file.read(),
                programs=names or None,
                attach=attach,
                globals=dict(variables),
                max_entries=dict(sizes),
                lifetime="persistent",
            )
        else:
            made = client.load_builtin(
                builtin or "",
                attach=attach,
                globals=dict(variables),
                max_entries=dict(sizes),
                lifetime="persistent",
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
    click.echo(clean(f"Persistent: loaded until `kpmctl detach {ids}`."))


@click.command()
@click.argument("program_id")
@click.argument("symbols", metavar="[SYMBOL]...", nargs=-1)
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
@click.pass_obj
def attach(
    settings: Settings,
    program_id: str,
    symbols: tuple[str, ...],
    addresses: tuple[int, ...],
    cookies: tuple[int, ...],
    kind: Literal["kprobe", "kretprobe", "session"] | None,
    kretprobe: bool,
) -> None:
    """Attach a program to functions: to all of them or, where one cannot be, to none.

    The link gets the lifetime "persistent", and stays until `kpmctl detach LINK_ID`: with the
    default lifetime it would end with kpmctl itself, at once.
    """
    if bool(symbols) == bool(addresses):
        raise click.UsageError("give either SYMBOLs or --address")
    if kretprobe and kind not in (None, "kretprobe"):
        raise click.UsageError(f"--kretprobe and --kind {kind} exclude each other")
    with settings.client() as client:
        made = client.attach(
            program_id,
            "kretprobe" if kretprobe else kind or _kind(client, program_id),
            symbols=symbols or None,
            addresses=addresses or None,
            cookies=cookies or None,
            lifetime="persistent",
        )
    if settings.json:
        settings.write_json(made)
        return
    click.echo(clean(f"{made['id']}: attached to {made['count']} function(s) as {made['kind']}."))
    click.echo(clean(f"Persistent: attached until `kpmctl detach {made['id']}`."))


def _kind(client: Client, program_id: str) -> answers.Kind:
    made_for = client.program(program_id)["attach"]
    return "session" if made_for == "kprobe_session" else "kprobe"


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Unload programs that have links; detach those first.")
@click.pass_context
def detach(ctx: click.Context, ids: tuple[str, ...], force: bool) -> None:
    """Detach links (lnk-…) and unload programs (prg-…).

    Goes on where one cannot be; the exit status is then that of the first failure.
    """
    from kpmd.client import failures
    from kpmd.client.errors import ApiError

    for each in ids:
        if not each.startswith(("lnk-", "prg-")):
            raise click.UsageError(f"{each!r} is the id of neither a link nor a program")
    settings: Settings = ctx.obj
    status, done = 0, []
    with settings.client() as client:
        for each in ids:
            try:
                if each.startswith("lnk-"):
                    client.detach(each)
                else:
                    client.delete_program(each, force)
            except ApiError as error:
                status = status or failures.report(error) or failures.OTHER
            else:
                done.append(each)
    if settings.json:
        settings.write_json({"deleted": done})
    ctx.exit(status)
