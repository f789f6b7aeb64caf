"""``kpmd``, also ``python -m kpmd``: arguments, then ``daemon.run``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kpmd import __version__
from kpmd.config import DEFAULT_SOCKET, LOG_LEVELS, ConfigError, load


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    help=f"Listen here, unless systemd passes a socket.  [default: {DEFAULT_SOCKET}]",
)
@click.option("--group", help="The group that the socket is for.  [default: the daemon's own]")
@click.option("--mode", help="Permissions of the socket, in octal.  [default: 0660]")
@click.option("--config", type=click.Path(path_type=Path), help="A configuration file (TOML).")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="[default: info]")
@click.version_option(__version__, prog_name="kpmd")
def main(
    socket: Path | None,
    group: str | None,
    mode: str | None,
    config: Path | None,
    log_level: str | None,
) -> None:
    """Attach BPF programs to kernel functions as a service, over a Unix socket.

    Needs root, or CAP_BPF, CAP_PERFMON and CAP_SYSLOG. What an argument says wins over the
    configuration file.
    """
    try:
        loaded = load(config, socket=socket, group=group, mode=mode, log_level=log_level)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    # Only now: --help and --version need none of it.
    from kpmd.daemon import run

    sys.exit(run(loaded))


if __name__ == "__main__":
    main(prog_name="kpmd")
