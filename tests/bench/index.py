"""The symbol index: how long it takes to build, how much memory it keeps, how quick a glob is."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tests.bench.report import NOT_YET, Row, ms, say
from tests.bench.running import Rounds, run_python

_MOST_MB = 16.0
_MOST_GLOB = 0.020
_PATTERNS = ("*", "*_read*", "tcp_*", "*a*e*i*")


def measure(kallsyms: Path, functions: Path, rounds: int, *, here: bool) -> list[Row]:
    """Build it alternately with the C program that reads and splits the same files.

    ``here``: on saved copies, outside the VM. The target for globs is for there, that for building
    is for the kernel's own files, which take the kernel itself a while to write.
    """
    say(f"the symbol index, {rounds} rounds")
    reader = Rounds("read_symbols", kallsyms, functions, libbpf=False)
    c: list[float] = []
    kpmd: list[dict[str, Any]] = []
    patterns = _PATTERNS if here else ()
    try:
        for _ in range(rounds):
            c.append(reader.run("")["ns"] / 1e9)
            kpmd.append(
                run_python("tests.bench.index_run", kallsyms, functions, 9, *patterns),
            )
    finally:
        reader.close()
    built = statistics.median(each["build"] for each in kpmd)
    yardstick = statistics.median(c)
    grown = statistics.median(each["grown_kb"] for each in kpmd) / 1024
    ratio = built / yardstick
    where = "saved copies" if here else "the kernel's own files"
    rows = [
        Row(
            f"index of {kpmd[0]['functions']:,} functions: build, {where}",
            ms(built),
            f"{ms(yardstick)} (C: read and split)",
            f"{ratio:.2f}",
            "" if here else "at most 2",
            None if here else ratio <= 2,
        ),
        Row(
            "index: resident memory",
            f"{grown:.1f} MB",
            "",
            "",
            f"at most {_MOST_MB:g} MB",
            grown <= _MOST_MB,
        ),
    ]
    for pattern in patterns:
        matched = kpmd[0]["globs"][pattern]["matched"]
        seconds = statistics.median(each["globs"][pattern]["seconds"] for each in kpmd)
        what = f"index: glob `{pattern}` over all names"
        target = f"at most {ms(_MOST_GLOB)}"
        if matched is None:
            rows.append(Row(what, NOT_YET, "", "", target))
        else:
            shown = f"{ms(seconds)} ({matched:,} functions)"
            rows.append(Row(what, shown, "", "", target, seconds <= _MOST_GLOB))
    return rows
