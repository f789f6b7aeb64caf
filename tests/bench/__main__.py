"""The command line: ``python -m tests.bench prepare|vm|data|here|…``; see README.md."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench import (
    attach,
    closing,
    detach,
    dump,
    hostile,
    idle,
    index,
    latency,
    peers,
    records,
    ring,
    soak,
)
from tests.bench.prepare import BUILD, FUNCTIONS, KALLSYMS, prepare
from tests.bench.report import Row, print_table, say
from tests.bench.running import Kpmd

_PARTS: dict[str, Callable[[attach.Bench, bool], list[Row]]] = {
    "names": attach.by_names,
    "glob": attach.by_glob,
    "single": attach.one_by_one,
    "latency": latency.measure,
    "detach": detach.measure,
    "closing": closing.measure,
}

_DATA: dict[str, Callable[[records.Bench, bool], list[Row]]] = {
    "records": records.rates,
    "latency": records.latency,
    "dump": dump.measure,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    making = commands.add_parser("prepare", help="fetch libbpf, build the yardsticks")
    making.add_argument("--kernel", default="6.12", help="whose lists of functions to save")
    making.add_argument("--refresh", action="store_true", help="make all of it anew")
    making.add_argument("--peers", action="store_true", help="install what `peers` asks, too")
    asking = commands.add_parser("peers", help="bpftrace and bcc; as root, in the VM")
    asking.add_argument("--runs", type=int, default=3)
    asking.add_argument("--only", choices=peers.TOOLS, action="append")
    long = commands.add_parser("soak", help="clients that come and die; as root, in the VM")
    long.add_argument("--clients", type=int, default=1000)
    long.add_argument("--seconds", type=float, default=600, help="in which they come, and are gone")
    long.add_argument("--seed", type=int, default=1)
    other = commands.add_parser("hostile", help="two users, one hostile; as root, in the VM")
    other.add_argument("--rounds", type=int, default=100)
    other.add_argument("--only", action="append", metavar="ATTACK")
    for name, text, parts in (
        ("vm", "attaching; as root, in the VM", [*_PARTS, "index"]),
        ("data", "records and maps; as root, in the VM", [*_DATA]),
        ("here", "the rest; anywhere", []),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--quick", action="store_true", help="few rounds: a rough idea")
        if parts:
            command.add_argument("--only", choices=parts, action="append")
    return parser


def _title(**more: str) -> dict[str, str]:
    return {
        "kernel": os.uname().release,
        "processors": str(os.cpu_count()),
        "Python": platform.python_version(),
        **more,
    }


def _vm(quick: bool, only: list[str] | None) -> bool:
    wanted = only or [*_PARTS, "index"]
    rows: list[Row] = []
    title = _title()
    with tempfile.TemporaryDirectory(prefix="kpmd-bench-") as name:
        if "index" in wanted:
            rounds = 2 if quick else 5
            files = Path("/proc/kallsyms"), Path(attach.TRACEABLE)
            rows += index.measure(*files, rounds, here=False)
        parts = [part for part in _PARTS if part in wanted]
        if parts:
            with attach.bench(Path(name)) as bench:
                title["libbpf"] = bench.glob.libbpf
                title["functions"] = f"{len(bench.functions.names):,} names"
                for part in parts:
                    rows += _PARTS[part](bench, quick)
                if not quick:
                    rows += [idle.row("the daemon with its index, after all this", bench.kpmd)]
    return print_table(title, rows)


def _data(quick: bool, only: list[str] | None) -> bool:
    rows: list[Row] = []
    title = _title()
    with tempfile.TemporaryDirectory(prefix="kpmd-bench-") as name:
        kpmd = Kpmd(Path(name))
        try:
            kpmd.warm()
            with records.bench(kpmd) as bench:
                title["libbpf"] = bench.libbpf.libbpf
                for part, measure in _DATA.items():
                    if not only or part in only:
                        rows += measure(bench, quick)
        finally:
            kpmd.close()
    return print_table(title, rows)


def _here(quick: bool) -> bool:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kpmd-bench-") as name:
        kpmd = Kpmd(Path(name))
        try:
            rows += idle.memory(kpmd)
            rows += idle.rates(kpmd, Path(name), quick)
        finally:
            kpmd.close()
    rows += index.measure(KALLSYMS, FUNCTIONS, 3 if quick else 9, here=True)
    rows += ring.measure(quick)
    return print_table(_title(), rows)


def _soak(plan: soak.Plan) -> bool:
    names = [name for name in attach.read_functions().names if name.startswith(soak.PREFIXES)]
    with tempfile.TemporaryDirectory(prefix="kpmd-bench-") as name:
        Path(name).chmod(0o755)
        kpmd = Kpmd(Path(name))
        try:
            kpmd.warm()
            rows = soak.measure(kpmd, names, plan)
        finally:
            kpmd.close()
    return print_table(_title(), rows)


def _hostile(rounds: int, only: list[str] | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="kpmd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        policy = folder / "policy.toml"
        users = f"[{hostile.HOSTILE}, {hostile.VICTIM}]"
        policy.write_text(f'[[rules]]\nname = "builtins"\nusers = {users}\n')
        kpmd = Kpmd(folder, "--mode", "0666", "--policy", str(policy))
        try:
            kpmd.warm()
            rows = hostile.measure(kpmd.socket, rounds, only)
        finally:
            kpmd.close()
    return print_table(_title(), rows)


def main() -> int:
    """Do what the command line says; 1 where a target is missed."""
    arguments = _parser().parse_args()
    if arguments.action == "prepare":
        prepare(arguments.kernel, arguments.refresh)
        if arguments.peers:
            peers.prepare(arguments.kernel)
        return 0
    if arguments.action == "peers":
        peers.measure(arguments.runs, arguments.only)
        return 0
    if arguments.action == "hostile":
        return 0 if _hostile(arguments.rounds, arguments.only) else 1
    if arguments.action == "soak":
        return 0 if _soak(soak.Plan(arguments.clients, arguments.seconds, arguments.seed)) else 1
    if not (BUILD / "zero.bpf.o").exists() or not KALLSYMS.exists():
        say("first run (outside the VM): python -m tests.bench prepare")
        return 2
    if arguments.action == "vm":
        return 0 if _vm(arguments.quick, arguments.only) else 1
    if arguments.action == "data":
        return 0 if _data(arguments.quick, arguments.only) else 1
    return 0 if _here(arguments.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
