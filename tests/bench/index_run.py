"""Builds the symbol index in this fresh process and prints what it cost, as JSON.

``python -m tests.bench.index_run KALLSYMS FUNCTIONS ROUNDS PATTERN...``. All that knows the index's
interface stands in ``build`` and ``count_matching``.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from kpmd.bpf.kallsyms import release_memory
from kpmd.core.symbols import SymbolIndex


def build(kallsyms: str, functions: str) -> SymbolIndex:
    """Read the two files and build the index, as the daemon does."""
    index = SymbolIndex.build(Path(kallsyms).read_bytes(), Path(functions).read_bytes(), True)
    release_memory()
    return index


def count_matching(index: Any, pattern: str) -> int | None:
    """How many functions a glob matches; None where the index has no globs."""
    try:
        from kpmd.core.globs import Glob
    except ImportError:
        return None
    return len(index.glob(Glob.parse(pattern)))


def resident_kb(pid: int | str = "self") -> dict[str, int]:
    """Rss and Pss of a process, in kB."""
    found = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss"):
                found[name.lower()] = int(rest.split()[0])
    return found


def main() -> None:
    kallsyms, functions, rounds, *patterns = sys.argv[1:]
    gc.collect()
    before = resident_kb()["rss"]
    begun = time.perf_counter()
    index = build(kallsyms, functions)
    seconds = time.perf_counter() - begun
    gc.collect()
    grown = resident_kb()["rss"] - before
    globs: dict[str, Any] = {}
    for pattern in patterns:
        times, matched = [], None
        for _ in range(int(rounds)):
            begun = time.perf_counter()
            matched = count_matching(index, pattern)
            times.append(time.perf_counter() - begun)
        globs[pattern] = {"matched": matched, "seconds": statistics.median(times)}
    print(
        json.dumps({"functions": len(index), "build": seconds, "grown_kb": grown, "globs": globs})
    )


if __name__ == "__main__":
    main()
