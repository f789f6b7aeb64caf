"""A client with many links dies: how long it takes, and what another client meets meanwhile."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

from tests.bench.attach import Bench
from tests.bench.linking import Maker
from tests.bench.report import Row, ms, percentile, say
from tests.bench.running import Wire, request
from tests.kernel.wire import Forked, Tell

_EACH = 10

#: Rounds of the other client when nothing else happens, behind some that do not count.
_QUIET, _WARMING = 40, 10

#: Seconds between two rounds: a client that attaches now and then, not a load.
_PAUSE = 0.1

_WHAT = ("attach 10 functions", "DELETE /links/{id}", "GET /links/{id}")


def _holder(here: Bench, count: int) -> Callable[[Tell], None]:
    """A client that makes so many links, tells the last one's id, and waits to be killed."""

    def work(tell: Tell) -> None:
        wire = Wire(here.kpmd.socket)
        names = here.functions.names
        last = ""
        for number in range(count):
            part = names[number * _EACH : (number + 1) * _EACH]
            _, status, content = wire.exchange(here.request(symbols=part))
            if status != 201:
                raise RuntimeError(f"POST /links gave {status}: {content[:200]!r}")
            last = json.loads(content)["id"]
        tell(last)

    return work


class _Other:
    """Another client, on a connection of its own."""

    def __init__(self, here: Bench, skip: int) -> None:
        self._here = here
        self._wire = Wire(here.kpmd.socket)
        self._attach = here.request(symbols=here.functions.names[skip : skip + _EACH])
        #: Seconds of its attaches, of its DELETEs, of its GETs.
        self.found: tuple[list[float], list[float], list[float]] = ([], [], [])

    def round(self) -> None:
        time.sleep(_PAUSE)
        attach, status, content = self._wire.exchange(self._attach)
        if status != 201:
            raise RuntimeError(f"POST /links gave {status}: {content[:200]!r}")
        path = f"/links/{json.loads(content)['id']}"
        got, _, _ = self._wire.exchange(request("GET", path))
        deleted, _, _ = self._wire.exchange(request("DELETE", path))
        for times, seconds in zip(self.found, (attach, deleted, got), strict=True):
            times.append(seconds)

    def forget(self) -> None:
        for times in self.found:
            times.clear()

    def is_listed(self, link: str) -> bool:
        return self._wire.exchange(request("GET", f"/links/{link}"))[1] == 200

    def close(self) -> None:
        self._wire.close()


def _by_hand(here: Bench, count: int) -> float:
    """As many closes, one after the other, without the daemon."""
    maker = Maker(here.functions.addresses)
    links = [maker.make(_EACH) for _ in range(count)]
    begun = time.perf_counter()
    for link in links:
        link.close()
    seconds = time.perf_counter() - begun
    maker.close()
    return seconds


def measure(here: Bench, quick: bool) -> list[Row]:
    """Latencies when it is quiet, and while the links of a dead client are detached."""
    count = 60 if quick else 300
    say(f"a client with {count} links dies")
    quiet, busy = (_Other(here, count * _EACH) for _ in range(2))
    for number in range(_WARMING + _QUIET):
        quiet.round()
        if number == _WARMING - 1:
            quiet.forget()
    made = Forked(_holder(here, count), user=0)
    last = made.told()
    made.kill()
    begun = time.perf_counter()
    while busy.is_listed(last):
        busy.round()
    seconds = time.perf_counter() - begun
    # Alone: nobody attaches beside it.
    made = Forked(_holder(here, count), user=0)
    last = made.told()
    made.kill()
    begun = time.perf_counter()
    while busy.is_listed(last):
        time.sleep(_PAUSE)
    alone = time.perf_counter() - begun
    for each in (quiet, busy):
        each.close()
    kernel = _by_hand(here, count)
    rows = [
        _total(
            f"a client with {count} links of {_EACH} dies: until all are detached", alone, kernel
        ),
        _total(
            f"the same, while another attached and detached {len(busy.found[0])} times",
            seconds,
            kernel,
        ),
    ]
    for what, calm, meanwhile in zip(_WHAT, quiet.found, busy.found, strict=True):
        rows += [
            _latency(f"another's {what} meanwhile", percent, meanwhile, calm)
            for percent in (50, 99)
        ]
    return rows


def _total(what: str, seconds: float, kernel: float) -> Row:
    return Row(what, ms(seconds), f"{ms(kernel)} (one thread, by hand)", f"{seconds / kernel:.2f}")


def _latency(what: str, percent: int, busy: list[float], quiet: list[float]) -> Row:
    own, yardstick = (
        statistics.median(each) if percent == 50 else percentile(each, percent)
        for each in (busy, quiet)
    )
    return Row(
        f"{what}: p{percent}",
        f"{ms(own)} of {len(busy)}",
        f"{ms(yardstick)} (quiet)",
        f"{own / yardstick:.1f}",
    )
