"""Attaching and detaching in the VM: kpmd against programs on libbpf."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.prepare import BUILD
from tests.bench.report import NOT_YET, Row, alternate, at_most, exponent, ms, say
from tests.bench.running import Bare, Kpmd, Refused, Rounds, request

TRACEABLE = "/sys/kernel/tracing/available_filter_functions_addrs"
_OBJECT = BUILD / "zero.bpf.o"
_SIZES = (1000, 2000, 5000, 10000, 20000)
_SINGLES = 200

#: Closing kprobes one by one takes 0.1 s for each.
_SINGLE_ROUNDS = 2


@dataclass(frozen=True)
class Functions:
    """What can be traced, each name once, in random order: the same for all competitors."""

    names: list[str]
    addresses: list[int]


def read_functions() -> Functions:
    """All names that tracefs lists, with the address of the first function of each.

    These addresses are tracefs's own, as libbpf takes them; the kernel does the same work for them
    as for the starts of the functions.
    """
    found: dict[str, int] = {}
    with open(TRACEABLE, encoding="ascii") as file:
        for line in file:
            address, name = line.split()[:2]
            found.setdefault(name, int(address, 16))
    pairs = list(found.items())
    random.Random(1).shuffle(pairs)  # noqa: S311
    return Functions([name for name, _ in pairs], [address for _, address in pairs])


@dataclass(frozen=True)
class Bench:
    """Everything that takes part, started once."""

    kpmd: Kpmd
    program: str
    functions: Functions
    names: Rounds
    addresses: Rounds
    glob: Rounds
    single: Rounds
    folder: Path

    def by_names(self, count: int) -> bytes:
        """The request for the first ``count`` names."""
        return self.request(symbols=self.functions.names[:count])

    def request(self, **targets: object) -> bytes:
        return request("POST", "/links", {"program": self.program, "kind": "kprobe", **targets})


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """Start kpmd and the C programs."""
    functions = read_functions()
    names, addresses = folder / "names", folder / "addresses"
    names.write_text("".join(f"{name}\n" for name in functions.names), encoding="ascii")
    addresses.write_text("".join(f"{each:x}\n" for each in functions.addresses), encoding="ascii")
    with ExitStack() as stack:

        def start(name: str, *arguments: object) -> Rounds:
            made = Rounds(name, _OBJECT, *arguments)
            stack.callback(made.close)
            return made

        kpmd = Kpmd(folder)
        stack.callback(kpmd.close)
        kpmd.warm()
        yield Bench(
            kpmd=kpmd,
            program=kpmd.load(),
            functions=functions,
            names=start("attach_names", names),
            addresses=start("attach_addresses", addresses),
            glob=start("attach_glob"),
            single=start("attach_single", names),
            folder=folder,
        )


Times = dict[str, list[float]]


def _measure(here: Bench, count: int, rounds: int) -> Times:
    say(f"{count} functions by name, {rounds} rounds")
    attach = here.by_names(count)
    return alternate(
        rounds,
        {
            "kpmd": partial(here.kpmd.round, attach),
            "names": partial(here.names.round, count),
            "addresses": partial(here.addresses.round, count),
        },
    )


def by_names(here: Bench, quick: bool) -> list[Row]:
    """Attach by names, one function to all, and whether the cost is linear."""
    rows = _one(here, 5 if quick else 15)
    every = len(here.functions.names)
    sizes = (1000, every) if quick else (*_SIZES, every)
    measured: dict[int, Times] = {}
    for count in sizes:
        rounds = 2 if quick else 11 if count <= 2000 else 7 if count <= 10000 else 3
        times = measured[count] = _measure(here, count, rounds)
        what = f"attach {count:,} by name"
        rows.append(at_most(what, times["kpmd"][0], times["names"][0], "C by name", 1.0))
    for count, times in measured.items():
        rows.append(
            Row(
                f"detach {count:,}",
                ms(times["kpmd"][1]),
                f"{ms(times['names'][1])} (C by name)",
                f"{times['kpmd'][1] / times['names'][1]:.2f}",
            )
        )
    for count, times in measured.items():
        rows.append(
            Row(
                f"attach, for each of {count:,} (C by address beside it)",
                f"{times['kpmd'][0] / count * 1e6:.1f} µs",
                f"{times['addresses'][0] / count * 1e6:.1f} µs (C by address)",
                f"{times['kpmd'][0] / times['addresses'][0]:.2f}",
            )
        )
    rows += [_linear("attach", 0, measured), _linear("detach", 1, measured)]
    return rows


def _linear(what: str, column: int, measured: Mapping[int, Times]) -> Row:
    """Whether kpmd adds nothing that grows faster than the number of functions.

    The kernel's own part, as the C program by address meets it, is not exactly linear.
    """
    own, kernel = (
        exponent({count: times[name][column] for count, times in measured.items()})
        for name in ("kpmd", "addresses")
    )
    return Row(
        f"{what}: time is n to the power of",
        f"{own:.2f}",
        f"{kernel:.2f} (C by address)",
        "",
        "at most 1.1, or the C program's + 0.05",
        own <= max(1.1, kernel + 0.05),
    )


def _one(here: Bench, rounds: int) -> list[Row]:
    """One function: kpmd may take a bare HTTP round trip longer than the C program."""
    say(f"1 function, {rounds} rounds")
    attach = here.by_names(1)
    answer = here.kpmd.wire.exchange(attach)[2]
    bare = Bare(here.folder, answer)
    try:
        times = alternate(
            rounds,
            {
                "kpmd": partial(here.kpmd.round, attach),
                "names": partial(here.names.round, 1),
                "addresses": partial(here.addresses.round, 1),
                "bare": lambda: [bare.wire.exchange(attach)[0]],
            },
        )
    finally:
        bare.close()
    kpmd, c, trip = times["kpmd"][0], times["names"][0], times["bare"][0]
    address = times["addresses"][0]
    row = Row(
        "attach 1 by name",
        ms(kpmd),
        f"{ms(c)} (C by name) + {ms(trip)} (bare HTTP round trip)",
        f"{kpmd / (c + trip):.2f}",
        "at most the sum",
        kpmd <= c + trip,
    )
    beside = Row("the same", ms(kpmd), f"{ms(address)} (C by address)", f"{kpmd / address:.2f}")
    return [row, beside]


def by_glob(here: Bench, quick: bool) -> list[Row]:
    """Attach by glob, against libbpf's own."""
    rows = []
    for pattern, limit, rounds in (("tcp_*", 0.2, 7), ("*", 0.8, 3)):
        say(f"glob {pattern}")
        every = len(here.functions.names)
        attach = here.request(patterns=[pattern])
        what = f"attach by the glob `{pattern}`"
        competitors: dict[str, Callable[[], Sequence[float]]] = {
            "libbpf": partial(here.glob.round, pattern),
        }
        try:
            _, link = here.kpmd.send(attach)
            here.kpmd.ok("DELETE", f"/links/{link['id']}")
            what += f" ({link['count']:,} functions)"
            competitors["kpmd"] = partial(here.kpmd.round, attach)
        except Refused as refused:
            if refused.status != 422:
                raise
            say(f"kpmd refuses it: {refused}")
        if pattern == "*":
            competitors["kernel"] = partial(here.addresses.round, every)
        times = alternate(1 if quick else rounds, competitors)
        libbpf = times["libbpf"][0]
        if "kpmd" in times:
            rows.append(at_most(what, times["kpmd"][0], libbpf, "libbpf's own glob", limit))
        else:
            target = f"at most {limit}"
            rows.append(Row(what, NOT_YET, f"{ms(libbpf)} (libbpf's own glob)", "", target))
        if "kernel" in times:
            what = f"what the kernel allows: C by address, {every:,} functions"
            rows.append(_beside(what, times["kernel"][0], libbpf))
    return rows


