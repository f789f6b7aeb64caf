"""Commands about the policy: policy show, policy explain."""

from __future__ import annotations

import grp
import hashlib
import textwrap
from typing import TYPE_CHECKING, BinaryIO, get_args

import click

from kpmd.client import answers
from kpmd.client.errors import ApiError
from kpmd.kpmctl import failures
from kpmd.kpmctl.commands.show import limit_cell, owner_cell
from kpmd.kpmctl.output import Column, Settings, Table, clean, write_table

if TYPE_CHECKING:
    from kpmd.client.client import Client

#: Columns of a line, and of what stands before its text.
_WIDTH, _INDENT = 100, 12

#: What an answer is by, where it is by no rule.
_BY = {"administrators": "as an administrator", "no rule": "since no rule fits"}

#: Functions that are shown where many are refused.
_SHOWN = 20

_EPILOG = """\b
Before a user tries it:
  kpmctl policy explain ada --builtin count 'tcp_*'
  kpmctl policy explain ada --object mine.bpf.o vfs_read
"""


@click.group(epilog=_EPILOG)
def policy() -> None:
    """Show what the policy lets users do, and why not.

    Of others than yourself only administrators may ask.
    """


@policy.command()
@click.argument("user", required=False)
@click.pass_obj
def show(settings: Settings, user: str | None) -> None:
    """Show what USER may do, how much, and how much is used.

    USER is a name or a uid; you by default.
    """
    with settings.client() as client:
        found = client.policy(user)
        warnings = client.health()["warnings"]
    if settings.json:
        settings.write_json(found)
        return
    for warning in warnings:
        click.echo(clean(f"kpmctl: warning: {warning}"), err=True)
    who, groups = found["user"], [_group_name(each) for each in found["groups"]]
    _field("user", f"{owner_cell(who)} (uid {who['uid']}), in groups {', '.join(groups) or '-'}")
    _show_rule(found["policy"])
    click.echo()
    table = Table([Column("LIMIT"), Column("USED", right=True), Column("MOST", right=True)])
    for name, most in found["limits"].items():
        table.add(name, found["usage"].get(name), limit_cell(most))
    write_table(table)


def _show_rule(policy: answers.Policy) -> None:
    """What a rule says, in words."""
    if policy["administrator"]:
        _field("rule", "none is needed: an administrator may do everything")
        return
    if policy["rule"] is None:
        _field("rule", "none is about this user, who may do nothing but look at what is theirs")
        return
    _field("rule", policy["rule"])
    _field("calls", ", ".join(policy["calls"]) or "none but to look at what is theirs, and end it")
    functions, programs = policy["functions"], policy["programs"]
    _field("functions", ", ".join(functions["allow"]) or "none")
    denied = list(functions["deny"])
    if not functions["risky"]:
        denied.append("what is on the daemon's deny list")
    if denied:
        _field("", f"but not {', '.join(denied)}")
    _field("programs", "; ".join(_programs(programs)) or "none")
    if programs["any"] or programs["sha256"] or programs["keys"]:
        _show_instructions(policy)
    if policy["read_others"]:
        _field("others", "may see what is other users', and touch none of it")


def _programs(programs: answers.ProgramsAllowed) -> list[str]:
    if programs["any"]:
        return ["any"]
    words = ["builtins"] if programs["builtin"] else []
    if programs["keys"]:
        words.append(f"objects signed with {' or '.join(programs['keys'])}")
    if programs["sha256"]:
        words.append(f"objects of the SHA-256 {', '.join(programs['sha256'])}")
    return words


def _show_instructions(policy: answers.Policy) -> None:
    """What the instructions of programs may do that are no builtins."""
    memory = [
        what
        for allowed, what in (
            (policy["probe_read_kernel"], "the kernel's memory"),
            (policy["probe_read_user"], "the memory of the process that calls the function"),
        )
        if allowed
    ]
    _field("reads", ", ".join(memory) or "no memory by probe_read")
    _field("helpers", _names(policy["helpers"]))
    _field("kfuncs", _names(policy["kfuncs"]))
    _field("map types", _names(policy["map_types"]))


def _names(names: list[str] | None) -> str:
    return "all" if names is None else ", ".join(names) or "none"


