"""Records out of a ring buffer in the VM: kpmd's streams against libbpf's own consumer."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.prepare import PROJECT
from tests.bench.report import Row, alternate, ms, percentile, say
from tests.bench.running import Kpmd, Rounds, Wire, request
from tests.kernel.test_links import GETPID

OBJECT = PROJECT / "tests/objects/events.bpf.o"
_ELF = base64.b64encode(OBJECT.read_bytes()).decode()

_BURSTS = (1, 32)
SIZES = (16, 48, 128, 256)

#: The record that the object's struct fits, and many of them: what is decoded, and what loads most.
_SIZE, _BURST = 48, 32

#: What each competitor's rate is to be, as a share of libbpf's.
_LEAST = {"octets": 0.5, "lines": 0.1, "alone": 0.1, "handed": 0.95}

_SHOWN = {
    "octets": "raw stream",
    "lines": "NDJSON, decoded",
    "alone": "NDJSON, decoded, without the hex",
    "handed": "libbpf on the map handed over",
}

#: The daemon's time for a record may differ by size as much as it does by chance.
_MOST_BY_SIZE = 1.25

_MOST_TIMES = 5.0

#: Seconds between two requests, and before a writer begins.
_PAUSE, _SOON = 0.02, 0.1


@dataclass(frozen=True)
class Shape:
    """How many records the program writes at each call, and of which size."""

    burst: int
    size: int

    def __str__(self) -> str:
        return f"{self.size} bytes, {self.burst} at each call"


@dataclass(frozen=True)
class Bench:
    """Everything that takes part, started once."""

    kpmd: Kpmd
    writer: Rounds
    libbpf: Rounds
    stream: Rounds
    pool: ThreadPoolExecutor

    @property
    def pids(self) -> tuple[int, int, int, int]:
        """The processes whose time is measured; each is one process."""
        each = self.kpmd, self.writer, self.libbpf, self.stream
        daemon, writer, libbpf, stream = (one.process.pid for one in each)
        return daemon, writer, libbpf, stream


@contextmanager
def bench(kpmd: Kpmd) -> Iterator[Bench]:
    """Start the C programs, and a new connection: the first may have waited for too long."""
    kpmd.wire.close()
    kpmd.wire = Wire(kpmd.socket)
    kpmd.ok("GET", "/capabilities")
    with ExitStack() as stack:

        def start(name: str, *arguments: object, libbpf: bool = False) -> Rounds:
            made = Rounds(name, *arguments, libbpf=libbpf)
            stack.callback(made.close)
            return made

        yield Bench(
            kpmd=kpmd,
            writer=start("records_write"),
            libbpf=start("records_ring", OBJECT, libbpf=True),
            stream=start("records_stream", kpmd.socket),
            pool=stack.enter_context(ThreadPoolExecutor(2)),
        )


@contextmanager
def loaded(here: Bench, shape: Shape) -> Iterator[dict[str, str]]:
    """The object in kpmd, attached to what the writer calls: its maps' ids by their names."""
    source = {
        "kind": "object",
        "elf": _ELF,
        "programs": ["to_ring"],
        "globals": {
            "target_pid": here.writer.process.pid,
            "burst": shape.burst,
            "size": shape.size,
        },
    }
    _, made = here.kpmd.ok("POST", "/programs", {"source": source, "attach": "kprobe_multi"})
    program = made["programs"][0]["id"]
    body = {"program": program, "kind": "kprobe", "symbols": [GETPID]}
    try:
        here.kpmd.ok("POST", "/links", body)
        yield {each["name"]: each["id"] for each in made["maps"]}
    finally:
        here.kpmd.ok("DELETE", f"/programs/{program}?force=true")


