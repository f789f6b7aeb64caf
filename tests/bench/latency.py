"""Whether anything blocks the daemon's loop: latencies while all functions come and go."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable

from tests.bench.attach import Bench
from tests.bench.report import Row, ms, percentile, say
from tests.bench.running import Wire, request

_REQUEST = request("GET", "/capabilities")

#: Seconds between two requests: a client that asks now and then, not a load.
_PAUSE = 0.02

_MOST_TIMES = 5.0

_SETTLE = 2.0

#: (when it began, how long it took)
Sample = tuple[float, float]


def _sample(wire: Wire) -> Sample:
    begun = time.perf_counter()
    seconds, status, _ = wire.exchange(_REQUEST)
    if status != 200:
        raise RuntimeError(f"GET /capabilities gave {status}")
    time.sleep(_PAUSE)
    return begun, seconds


def _beside(wire: Wire, work: Callable[[], None]) -> list[Sample]:
    """Latencies while ``work`` runs in a thread, which does nothing but wait for others."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    found: list[Sample] = []
    while thread.is_alive():
        found.append(_sample(wire))
    thread.join()
    if failed:
        raise failed[0]
    return found


def _p99(rounds: list[list[float]]) -> float:
    """The median of the rounds' p99: one round that the machine disturbed does not decide."""
    return statistics.median(percentile(each, 99) for each in rounds if len(each) > 1)


def _row(what: str, rounds: list[list[float]], idle: float, *, target: bool) -> Row:
    p99 = _p99(rounds)
    every = [seconds for each in rounds for seconds in each]
    return Row(
        what,
        f"p99 {ms(p99)}, median {ms(statistics.median(every))}, most {ms(max(every))}, "
        f"{len(every)} requests",
        f"p99 {ms(idle)} (idle)",
        f"{p99 / idle:.1f}",
        f"at most {_MOST_TIMES:g}" if target else "",
        p99 <= _MOST_TIMES * idle if target else None,
    )


def measure(here: Bench, quick: bool) -> list[Row]:
    """GET /capabilities: idle, under kpmd's own attaching, and beside a C program's."""
    say("latency of GET /capabilities")
    wire, other = Wire(here.kpmd.socket), Wire(here.kpmd.socket)
    every = len(here.functions.names)
    attach = here.by_names(every)
    idle: list[list[float]] = []
    attaching: list[list[float]] = []
    detaching: list[list[float]] = []
    both: list[list[float]] = []
    control: list[list[float]] = []
    began_to_detach = 0.0

    def through_kpmd() -> None:
        nonlocal began_to_detach
        _, status, content = other.exchange(attach)
        if status != 201:
            raise RuntimeError(f"POST /links gave {status}: {content[:200]!r}")
        link = json.loads(content)["id"]
        began_to_detach = time.perf_counter()
        other.exchange(request("DELETE", f"/links/{link}"))

    def without_kpmd() -> None:
        here.addresses.round(every)

    for _ in range(2 if quick else 5):
        # What the kernel put off when links were closed is to be over.
        time.sleep(_SETTLE)
        idle.append([_sample(wire)[1] for _ in range(200)])
        busy = _beside(wire, through_kpmd)
        both.append([seconds for _, seconds in busy])
        attaching.append([seconds for begun, seconds in busy if begun < began_to_detach])
        detaching.append([seconds for begun, seconds in busy if begun >= began_to_detach])
        time.sleep(_SETTLE)
        beside = _beside(wire, without_kpmd)
        control.append([seconds for _, seconds in beside])
    wire.close()
    other.close()
    quiet = _p99(idle)
    what = f"`GET /capabilities` while kpmd attaches and detaches {every:,}"
    return [
        _row(what, both, quiet, target=True),
        _row("the same, while it attaches", attaching, quiet, target=False),
        _row("the same, while it detaches", detaching, quiet, target=False),
        _row("the same, while the C program by address does", control, quiet, target=False),
    ]