def _beside(what: str, seconds: float, libbpf: float) -> Row:
    return Row(what, ms(seconds), f"{ms(libbpf)} (libbpf's own glob)", f"{seconds / libbpf:.2f}")


def one_by_one(here: Bench, quick: bool) -> list[Row]:
    """One link to 200 functions against 200 kprobes."""
    rounds = 1 if quick else _SINGLE_ROUNDS
    say(f"{_SINGLES} kprobes one by one")
    single = [here.single.round(_SINGLES) for _ in range(rounds)]
    attach = here.by_names(_SINGLES)
    times = alternate(
        5 if quick else 15,
        {
            "kpmd": partial(here.kpmd.round, attach),
            "kernel": partial(here.addresses.round, _SINGLES),
        },
    )
    best = min(single, key=sum)
    middle, kernel = times["kpmd"], times["kernel"]
    ratio = sum(best) / sum(middle)
    rows = [
        Row(
            f"attach and detach {_SINGLES}",
            ms(sum(middle)),
            f"{ms(sum(best))} (C, one by one)",
            f"{ratio:.0f} times faster",
            "100 times faster",
            ratio >= 100,
        )
    ]
    for what, column in (("attach", 0), ("detach", 1)):
        rows.append(
            Row(
                f"{what} {_SINGLES}",
                ms(middle[column]),
                f"{ms(best[column])} (C, one by one)",
                f"{best[column] / middle[column]:.0f} times faster",
            )
        )
    rows.append(
        Row(
            f"what the kernel allows: C by address, attach and detach {_SINGLES}",
            ms(sum(kernel)),
            f"{ms(sum(best))} (C, one by one)",
            f"{sum(best) / sum(kernel):.0f} times faster",
        )
    )
    return rows
