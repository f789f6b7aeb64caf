"""The command line: ``python -m tests.vm run|shell|fetch|list``."""

import argparse
import os
import re
import sys
from pathlib import Path

from tests.vm import debian, kernels, machine, sources, tree
from tests.vm.errors import VmError
from tests.vm.precompile import precompile
from tests.vm.signals import Stopped, stopping_signals

PROJECT = Path(__file__).resolve().parents[2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("run", "run a command on a kernel and exit with its status"),
        ("shell", "open a shell on a kernel"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--kernel", choices=kernels.KERNELS, default="6.12")
        command.add_argument("--user", action="store_true", help="run it as nobody")
        command.add_argument(
            "--systemd", action="store_true", help="in a Debian whose process 1 is systemd"
        )
        _add_debian(command)
        command.add_argument("--memory", type=_memory, default="1G", metavar="SIZE")
        if name == "run":
            command.add_argument("--timeout", type=float, default=1800, metavar="SECONDS")
            command.usage = "%(prog)s [options] -- COMMAND [ARGUMENT ...]"
    fetch = commands.add_parser("fetch", help="download kernels")
    fetch.add_argument("--kernel", choices=kernels.KERNELS, action="extend", nargs="+")
    fetch.add_argument("--systemd", action="store_true", help="make the Debian for --systemd")
    _add_debian(fetch)
    fetch.add_argument("--refresh", action="store_true", help="also what is in the cache")
    commands.add_parser("list", help="show the known kernels")
    return parser


def _add_debian(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--debian", choices=debian.SYSTEMS, default=debian.DEFAULT, help="which, for --systemd"
    )


def _memory(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[MG]", text):
        raise argparse.ArgumentTypeError("a number and M or G, such as 1G")
    return text


def _report(text: str) -> None:
    print("\n".join(f"vm: {line}" for line in text.splitlines()), file=sys.stderr, flush=True)


def _list(cache: Path) -> int:
    try:
        found = sources.mirror()
    except VmError as error:
        _report(str(error))
        found = None
    for kernel in kernels.KERNELS.values():
        have = kernels.cached(kernel, cache)
        state = f"cached: {have.release} in {have.folder}" if have else "not cached"
        print(f"{kernel.name}\t{state}")
        for suite in kernel.suites:
            print(f"\t{found.of(suite) if found else '(no mirror)'} {suite}")
    for name, system in debian.SYSTEMS.items():
        root = debian.cached(system, cache)
        print(f"systemd, Debian {name}\t{f'cached: {root}' if root else 'not cached'}")
    return 0


def _fetch(arguments: argparse.Namespace, cache: Path) -> int:
    # Where only one of the two is asked for, the other isn't meant.
    names = arguments.kernel or ([] if arguments.systemd else list(kernels.KERNELS))
    for name in names:
        got = kernels.fetch(kernels.KERNELS[name], cache, refresh=arguments.refresh)
        print(f"{name}\t{got.release}\t{got.folder}")
    if arguments.systemd:
        system = debian.SYSTEMS[arguments.debian]
        root = debian.make(system, cache, refresh=arguments.refresh)
        print(f"systemd\t{system.suites[0]}\t{root}")
    return 0


def _boot(arguments: argparse.Namespace, command: tuple[str, ...], cache: Path) -> int:
    shell = arguments.action == "shell"
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if shell and not terminal:
        raise VmError("a shell needs a terminal")
    kernel = kernels.fetch(kernels.KERNELS[arguments.kernel], cache)
    system = debian.make(debian.SYSTEMS[arguments.debian], cache) if arguments.systemd else None
    if system and arguments.debian == debian.DEFAULT:
        # In another Debian commands bring their Python along, or run that Debian's.
        tree.check_python(PROJECT, system)
    precompile(PROJECT, cache)
    if shell:
        _report(f"Linux {kernel.release}; Ctrl-A x ends the machine at once")
    job = machine.Job(
        kernel=kernel,
        project=PROJECT,
        command=("/bin/bash", "-i") if shell else command,
        memory=arguments.memory,
        timeout=None if shell else arguments.timeout,
        as_user=arguments.user,
        terminal=terminal,
        shell=shell,
        system=system,
    )
    return machine.run(job, _report)


def split_command(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return this tool's own words and the command: all that follows the first "--"."""
    if "--" not in words:
        return words, ()
    at = words.index("--")
    return words[:at], tuple(words[at + 1 :])


def main() -> int:
    """Do what the command line says; return the exit status."""
    own, command = split_command(sys.argv[1:])
    parser = _parser()
    arguments = parser.parse_args(own)
    if (arguments.action == "run") is not bool(command):
        parser.error("run takes -- and a command, nothing else does")
    cache = kernels.cache_folder()
    try:
        with stopping_signals():
            if arguments.action == "list":
                return _list(cache)
            if arguments.action == "fetch":
                return _fetch(arguments, cache)
            return _boot(arguments, command, cache)
    except Stopped as stopped:
        return 128 + stopped.number
    except VmError as error:
        _report(str(error))
        return machine.NO_STATUS
    except BrokenPipeError:
        # Whoever read the output is gone; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
