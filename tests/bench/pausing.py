"""Whether closing in the background should make room for other clients, and how."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.linking import EACH, LINKS, Maker, Other, timed
from tests.bench.report import Row, ms, percentile, say

#: Milliseconds between two closes of the background.
_PAUSES = (20, 60, 100)

#: Seconds; the longest pause that depends on how long the close took.
_LONGEST = 0.06

_QUIET = 4.0


def measure(maker: Maker, rounds: int) -> list[Row]:
    """Whether background closing should make room for other clients, and how."""
    say(f"pauses between closes, {rounds} rounds")

    def none(_: Other, took: float) -> None:
        pass

    def seconds(each: float) -> _Pause:
        return lambda _, took: time.sleep(each)

    def while_attaching(other: Other, _: float) -> None:
        other.wait_until_attached()

    def as_long(_: Other, took: float) -> None:
        time.sleep(min(took, _LONGEST))

    def both(other: Other, took: float) -> None:
        as_long(other, took)
        other.wait_until_attached()

    same = f"as long as the close took, at most {_LONGEST * 1000:g} ms"
    competitors: dict[str, _Pause] = {
        "none": none,
        "while it attaches": while_attaching,
        **{f"{each} ms": seconds(each / 1000) for each in _PAUSES},
        same: as_long,
        f"{same}, and while it attaches": both,
    }
    rows = []
    for detaches in (False, True):
        found: dict[str, list[_Paused]] = {}
        for _ in range(rounds):
            for name, pause in {"nothing is closed": None, **competitors}.items():
                found.setdefault(name, []).append(_paused(maker, pause, detaches))
        rows += _pause_rows(found, detaches)
    return rows


#: What follows a close, given how long that took.
_Pause = Callable[[Other, float], None]


@dataclass(frozen=True)
class _Paused:
    seconds: float
    attaches: list[float]
    closes: list[float]


def _paused(maker: Maker, pause: _Pause | None, detaches: bool) -> _Paused:
    links = [maker.make(EACH) for _ in range(LINKS)] if pause else []
    total = 0.0
    with Other(maker, detaches=detaches) as other:
        begun = time.perf_counter()
        for link in links:
            took = timed(link.close)
            total = time.perf_counter() - begun
            if pause is not None:
                pause(other, took)
        if pause is None:
            time.sleep(_QUIET)
    other.close()
    return _Paused(total, other.attaches, other.closes)


def _pause_rows(found: dict[str, list[_Paused]], detaches: bool) -> list[Row]:
    quiet = statistics.median(
        seconds for each in found["nothing is closed"] for seconds in each.attaches
    )
    who = "attaches and detaches" if detaches else "attaches"
    rows = []
    for name, rounds in found.items():
        attaches = [seconds for each in rounds for seconds in each.attaches]
        closes = [seconds for each in rounds for seconds in each.closes]
        total = statistics.median(each.seconds for each in rounds)
        rows.append(
            Row(
                f"{LINKS} links are closed, another client {who}; pause: {name}",
                "; ".join(
                    [
                        *([f"all closed after {ms(total)}"] if total else []),
                        f"attach {_spread(attaches)}",
                        *([f"detach {_spread(closes)}"] if closes else []),
                    ]
                ),
                f"attach p50 {ms(quiet)} (nothing is closed)",
                f"{statistics.median(attaches) / quiet:.1f}",
            )
        )
    return rows


def _spread(values: list[float]) -> str:
    p50, p99 = statistics.median(values), percentile(values, 99)
    return f"p50 {ms(p50)}, p99 {ms(p99)} of {len(values)}"
