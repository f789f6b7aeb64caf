"""What closing links costs the kernel, without the daemon: orders, threads, processes, pauses."""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from tests.bench import pausing
from tests.bench.attach import Bench
from tests.bench.linking import EACH, LINKS, Maker, Other, timed
from tests.bench.report import Row, ms, say

#: Links of so many functions each, as clients of all kinds hold them when they end together.
_MIXED = (*[1] * 12, *[10] * 8, *[100] * 5, *[1000] * 3, 5000)

EXPEDITED = Path("/sys/kernel/rcu_expedited")
RCU = Path("/sys/module/rcupdate/parameters")


def measure(here: Bench, quick: bool) -> list[Row]:
    """Everything below, one after the other."""
    maker = Maker(here.functions.addresses)
    try:
        return [
            *ways(maker, 1 if quick else 2),
            *orders(maker, 1 if quick else 2),
            *pausing.measure(maker, 1 if quick else 2),
        ]
    finally:
        maker.close()


# Ways to close many links: does any of them make the kernel quicker?


def _in_threads(maker: Maker, threads: int) -> float:
    links = [maker.make(EACH) for _ in range(LINKS)]

    def run() -> None:
        while True:
            try:
                link = links.pop()
            except IndexError:
                return
            link.close()

    workers = [threading.Thread(target=run) for _ in range(threads)]

    def work() -> None:
        for each in workers:
            each.start()
        for each in workers:
            each.join()

    return timed(work)


def _by_range(maker: Maker) -> float:
    """close_range(2), which os.closerange calls."""
    links = [maker.make(EACH) for _ in range(LINKS)]
    # Side by side at the upper end, where nothing else is.
    lowest = 512
    for number, link in enumerate(links):
        os.dup2(link.fileno(), lowest + number, inheritable=False)
        os.close(link.detach())
    return timed(lambda: os.closerange(lowest, lowest + LINKS))


@contextmanager
def _holders(maker: Maker, processes: int) -> Iterator[list[int]]:
    """Processes that hold the links between them, and wait."""
    pids = []
    ready, tell = os.pipe()
    for number in range(processes):
        pid = os.fork()
        if not pid:
            try:
                # Each its own functions, as the forked copies of the maker do not know of another.
                maker._at += number * LINKS * EACH
                held = [maker.make(EACH) for _ in range(LINKS // processes)]
                os.write(tell, b"x" if held else b"")
                signal.pause()
            finally:
                os._exit(1)
        pids.append(pid)
    os.close(tell)
    for _ in pids:
        if not os.read(ready, 1):
            raise RuntimeError("a process that was to hold links ended before it did")
    os.close(ready)
    yield pids


def _by_death(maker: Maker, processes: int) -> float:
    """Killed at once; a process has ended when its file descriptors are closed."""
    with _holders(maker, processes) as pids:

        def work() -> None:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                os.waitpid(pid, 0)

        return timed(work)


def _in_one(maker: Maker) -> float:
    """As many functions, but one link."""
    return timed(maker.make(LINKS * EACH).close)


@contextmanager
def _expedited() -> Iterator[None]:
    before = EXPEDITED.read_text()
    EXPEDITED.write_text("1")
    try:
        yield
    finally:
        EXPEDITED.write_text(before)


def _with_expedited(maker: Maker) -> float:
    with _expedited():
        return _in_threads(maker, 1)


def ways(maker: Maker, rounds: int) -> list[Row]:
    """The same 48 links, closed in different ways."""
    say(f"ways to close {LINKS} links, {rounds} rounds")
    found: dict[str, list[float]] = {}
    competitors: dict[str, Callable[[Maker], float]] = {
        "one thread": lambda each: _in_threads(each, 1),
        "4 threads": lambda each: _in_threads(each, 4),
        "16 threads": lambda each: _in_threads(each, 16),
        "close_range(2)": _by_range,
        "a process dies": lambda each: _by_death(each, 1),
        "4 processes die": lambda each: _by_death(each, 4),
        "16 processes die": lambda each: _by_death(each, 16),
        "one thread, rcu_expedited": _with_expedited,
        "all functions in one link": _in_one,
    }
    for _ in range(rounds):
        for name, run in competitors.items():
            found.setdefault(name, []).append(run(maker))
    one = statistics.median(found["one thread"])
    return [
        Row(
            f"close {LINKS} links of {EACH}: {name}",
            ms(statistics.median(times)),
            f"{ms(one)} (one thread)",
            f"{statistics.median(times) / one:.2f}",
        )
        for name, times in found.items()
    ]


# Orders, and what another client's attach meets meanwhile


_ORDERS: dict[str, Callable[[list[int]], list[int]]] = {
    "as made": list,
    "smallest first": sorted,
    "largest first": lambda sizes: sorted(sizes, reverse=True),
}


def orders(maker: Maker, rounds: int) -> list[Row]:
    """Links of mixed sizes, closed one at a time, while another client attaches."""
    say(f"orders of {len(_MIXED)} closes, {rounds} rounds")
    found: dict[str, list[tuple[float, ...]]] = {}
    for number in range(rounds):
        sizes = list(_MIXED)
        random.Random(number).shuffle(sizes)  # noqa: S311
        for name, order in _ORDERS.items():
            found.setdefault(name, []).append(_order(maker, sizes, order))
    rows = []
    for name, rounds_ in found.items():
        total, functions, links, mean, wait = map(statistics.median, zip(*rounds_, strict=True))
        rows.append(
            Row(
                f"close {len(_MIXED)} links of 1 to 5,000, {name}",
                f"all {ms(total)}; half of the functions {ms(functions)}, half of the links "
                f"{ms(links)}; a link's mean wait {ms(mean)}",
                f"another's attach: at most {ms(wait)}",
            )
        )
    return rows


def _order(
    maker: Maker, sizes: list[int], order: Callable[[list[int]], list[int]]
) -> tuple[float, ...]:
    made = [(size, maker.make(size)) for size in sizes]
    links = []
    for size in order(sizes):
        at = next(at for at, each in enumerate(made) if each[0] == size)
        links.append(made.pop(at))
    ends = []
    with Other(maker) as other:
        begun = time.perf_counter()
        for _, link in links:
            link.close()
            ends.append(time.perf_counter() - begun)
    other.close()
    freed = list(accumulate(size for size, _ in links))
    half = next(end for end, sum_ in zip(ends, freed, strict=True) if sum_ * 2 >= freed[-1])
    return ends[-1], half, ends[len(ends) // 2], statistics.mean(ends), max(other.attaches)