def _field(name: str, text: str) -> None:
    """A name and, in as many lines as it takes, what there is to say of it."""
    lines = textwrap.wrap(
        clean(text),
        _WIDTH,
        initial_indent=name.ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    click.echo("\n".join(lines))


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@policy.command()
@click.argument("user")
@click.argument("functions", metavar="[FUNCTION]...", nargs=-1)
@click.option("--call", type=click.Choice(get_args(answers.Right)), help="Make this call.")
@click.option("--builtin", metavar="NAME", help="Load this program that ships with kpmd.")
@click.option(
    "--object",
    "file",
    type=click.File("rb"),
    metavar="FILE",
    help="Load this ELF object; only its SHA-256 is sent.",
)
@click.option(
    "--signature",
    type=click.File("rb"),
    metavar="FILE",
    help="The object's signature; it is checked only where the object is loaded.",
)
@click.pass_context
def explain(
    ctx: click.Context,
    user: str,
    functions: tuple[str, ...],
    call: answers.Right | None,
    builtin: str | None,
    file: BinaryIO | None,
    signature: BinaryIO | None,
) -> None:
    """Tell whether USER may do all of this, and if not, why.

    USER is a name or a uid; - is you. FUNCTION is what to attach to: a name, or a glob with * and ?
    (quote it), with its module behind it where you want only that one's: 'nft_*[nf_tables]'.

    The exit status is 0 where they may and 4 where they may not; 7 where there is no such function.
    What the instructions of an object do is judged only when it is loaded.
    """
    if builtin is not None and file is not None:
        raise click.UsageError("give either --object or --builtin")
    if signature is not None and file is None:
        raise click.UsageError("--signature is that of --object FILE")
    settings: Settings = ctx.obj
    source: answers.Source | None = "object" if file else "builtin" if builtin else None
    with settings.client() as client:
        if builtin is not None:
            _check_builtin(client, builtin)
        found = client.explain(
            None if user == "-" else user,
            call,
            functions,
            source,
            None if file is None else hashlib.sha256(file.read()).hexdigest(),
        )
    missing = found["unmatched"]
    if settings.json:
        settings.write_json(found)
    else:
        _show_explanation(found, asked=bool(functions or call or source))
        if functions:
            _show_functions(found)
        for each in missing:
            click.echo(clean(f"No function that can be traced matches {each}."))
        if signature is not None:
            click.echo("The signature was not checked: that is done only when it is loaded.")
    if not found["allowed"]:
        ctx.exit(failures.FORBIDDEN)
    ctx.exit(failures.INVALID if missing else 0)


def _check_builtin(client: Client, name: str) -> None:
    if name not in (known := client.capabilities()["builtins"]):
        detail = f"there is no builtin {name!r}; there are {', '.join(known)}"
        raise ApiError("invalid", 422, detail, {})


def _show_explanation(found: answers.Explanation, *, asked: bool) -> None:
    """The answer, with what stands against it. Where nothing was ``asked`` for it is the rule."""
    user, by = owner_cell(found["user"]), _BY.get(found["rule"], f"by rule {found['rule']}")
    if not found["allowed"]:
        click.echo(clean(f"{user}: no, {by}"))
        for reason in found["reasons"]:
            click.echo(clean(f"  {reason}"))
    elif asked:
        click.echo(clean(f"{user}: yes, {by}"))
    else:
        name = found["user"]["user"] or found["user"]["uid"]
        click.echo(clean(f"{user}: judged {by}; `kpmctl policy show {name}` tells the rest"))


def _show_functions(found: answers.Explanation) -> None:
    """How many functions are allowed, and the first of those that are not."""
    if found["refused"]:
        click.echo()
        table = Table([Column("FUNCTION"), Column("MODULE"), Column("REASON")])
        for each in found["refused"][:_SHOWN]:
            table.add(each["symbol"], each["module"], each["detail"])
        write_table(table)
        if found["refused_total"] > len(table.rows):
            click.echo(f"… and {found['refused_total'] - len(table.rows)} more")
        click.echo()
    click.echo(
        f"{found['functions']} function(s) may be attached to, {found['refused_total']} not."
    )
    if found["allowed"] and found["refused_total"]:
        click.echo("A link by globs leaves out those that may not.")