def _cpu(pid: int) -> int:
    """Nanoseconds that all threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


@dataclass(frozen=True)
class Times:
    """What came of one round."""

    rate: float
    written: int
    dropped: int
    lost: int
    records: int
    #: Microseconds for each record that came, of the daemon, and of whoever counted it; and of the
    #: writer for each that it wrote.
    daemon: float
    reader: float
    writer: float

    def columns(self) -> list[float]:
        """For the medians: shares instead of numbers."""
        every = max(1, self.written)
        shares = self.dropped / every, self.lost / every
        return [self.rate, *shares, self.daemon, self.reader, self.writer]


def _round(here: Bench, reader: Rounds, line: str, shape: Shape, seconds: float) -> Times:
    """One consumer, from before the writer begins until nothing comes any more."""
    reader.run(line)
    daemon, writer, *_ = here.pids
    pids = daemon, reader.process.pid, writer
    before = [_cpu(pid) for pid in pids]
    begun = time.monotonic_ns() + int(_SOON * 1e9)
    until = begun + int(seconds * 1e9)
    found = here.pool.submit(reader.run, until)
    time.sleep(_SOON)
    calls = here.writer.run(until)["calls"]
    count = found.result()
    spent = [(_cpu(pid) - each) / 1000 for pid, each in zip(pids, before, strict=True)]
    records = max(1, count["records"])
    written = calls * shape.burst
    return Times(
        rate=count["in_time"] / seconds,
        written=written,
        dropped=count["dropped"],
        lost=count["lost"],
        records=count["records"],
        daemon=spent[0] / records,
        reader=spent[1] / records,
        writer=spent[2] / written,
    )


def _through_kpmd(here: Bench, how: str, shape: Shape, seconds: float) -> list[float]:
    with loaded(here, shape) as maps:
        events = maps["events"]
        reader, line = {
            "octets": (here.stream, f"follow records /maps/{events}/records"),
            "lines": (here.stream, f"follow lines /maps/{events}/records?type=event"),
            "alone": (here.stream, f"follow lines /maps/{events}/records?type=event&data=false"),
            "handed": (here.libbpf, f"handed {here.kpmd.socket} {events}"),
        }[how]
        found = _round(here, reader, line, shape, seconds)
        _, bss = here.kpmd.ok("GET", f"/maps/{maps['.bss']}/entries")
        written, dropped = struct.unpack_from("<QQ", bytes.fromhex(bss["items"][0]["value"]))
    missing = written - dropped - found.lost - found.records
    if missing:
        raise RuntimeError(f"{how}: of {written} records {missing} are missing, and none told it")
    return Times(**{**vars(found), "dropped": dropped}).columns()


def _by_libbpf(here: Bench, shape: Shape, seconds: float) -> list[float]:
    line = f"own {here.writer.process.pid} {shape.burst} {shape.size}"
    return _round(here, here.libbpf, line, shape, seconds).columns()


Found = dict[str, list[float]]


def _compare(here: Bench, shape: Shape, rounds: int, seconds: float) -> Found:
    say(f"records of {shape}, {rounds} rounds")
    competitors: dict[str, Callable[[], list[float]]] = {
        "libbpf": partial(_by_libbpf, here, shape, seconds),
    }
    for how in _LEAST:
        if how in ("lines", "alone") and shape.size < _SIZE:
            continue  # less than the struct: nothing would be decoded
        competitors[how] = partial(_through_kpmd, here, how, shape, seconds)
    return alternate(rounds, competitors)


def _rows(shape: Shape, found: Found) -> list[Row]:
    yardstick = found["libbpf"]
    rows = []
    for how, least in _LEAST.items():
        if how not in found:
            continue
        rate, dropped, lost, daemon, reader, writer = found[how]
        ratio = rate / yardstick[0]
        rows.append(
            Row(
                f"records of {shape}: {_SHOWN[how]}",
                f"{rate:,.0f} a second; {dropped:.0%} dropped by the program, {lost:.0%} by kpmd; "
                f"µs for each: daemon {daemon:.2f}, client {reader:.2f}, program {writer:.2f}",
                f"{yardstick[0]:,.0f} a second, {yardstick[1]:.0%} dropped; "
                f"µs for each: client {yardstick[4]:.2f}, program {yardstick[5]:.2f} (libbpf)",
                f"{ratio:.2f}",
                f"at least {least:g}",
                ratio >= least,
            )
        )
    return rows


def rates(here: Bench, quick: bool) -> list[Row]:
    """Records in a second, and the daemon's time for each of them by their size."""
    rounds, seconds = (1, 1.0) if quick else (3, 2.0)
    rows: list[Row] = []
    for burst in _BURSTS:
        costs = {}
        for size in SIZES:
            shape = Shape(burst, size)
            found = _compare(here, shape, rounds, seconds)
            costs[size] = found["octets"][3]
            for row in _rows(shape, found):
                # A run takes long, and may be ended before its table is printed.
                say(row.line())
                rows.append(row)
        most = max(costs.values()) / min(costs.values())
        shown = ", ".join(f"{size}: {cost:.2f}" for size, cost in costs.items())
        rows.append(
            Row(
                f"the daemon's µs for a raw record by its size, {burst} at each call",
                shown,
                "",
                f"{most:.2f} (largest to smallest)",
                f"at most {_MOST_BY_SIZE:g}",
                most <= _MOST_BY_SIZE,
            )
        )
    return rows


