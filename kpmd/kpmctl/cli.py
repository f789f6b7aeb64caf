"""``kpmctl``. Each command's module is imported when it is asked for."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import click

from kpmd import __version__
from kpmd.client import DEFAULT_SOCKET

#: Commands as the help lists them, and the modules where they are made.
_SECTIONS = {
    "Questions, answered at once": {
        "count": "count",
        "latency": "latency",
        "trace": "trace",
        "stacks": "stacks",
        "top": "top",
        "dashboard": "dashboard",
    },
    "Programs and links": {
        "load": "change",
        "attach": "change",
        "detach": "change",
        "programs": "show",
        "links": "show",
        "link": "show",
    },
    "Maps": {
        "maps": "maps",
        "entries": "maps",
        "entry": "maps",
        "globals": "maps",
        "records": "maps",
    },
    "Lifetimes": {
        "lease": "leases",
        "leases": "leases",
        "clients": "clients",
        "release": "clients",
        "events": "events",
    },
    "What can be done": {
        "capabilities": "show",
        "symbols": "show",
        "policy": "policy",
        "metrics": "metrics",
        "completion": "completion",
        "support-bundle": "support",
    },
}

_COMMANDS = {name: module for each in _SECTIONS.values() for name, module in each.items()}

#: 128 + SIGINT, as shells have it.
_INTERRUPTED = 130

_EPILOG = """\b
Exit status:
  0    done
  1    any other failure, the kernel's own refusals among them
  2    wrong usage of kpmctl
  3    the daemon cannot be reached, went away, or is stopping
  4    not allowed, by the socket's permissions or by the policy (also `policy explain`)
  5    no such program, link, map, entry, lease, client or user
  6    the kernel or the daemon does not support it
  7    the input is not valid: names, addresses, an object, a program
  8    in use, gone, over a quota, or too large
  130  interrupted by Ctrl-C (what goes on until Ctrl-C, as `count` does, ends with 0 then)
"""


class _Commands(click.Group):
    """Imports a command when it is asked for, and turns errors into messages and statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"kpmd.kpmctl.commands.{_COMMANDS[cmd_name]}")
        # `globals` is a name of Python's own.
        name = cmd_name.replace("-", "_")
        command = getattr(module, name, None) or getattr(module, f"{name}_", None)
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's own, in sections."""
        widest = max(map(len, _COMMANDS))
        for title, names in _SECTIONS.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                if command is not None:
                    limit = formatter.width - widest - 6
                    rows.append((f"{name:<{widest}}", command.get_short_help_str(limit)))
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _never_fail_to_encode()
            answer = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has seen enough, and so have we.
            _forget_stdout()
            ctx.exit(0)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from kpmd.kpmctl import failures

            status = failures.report(error)
            if status is None:
                raise
            ctx.exit(status)
        return answer


def _never_fail_to_encode() -> None:
    """What the terminal's encoding lacks is shown as ``?``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere, or the interpreter would complain at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@click.command(
    cls=_Commands,
    name="kpmctl",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--socket",
    envvar="KPMD_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    show_envvar=True,
    metavar="ADDRESS",
    help="Where the daemon listens: a path, or ssh://[USER@]HOST[:PORT][/PATH] for that of another "
    "machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON, as the daemon answers it.")
@click.version_option(__version__, prog_name="kpmctl")
@click.pass_context
def main(ctx: click.Context, socket: str, as_json: bool) -> None:
    """Attach BPF programs to kernel functions, and see what they count, through the daemon kpmd."""
    from kpmd.kpmctl.output import Settings

    ctx.obj = Settings(socket, as_json)
