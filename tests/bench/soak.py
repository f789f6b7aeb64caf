"""Clients come, attach and die, many of them and at random points; afterwards nothing is left.

The parts are a test as well (``tests/kernel/test_soak.py``), with few clients.
"""

from __future__ import annotations

import base64
import os
import random
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.bench.index_run import resident_kb
from tests.bench.report import Row, ms, percentile, say
from tests.bench.running import Kpmd
from tests.kernel.rest import Rest
from tests.kernel.wire import NOBODY, Wire, request
from tests.kernel.witness import Holdings, eventually, in_api, in_kernel

#: mov r0, 0; exit
_RETURN_0 = base64.b64encode(bytes.fromhex("b7000000000000009500000000000000")).decode()

_SOURCES: tuple[dict[str, object], ...] = (
    {"kind": "builtin", "builtin": "count"},
    {"kind": "instructions", "instructions": _RETURN_0, "license": "GPL", "name": "zero"},
)

#: How far a client gets before it dies; the last three times as often as each of the others.
_ENDS = (
    "half a load",
    "load unread",
    "loaded",
    "half an attach",
    "attach unread",
    *["attached"] * 3,
)
_LIFETIMES = (*["process"] * 4, *["connection"] * 3, *["lease"] * 2, "persistent")

#: Of these the functions are taken: nothing that runs all the time.
PREFIXES = ("tcp_", "ext4_", "vfs_")

_GONE = 410

#: At most so many clients at once.
_AT_ONCE = 30

#: Of the time, clients come in this share; the rest is for what they leave.
_COMING = 0.8

#: Seconds to wait for what clients left: a thousand links take the kernel two minutes on 6.12.
_PATIENCE = 600.0


@dataclass(frozen=True)
class Plan:
    """How much, and from which random numbers."""

    clients: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class Sample:
    """The daemon at a moment."""

    fds: int
    threads: int
    rss_kb: float


@dataclass
class Outcome:
    """What was seen."""

    before: Sample
    after: Sample
    seconds: float
    half: Sample
    #: What others than kpmd have in the kernel, and what there is when all is over.
    others: Holdings
    left: Holdings
    clients: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    #: Clients that ended otherwise than they were to.
    failed: int
    most_detaching: int
    gets: list[float] = field(default_factory=list)
    attaches: list[float] = field(default_factory=list)
    quiet_gets: list[float] = field(default_factory=list)
    quiet_attaches: list[float] = field(default_factory=list)


def sample(pid: int) -> Sample:
    return Sample(
        len(os.listdir(f"/proc/{pid}/fd")),
        len(os.listdir(f"/proc/{pid}/task")),
        resident_kb(pid)["rss"],
    )


class _Client:
    """A life: what it loads and attaches to, for how long, and how it dies."""

    def __init__(self, path: str, functions: Sequence[str], plan: Plan, number: int) -> None:
        self._random = random.Random(f"{plan.seed}/{number}")  # noqa: S311
        self._functions = functions
        self._end = self._random.choice(_ENDS)
        self._wire = Wire(path)

    def live(self) -> None:
        """Run to the end that is drawn for it; does not return."""
        self._go()
        if self._end.endswith("unread"):
            time.sleep(self._random.uniform(0, 0.3))
        if self._random.random() < 0.7:
            os.kill(os.getpid(), signal.SIGKILL)
        self._wire.close()
        os._exit(0)

    def _go(self) -> None:
        lifetime = self._lifetime()
        source = self._random.choice(_SOURCES)
        body = {"source": source, "attach": "kprobe_multi", "lifetime": lifetime}
        loaded = self._step("load", request("POST", "/programs", body))
        if loaded is None:
            return
        for _ in range(self._random.randint(1, 3)):
            link = {
                "program": loaded["programs"][0]["id"],
                "kind": self._random.choice(("kprobe", "kretprobe")),
                "symbols": self._random.sample(self._functions, self._random.randint(1, 5)),
                "lifetime": lifetime,
            }
            if self._step("attach", request("POST", "/links", link)) is None:
                return

    def _lifetime(self) -> dict[str, object]:
        kind = self._random.choice(_LIFETIMES)
        if kind != "lease":
            return {"kind": kind}
        lease = self._wire.ok("POST", "/leases", {"ttl": self._random.randint(3, 20)})
        return {"kind": kind, "lease": lease["id"]}

    def _step(self, what: str, raw: bytes) -> Any:
        """Send it, as far as this client gets; its answer, or None where this is the end."""
        if self._end in (f"half a {what}", f"half an {what}"):
            self._wire.send(raw[: self._random.randrange(1, len(raw))])
            return None
        self._wire.send(raw)
        if self._end == f"{what} unread":
            return None
        status, answer = self._wire.answer()
        if status == _GONE:
            return None  # its lease has ended meanwhile
        if status >= 300:
            raise RuntimeError(f"{what} gave {status}: {answer}")
        return None if (what, self._end) == ("load", "loaded") else answer


