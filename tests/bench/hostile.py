"""What another user's requests take while a hostile user floods the daemon; and while nobody does.

In the VM, as root: ``python -m tests.bench hostile``. There is one processor for the daemon, the
victim and the attacker, so the last attack is a process that only computes: what is no worse than
under that one is no worse than under any neighbour.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.bench.report import Row, ms, percentile, say
from tests.kernel import attacks
from tests.kernel.wire import Forked, Wire

HOSTILE, VICTIM = 4001, 4002

_MOST_TIMES = 3.0

#: Seconds that an attack goes on before anything is measured, and between two requests.
_SETTLE, _PAUSE = 2.0, 0.01


_COUNT = {"source": {"kind": "builtin", "builtin": "count"}, "attach": "kprobe_multi"}

#: Seconds that each request took, by what it was.
Times = dict[str, list[float]]


def _be_the_victim(path: str, rounds: int) -> Times:
    """A user with one connection, who reads and attaches now and then."""
    wire = Wire(path)
    program = wire.ok("POST", "/programs", _COUNT)["programs"][0]["id"]
    link = {"program": program, "kind": "kprobe", "symbols": ["vfs_read"]}
    times: Times = {}

    def timed(what: str, method: str, target: str, body: object = None) -> Any:
        begun = time.perf_counter()
        content = wire.ok(method, target, body)
        times.setdefault(what, []).append(time.perf_counter() - begun)
        time.sleep(_PAUSE)
        return content

    for _ in range(rounds + 1):
        timed("GET /capabilities", "GET", "/capabilities")
        made = timed("POST /links", "POST", "/links", link)
        timed("DELETE /links", "DELETE", f"/links/{made['id']}")
    return {what: each[1:] for what, each in times.items()}


def _sample(path: str, rounds: int) -> Times:
    victim = Forked(lambda tell: tell(_be_the_victim(path, rounds)), VICTIM)
    try:
        times: Times = victim.told()
        return times
    finally:
        victim.kill()


def measure(path: str, rounds: int, only: list[str] | None) -> list[Row]:
    """The victim's p99 under each attack, beside that of quiet times before and after it."""
    rows: list[Row] = []
    for attack in attacks.all_attacks():
        if only and attack.__name__ not in only:
            continue
        say(attack.__name__)
        before = _sample(path, rounds)
        attacker = Forked(lambda tell, attack=attack: attack(path), HOSTILE)  # type: ignore[misc]
        time.sleep(_SETTLE)
        under = _sample(path, rounds)
        attacker.kill()
        time.sleep(_SETTLE)
        after = _sample(path, rounds)
        for name, times in under.items():
            quiet = percentile(before[name] + after[name], 99)
            p99 = percentile(times, 99)
            rows.append(
                Row(
                    f"`{name}` while {(attack.__doc__ or '').splitlines()[0].rstrip('.').lower()}"
                    f" ({attack.__name__})",
                    f"p99 {ms(p99)}, median {ms(statistics.median(times))}",
                    f"p99 {ms(quiet)} (quiet)",
                    f"{p99 / quiet:.1f}",
                    f"at most {_MOST_TIMES:g}" if attack is not attacks.busy else "",
                    p99 <= _MOST_TIMES * quiet if attack is not attacks.busy else None,
                )
            )
    return rows
