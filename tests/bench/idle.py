"""The daemon on this machine itself: the rate of GET /capabilities, and memory when idle."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.index_run import resident_kb
from tests.bench.report import Row, say
from tests.bench.running import Bare, Kpmd, Rounds, request

_LEAST_RATE = 0.9
_MOST_MB = 60.0
_IDLE_SECONDS = 5
_CONNECTIONS = (1, 16)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(word) for word in text.split()]


def row(what: str, kpmd: Kpmd, most: float | None = None) -> Row:
    """Resident memory of the daemon itself."""
    found = {name: kb / 1024 for name, kb in resident_kb(kpmd.process.pid).items()}
    return Row(
        f"{what}: resident",
        _shown(found),
        "",
        "",
        "" if most is None else f"at most {most:g} MB",
        None if most is None else found["rss"] <= most,
    )


def _shown(found: dict[str, float]) -> str:
    return f"{found['rss']:.1f} MB (Pss {found['pss']:.1f} MB)"


def memory(kpmd: Kpmd) -> list[Row]:
    """Resident memory of the daemon, and of its loader."""
    say("memory of the idle daemon")
    time.sleep(_IDLE_SECONDS)
    rows = [row(f"the idle daemon, {_IDLE_SECONDS} s after its start", kpmd, _MOST_MB)]
    for child in children(kpmd.process.pid):
        found = {name: kb / 1024 for name, kb in resident_kb(child).items()}
        rows.append(Row("its loader process: resident", _shown(found)))
    return rows


def rates(kpmd: Kpmd, folder: Path, quick: bool) -> list[Row]:
    """Requests in a second against a bare server, alternately, from one C program."""
    _, status, answer = kpmd.wire.exchange(request("GET", "/capabilities"))
    if status != 200:
        raise RuntimeError(f"GET /capabilities gave {status}")
    bare = Bare(folder, answer)
    rows = []
    try:
        for connections in _CONNECTIONS:
            rows += _rate(kpmd, bare, connections, quick)
    finally:
        bare.close()
    return rows


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process, in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class _Server:
    """One of the two that are loaded, and what came of it."""

    socket: str
    pid: int
    rates: list[float] = field(default_factory=list)
    answers: int = 0
    cpu: float = 0.0

    def run(self, load: Rounds, milliseconds: int) -> None:
        before = _cpu_seconds(self.pid)
        found = load.run(f"{self.socket} {milliseconds}")
        self.cpu += _cpu_seconds(self.pid) - before
        self.answers += found["answers"]
        self.rates.append(found["answers"] / found["ns"] * 1e9)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cost(self) -> float:
        """Microseconds of processor time for each request."""
        return self.cpu / self.answers * 1e6


def _rate(kpmd: Kpmd, bare: Bare, connections: int, quick: bool) -> list[Row]:
    rounds, milliseconds = (3, 500) if quick else (25, 600)
    say(f"rate of GET /capabilities, {connections} connection(s), {rounds} rounds")
    load = Rounds("load_http", "/capabilities", connections, libbpf=False)
    first, second = both = [_Server(each.socket, each.process.pid) for each in (kpmd, bare)]
    try:
        for each in both:
            load.run(f"{each.socket} {milliseconds}")
        for number in range(rounds):
            # Neither of them is always the first.
            for each in both if number % 2 else reversed(both):
                each.run(load, milliseconds)
    finally:
        load.close()
    ratio = statistics.median(
        own / yardstick for own, yardstick in zip(first.rates, second.rates, strict=True)
    )
    what = f"`GET /capabilities`, {connections} connection{'s' if connections > 1 else ''}"
    return [
        Row(
            what,
            f"{first.rate:,.0f} a second",
            f"{second.rate:,.0f} a second (bare aiohttp + uvloop)",
            f"{ratio:.2f}",
            f"at least {_LEAST_RATE:g}",
            ratio >= _LEAST_RATE,
        ),
        Row(
            f"{what}: processor time a request",
            f"{first.cost:.1f} µs",
            f"{second.cost:.1f} µs",
            f"{first.cost / second.cost:.2f}",
        ),
    ]
