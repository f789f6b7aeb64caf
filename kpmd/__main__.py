"""``kpmd``, also ``python -m kpmd``: arguments, then ``daemon.run``.

argparse, not click as for kpmctl: what a daemon imports it keeps in memory, and click is 5 MB.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

from kpmd import __version__

#: For ExecStartPre= in kpmd.service, and by itself: it runs at each start, and must be quick.
_HAND_OVER = "--hand-over-tracefs"


def _parser() -> argparse.ArgumentParser:
    from kpmd.config import DEFAULT_SOCKET, LOG_LEVELS

    parser = argparse.ArgumentParser(
        prog="kpmd",
        description="Attach BPF programs to kernel functions as a service, over a Unix socket. "
        "Needs root, or the capabilities that its systemd unit names. What an argument says wins "
        "over the configuration file.",
        epilog=f"kpmd.service runs `kpmd {_HAND_OVER}` as root before the daemon, which is not: it "
        "opens tracefs's files for it.",
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
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration file (TOML; default: /etc/kpmd/kpmd.toml if it is there)",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        metavar="FILE",
        help="who may do what (TOML; default: /etc/kpmd/policy.toml if it is there, else members "
        "of group kpmd, and of --group, may use builtins); read anew at SIGHUP",
    )
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="only tell whether configuration, policy and deny list are good",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only tell whether this machine can run kpmd, and what is missing; as root it sees "
        "all. Exit status: 0 everything is there, 1 kpmd can run and do less, 2 it cannot run, "
        "3 not all could be seen",
    )
    parser.add_argument("--json", action="store_true", help="with --check: as JSON")
    parser.add_argument("--log-level", choices=LOG_LEVELS, help="(default: info)")
    parser.add_argument("--version", action="version", version=f"kpmd, version {__version__}")
    return parser


def _hand_over() -> int:
    from kpmd.log import configure
    from kpmd.runtime.handover import hand_over
    from kpmd.runtime.notify import Notifier

    configure("info")
    return hand_over(Notifier.from_environment(os.environ))


def main() -> None:
    """Run the daemon as the command line says; exits with its status."""
    if sys.argv[1:] == [_HAND_OVER]:
        sys.exit(_hand_over())
    from kpmd.config import load

    parser = _parser()
    given = vars(parser.parse_args())
    check, as_json = given.pop("check_config"), given.pop("json")
    if given.pop("check"):
        from kpmd.check import run as check_machine

        sys.exit(check_machine(given.pop("config"), given, as_json))
    if as_json:
        parser.error("--json is for --check")
    try:
        config = load(given.pop("config"), **given)
        if check:
            from kpmd.policy_file import report

            print(report(config))
            sys.exit(0)
    except ValueError as error:
        sys.exit(f"kpmd: {error}")
    # What is made from now on until the daemon is ready stays as long as it does: see _keep.
    gc.disable()
    # Only now: --help and --version need none of it.
    from kpmd.daemon import run

    sys.exit(run(config))


if __name__ == "__main__":
    main()
