"""Runs make's targets as the stages of CI, and tells what each took.

``python3 tests/tools/stages.py ONE… -- SIDE BY SIDE… -- ONE…``: groups in turn, of which the first
and every other one run one after the other, and those between two at a time. All run, whatever
fails: a run on a new machine is dear, and shall tell of every failure. Needs no package, since a
stage makes the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

AT_ONCE = 2


@dataclass(frozen=True)
class Result:
    """How a stage went; times in seconds, ``cpu`` with that of all processes it waited for."""

    name: str
    status: int
    seconds: float
    cpu: float

    def row(self) -> str:
        """One line of the table."""
        outcome = "ok" if self.status == 0 else f"FAILED ({self.status})"
        return f"{self.name:<24} {_clock(self.seconds):>8} {_clock(self.cpu):>8}  {outcome}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run(name: str, output: IO[bytes] | None = None) -> Result:
    """Make the target ``name``; its output goes into ``output``, else to ours as it comes."""
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    begun = time.monotonic()
    make = subprocess.Popen(
        [os.environ.get("MAKE", "make"), "--no-print-directory", name],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
    )
    _, status, usage = os.wait4(make.pid, 0)
    make.returncode = os.waitstatus_to_exitcode(status)
    return Result(name, make.returncode, time.monotonic() - begun, usage.ru_utime + usage.ru_stime)


def _heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def alone(names: list[str]) -> list[Result]:
    """One after the other."""
    results = []
    for name in names:
        _heading(name)
        results.append(run(name))
    return results


def side_by_side(names: list[str]) -> list[Result]:
    """Two at a time, begun in their order; the output of each stands together."""
    printing = threading.Lock()

    def one(name: str) -> Result:
        with tempfile.TemporaryFile() as output:
            result = run(name, output)
            output.seek(0)
            with printing:
                _heading(f"{name} ({_clock(result.seconds)})")
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
        return result

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, names))


def groups(arguments: list[str]) -> list[list[str]]:
    """What stands between the ``--``."""
    found: list[list[str]] = [[]]
    for each in arguments:
        if each == "--":
            found.append([])
        else:
            found[-1].append(each)
    return found


def main(arguments: list[str]) -> int:
    """Run the stages; returns 1 if one failed."""
    begun = time.monotonic()
    results: list[Result] = []
    for number, group in enumerate(groups(arguments)):
        results += (side_by_side if number % 2 else alone)(group)
    _heading(f"{'stage':<20} {'time':>8} {'CPU':>8}")
    for each in results:
        print(each.row())
    failed = [each.name for each in results if each.status]
    print(f"{'all':<24} {_clock(time.monotonic() - begun):>8}", flush=True)
    if failed:
        print(f"failed: make {' '.join(failed)}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