def _fork(path: str, functions: Sequence[str], plan: Plan, number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.closerange(3, 1 << 14)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _Client(path, functions, plan, number).live()
    except BaseException as error:
        os.write(2, f"client {number}: {error!r}\n".encode())
    finally:
        os._exit(70)


class _Quiet:
    """A client that asks now and then, and whose waiting counts."""

    def __init__(self, rest: Rest, function: str) -> None:
        self._rest = rest
        body = {"source": _SOURCES[1], "attach": "kprobe_multi"}
        self._program = rest.ok("POST", "/programs", body)["programs"][0]["id"]
        self._body = {"program": self._program, "kind": "kprobe", "symbols": [function]}
        self.gets: list[float] = []
        self.attaches: list[float] = []

    def get(self) -> None:
        begun = time.perf_counter()
        self._rest.ok("GET", "/capabilities")
        self.gets.append(time.perf_counter() - begun)

    def attach(self) -> None:
        begun = time.perf_counter()
        link = self._rest.ok("POST", "/links", self._body)
        self.attaches.append(time.perf_counter() - begun)
        self._rest.ok("DELETE", f"/links/{link['id']}")

    def close(self) -> None:
        self._rest.ok("DELETE", f"/programs/{self._program}?force=true")


def _fill_pools(path: str, function: str) -> None:
    """Many requests at once, so that the daemon has all of its threads before they are counted."""
    wires = [Wire(path) for _ in range(16)]
    body = {"source": _SOURCES[0]}
    for wire in wires:
        wire.send(request("POST", "/programs", body))
    programs = [wire.answer()[1]["programs"][0]["id"] for wire in wires]
    for wire, program in zip(wires, programs, strict=True):
        link = {"program": program, "kind": "kprobe", "symbols": [function]}
        wire.send(request("POST", "/links", link))
    for wire in wires:
        wire.answer()
    for wire, program in zip(wires, programs, strict=True):
        wire.send(request("DELETE", f"/programs/{program}?force=true"))
    for wire in wires:
        wire.answer()
        wire.close()


def soak(path: str, pid: int, functions: Sequence[str], plan: Plan) -> Outcome:
    """Let all clients live and die; returns when what they left has ended too."""
    rest = Rest(path, timeout=_PATIENCE)
    _fill_pools(path, functions[0])
    eventually(lambda: in_api(rest), Holdings(), _PATIENCE)
    eventually(lambda: len(rest.items("/clients")), 1, _PATIENCE)
    others = in_kernel()
    before = half = sample(pid)
    quiet = _Quiet(rest, functions[0])
    for _ in range(20):
        quiet.get()
        quiet.attach()
    calm = quiet.gets, quiet.attaches
    quiet.gets, quiet.attaches = [], []
    begun = time.monotonic()
    alive: set[int] = set()
    started = failed = most = 0
    while started < plan.clients or alive:
        due = (time.monotonic() - begun) / (plan.seconds * _COMING) * plan.clients
        while started < min(plan.clients, due) and len(alive) < _AT_ONCE:
            alive.add(_fork(path, functions[1:], plan, started))
            started += 1
            if started == plan.clients // 2:
                half = sample(pid)
            if started % 100 == 0:
                listed = rest.items("/links")
                most = max(most, sum(each["state"] == "detaching" for each in listed))
                say(f"{started} clients, {len(listed)} links, {sample(pid)}")
        quiet.get()
        if len(quiet.gets) % 5 == 0:
            quiet.attach()
        for each in list(alive):
            ended, status = os.waitpid(each, os.WNOHANG)
            if ended:
                alive.discard(each)
                failed += status not in (0, signal.SIGKILL)
        time.sleep(0.02)
    quiet.close()
    _delete_persistent(rest)
    eventually(lambda: in_api(rest), Holdings(), _PATIENCE)
    eventually(lambda: rest.items("/leases"), [], _PATIENCE)
    eventually(lambda: len(rest.items("/clients")), 1, _PATIENCE)
    eventually(in_kernel, others, _PATIENCE)
    seconds = time.monotonic() - begun
    eventually(lambda: sample(pid).fds <= before.fds, True, _PATIENCE)
    outcome = Outcome(
        before=before,
        after=sample(pid),
        seconds=seconds,
        half=half,
        others=others,
        left=in_kernel(),
        clients=rest.items("/clients"),
        leases=rest.items("/leases"),
        failed=failed,
        most_detaching=most,
        gets=quiet.gets,
        attaches=quiet.attaches,
        quiet_gets=calm[0],
        quiet_attaches=calm[1],
    )
    rest.close()
    return outcome


def _delete_persistent(rest: Rest) -> None:
    """What nothing else ends. Their programs may be needed by a link that has not been made yet."""
    for link in rest.items("/links"):
        if link["lifetime"]["kind"] == "persistent" and link["state"] == "attached":
            rest("DELETE", f"/links/{link['id']}")
    while kept := [
        each for each in rest.items("/programs") if each["lifetime"]["kind"] == "persistent"
    ]:
        for each in kept:
            rest("DELETE", f"/programs/{each['id']}?force=true")


def rows(plan: Plan, outcome: Outcome) -> list[Row]:
    """The table of a run."""
    first, last = outcome.before, outcome.after
    clean = outcome.left == outcome.others and not outcome.leases and len(outcome.clients) == 1
    found = [
        Row(
            f"{plan.clients:,} clients, seed {plan.seed}: until nothing was left",
            f"{outcome.seconds:,.0f} s, at most {outcome.most_detaching} links in the queue",
            target="nothing left",
            met=clean and not outcome.failed,
        ),
        Row(
            "file descriptors",
            f"{last.fds}",
            f"{first.fds} (before)",
            "",
            "the same",
            last.fds == first.fds,
        ),
        Row("threads", f"{last.threads}", f"{first.threads} (before)"),
        Row(
            "resident memory",
            f"{last.rss_kb / 1024:.1f} MB",
            f"{first.rss_kb / 1024:.1f} MB (before), {outcome.half.rss_kb / 1024:.1f} MB (after "
            "half of the clients)",
            f"{last.rss_kb / first.rss_kb:.2f}",
        ),
    ]
    for what, busy, calm in (
        ("GET /capabilities", outcome.gets, outcome.quiet_gets),
        ("attach", outcome.attaches, outcome.quiet_attaches),
    ):
        p50, quiet = statistics.median(busy), statistics.median(calm)
        found.append(
            Row(
                f"another client's {what} meanwhile",
                f"p50 {ms(p50)}, p99 {ms(percentile(busy, 99))} of {len(busy)}",
                f"p50 {ms(quiet)}, p99 {ms(percentile(calm, 99))} (quiet)",
                f"{p50 / quiet:.1f}",
            )
        )
    return found


def measure(kpmd: Kpmd, functions: Sequence[str], plan: Plan) -> list[Row]:
    """A whole run against a daemon of its own."""
    os.chmod(kpmd.socket, 0o666)
    # Idle for so long, it would be closed in between.
    kpmd.wire.close()
    return rows(plan, soak(kpmd.socket, kpmd.process.pid, functions, plan))