def _sample(wire: Wire) -> float:
    seconds, status, _ = wire.exchange(request("GET", "/capabilities"))
    if status != 200:
        raise RuntimeError(f"GET /capabilities gave {status}")
    time.sleep(_PAUSE)
    return seconds


def _beside(here: Bench, wire: Wire, line: str | None, seconds: float) -> list[float]:
    """Latencies while the writer writes, and somebody reads, if there is a line for it."""
    if line is not None:
        here.stream.run(line)
    until = time.monotonic_ns() + int(seconds * 1e9)
    read = here.pool.submit(here.stream.run, until) if line is not None else None
    written = here.pool.submit(here.writer.run, until)
    found = []
    while not written.done():
        found.append(_sample(wire))
    written.result()
    if read is not None:
        read.result()
    return found


def latency(here: Bench, quick: bool) -> list[Row]:
    """GET /capabilities beside streams at full rate, and beside a writer whom nobody reads."""
    say("latency of GET /capabilities beside streams")
    rounds, seconds = (2, 3.0) if quick else (5, 6.0)
    wire = here.kpmd.wire
    found: dict[str, list[list[float]]] = {}
    with loaded(here, Shape(_BURST, _SIZE)) as maps:
        path = f"/maps/{maps['events']}/records"
        beside = {
            "a raw stream runs at full rate": f"follow records {path}",
            "an NDJSON stream runs at full rate": f"follow lines {path}?type=event",
            "the program writes as much, and nobody reads": None,
        }
        for number in range(rounds + 1):
            quiet = [_sample(wire) for _ in range(int(seconds / _PAUSE / 2))]
            if number:
                found.setdefault("", []).append(quiet)
            for what, line in beside.items():
                times = _beside(here, wire, line, seconds)
                if number:
                    found.setdefault(what, []).append(times)
    idle = median(percentile(each, 99) for each in found.pop(""))
    return [_latency_row(what, times, idle) for what, times in found.items()]


def _latency_row(what: str, rounds: list[list[float]], idle: float) -> Row:
    p99 = median(percentile(each, 99) for each in rounds)
    every = [seconds for each in rounds for seconds in each]
    target = "nobody" not in what
    return Row(
        f"`GET /capabilities` while {what}",
        f"p99 {ms(p99)}, median {ms(median(every))}, most {ms(max(every))}, {len(every)} requests",
        f"p99 {ms(idle)} (idle)",
        f"{p99 / idle:.1f}",
        f"at most {_MOST_TIMES:g}" if target else "",
        p99 <= _MOST_TIMES * idle if target else None,
    )
