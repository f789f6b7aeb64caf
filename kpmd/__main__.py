"""``kpmd``, also ``python -m kpmd``: arguments, then ``daemon.run``.

argparse, not click as for kpmctl: what a daemon imports it keeps in memory, and click is 5 MB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kpmd import __version__
from kpmd.config import DEFAULT_SOCKET, LOG_LEVELS, ConfigError, load


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kpmd",
        description="Attach BPF programs to kernel functions as a service, over a Unix socket. "
        "Needs root, or the capabilities that its systemd unit names. What an argument says wins "
        "over the configuration file.",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help=f"listen here, unless systemd passes a socket (default: {DEFAULT_SOCKET})",
    )
    parser.add_argument(
        "--group", metavar="NAME", help="the group that may connect (default: the daemon's own)"
    )
    parser.add_argument("--mode", metavar="OCTAL", help="permissions of the socket (default: 0660)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file (TOML)")
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="(default: info)")
    parser.add_argument("--version", action="version", version=f"kpmd, version {__version__}")
    return parser


def main() -> None:
    """Run the daemon as the command line says; exits with its status."""
    given = vars(_parser().parse_args())
    try:
        config = load(given.pop("config"), **given)
    except ConfigError as error:
        sys.exit(f"kpmd: {error}")
    # Only now: --help and --version need none of it.
    from kpmd.daemon import run

    sys.exit(run(config))


if __name__ == "__main__":
    main()
