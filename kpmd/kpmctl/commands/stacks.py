"""``kpmctl stacks``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kpmd.kpmctl import filters
from kpmd.kpmctl.filters import Wanted
from kpmd.kpmctl.live import wait
from kpmd.kpmctl.output import Settings, clean, on_terminal
from kpmd.kpmctl.stopping import Stop

if TYPE_CHECKING:
    from kpmd.kpmctl.stack_counts import Frame, StackReport

#: Stacks that are shown, unless --top says how many.
_TOP = 10


@click.command()
@filters.options
@click.option("--by-process", is_flag=True, help="Tell the calls of each process apart.")
@click.option("--kretprobe", is_flag=True, help="Look at returns instead of calls.")
@click.option(
    "--top",
    type=click.IntRange(1),
    default=_TOP,
    show_default=True,
    metavar="N",
    help="Show the N stacks of most calls.",
)
@click.option(
    "--folded",
    type=filters.output_path,
    metavar="FILE",
    help="Write the stacks instead, a line each, as flame graph tools take them; - is stdout.",
)
@click.option(
    "--flame",
    type=filters.output_path,
    metavar="FILE.svg",
    help="Draw a flame graph instead, for any browser; - is stdout.",
)
@click.pass_context
def stacks(
    ctx: click.Context,
    wanted: Wanted,
    duration: float | None,
    by_process: bool,
    kretprobe: bool,
    top: int,
    folded: str | None,
    flame: str | None,
) -> None:
    """Count who calls functions, by the kernel's stack.

    FUNCTION is a name or a glob, as for `kpmctl count`. Ctrl-C, SIGTERM or the end of --duration
    detaches and shows what there was: the stacks of most calls first, each with the function at its
    top, its callers below it, and at its end how many calls came this way.

    Who may not see symbols gets addresses. Stacks deeper than 64 functions are cut at their outer
    end. Calls whose stack was not kept are counted all the same, and told of on standard error.
    """
    from kpmd.kpmctl.stack_counts import Stacks
    from kpmd.kpmctl.tracing import announce, begin, explained, warn

    settings: Settings = ctx.obj
    with contextlib.ExitStack() as last:
        stop = last.enter_context(Stop())
        client = last.enter_context(settings.client())
        counted = Stacks(client)
        last.callback(counted.close)

        def start() -> None:
            counted.start(wanted, "kretprobe" if kretprobe else "kprobe", by_process)

        begin(settings, stop, start)
        announce(settings, counted.tracing, duration is not None)
        with explained():
            wait(stop, duration)
            counted.end()
            report = counted.report()
        _write(settings, report, wanted, top, folded, flame)
        warn(report.missed, report.lost)


def _write(
    settings: Settings,
    report: StackReport,
    wanted: Wanted,
    top: int,
    folded: str | None,
    flame: str | None,
) -> None:
    """Into the files that were asked for, or else on stdout."""
    from kpmd.kpmctl import stack_counts

    if folded is not None:
        lines = stack_counts.folded(report.stacks)
        _write_file(folded, "".join(f"{line}\n" for line in lines).encode())
    if flame is not None:
        from kpmd.kpmctl.flame import draw

        title = f"Who calls {', '.join(wanted.functions)}: {_calls(report.calls)}"
        paths = [(stack_counts.path(each), each.calls) for each in report.stacks]
        _write_file(flame, draw(title, paths))
    if folded is None and flame is None:
        if settings.json:
            settings.write_json(_json(report))
        else:
            _show(report, top)
    elif "-" not in (folded, flame):
        said = f"{_calls(report.calls)} in {len(report.stacks)} stacks"
        click.echo(f"{said}: {', '.join(each for each in (folded, flame) if each)}", err=True)


def _write_file(name: str, content: bytes) -> None:
    if name == "-":
        sys.stdout.buffer.write(content)
        return
    try:
        Path(name).write_bytes(content)
    except OSError as error:
        raise click.FileError(name, error.strerror) from error


def _calls(number: int) -> str:
    return "1 call" if number == 1 else f"{number} calls"


def _show(report: StackReport, top: int) -> None:
    """Stacks as text: the function, what called it, and how often."""
    from kpmd.kpmctl.stack_counts import merged

    bold = on_terminal()
    stacks = merged(report.stacks)
    for each in stacks[:top]:
        for at, name in enumerate(map(clean, each.names)):
            indent = "    " if at else "  "
            click.echo(indent + (click.style(name, bold=True) if bold and not at else name))
        who = f" by {clean(each.caller)}" if each.caller else ""
        click.echo(f"{_calls(each.calls)}{who}, {each.calls / report.calls:.1%}\n")
    left = stacks[top:]
    if left:
        calls = _calls(sum(each.calls for each in left))
        click.echo(f"… and {len(left)} more stacks with {calls}")
    if not stacks:
        click.echo("no calls")


def _json(report: StackReport) -> dict[str, object]:
    return {
        "attached": report.attached,
        "attach_seconds": round(report.attach_seconds, 6),
        "elapsed_seconds": round(report.elapsed, 6),
        "missed": report.missed,
        "lost": dict(report.lost),
        "stacks": [
            {
                "calls": str(each.calls),
                "pid": each.process[0] if each.process else None,
                "command": each.process[1] if each.process else None,
                "function": _json_frame(each.function),
                "frames": each.frames and [_json_frame(frame) for frame in each.frames],
            }
            for each in report.stacks
        ],
    }


def _json_frame(frame: Frame) -> dict[str, object]:
    return {
        "address": f"0x{frame.address:016x}",
        "symbol": frame.symbol,
        "offset": frame.offset,
        "module": frame.module,
    }
