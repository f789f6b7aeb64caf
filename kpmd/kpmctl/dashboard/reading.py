"""What the page shows of the daemon, read once: lists, rates and histograms, all bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kpmd.client.errors import ApiError
from kpmd.kpmctl import histogram
from kpmd.kpmctl.dashboard.figures import Flow, Rates
from kpmd.kpmctl.histogram import Histogram
from kpmd.kpmctl.tracing import total, u64

if TYPE_CHECKING:
    from kpmd.client import answers

T = TypeVar("T")

#: Rows of each table that are shown, and items of each list that are read for them.
ROWS, ITEMS = 200, 1000

#: Functions with rates, and functions with histograms, that are shown.
BUSIEST, HISTOGRAMS = 50, 12

#: Maps that are read, entries of all of them together, and functions of a link that are named.
MAPS, ENTRIES, NAMES = 20, 4096, 1 << 16

#: Names of the builtins' maps, and sizes of their keys and values, which no others may have.
_KNOWN = (("counts", (8, 8)), ("latencies", (8, histogram.SIZE)))

#: Functions that are named in a link's row.
_PREVIEW = 3


class Daemon(Protocol):
    """What is used of ``AsyncClient``: calls that change nothing."""

    async def capabilities(self) -> answers.Capabilities:
        """As that of the client; so are the others."""

    def links(self) -> AsyncIterator[answers.Link]: ...  # noqa: D102
    def clients(self) -> AsyncIterator[answers.ClientRecord]: ...  # noqa: D102
    def programs(self) -> AsyncIterator[answers.Program]: ...  # noqa: D102
    def leases(self) -> AsyncIterator[answers.Lease]: ...  # noqa: D102
    def maps(self) -> AsyncIterator[answers.Map]: ...  # noqa: D102
    def entries(self, map: str, /) -> AsyncIterator[answers.Entry]: ...  # noqa: A002, D102
    def targets(self, link: str, /) -> AsyncIterator[answers.Target]: ...  # noqa: D102
    def events(  # noqa: D102
        self, since: str | None = None, *, on_gap: Callable[[str], object] | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[answers.Event]]: ...


@dataclass
class _Watched:
    """What is remembered of a map: functions are still in it when their links have ended."""

    rates: Rates = field(default_factory=Rates)
    #: Links whose functions are in ``names``.
    links: set[str] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)


class Figures:
    """Rates and histograms of all maps; remembers what was counted the time before."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._watched: dict[str, _Watched] = {}

    async def take(
        self,
        now: Callable[[], float],
        maps: list[answers.Map],
        links: list[answers.Link],
        programs: list[answers.Program],
    ) -> dict[str, Any]:
        """What the maps have to tell. Raises ClientError; what concerns one map is a note."""
        known, self._watched = self._watched, {}
        notes, budget = set(), ENTRIES
        flows: list[tuple[Flow, dict[str, Any]]] = []
        histograms: list[tuple[Histogram, dict[str, Any]]] = []
        wanted = [each for each in maps if _is_known(each)]
        if len(wanted) > MAPS:
            notes.add(f"Only the first {MAPS} of {len(wanted)} maps are read.")
        for each in wanted[:MAPS]:
            watched = self._watched[each["id"]] = known.get(each["id"]) or _Watched()
            try:
                entries, more = await some(self._daemon.entries(each["id"]), budget)
                await self._name(watched, each, links)
            except ApiError as error:
                if error.kind not in ("not-found", "gone"):  # it may have just ended
                    notes.add(str(error))
                continue
            budget -= len(entries)
            if more:
                notes.add(f"Only the first {ENTRIES} functions that are in maps are read.")
            whose = next((one["owner"] for one in programs if one["id"] in each["programs"]), None)
            about = {"map": each["id"], "owner": whose}
            values = {u64(entry["key"]): entry["value"] for entry in entries}
            if each["name"] == "latencies":
                found = {address: histogram.parse(value) for address, value in values.items()}
                histograms += [
                    (times, about | _function(address, watched.names))
                    for address, times in found.items()
                    if times.calls
                ]
            else:
                counts = {address: total(value) for address, value in values.items()}
                watched.rates.sample(now(), counts)
                flows += [
                    (flow, about | _function(address, watched.names))
                    for address, flow in watched.rates.flows.items()
                    if flow.calls
                ]
        flows.sort(key=lambda each: (-each[0].lately, -each[0].calls, each[1]["address"]))
        histograms.sort(key=lambda each: (-each[0].total_ns, each[1]["address"]))
        return {
            "rates": _cut([about | _rates(flow) for flow, about in flows[:BUSIEST]], len(flows)),
            "histograms": _cut(
                [about | _histogram(each) for each, about in histograms[:HISTOGRAMS]],
                len(histograms),
            ),
            "notes": sorted(notes),
        }

    async def _name(self, watched: _Watched, map_: answers.Map, links: list[answers.Link]) -> None:
        """Name the functions of the links whose programs have this map. Raises ClientError."""
        for link in links:
            if link["program"] in map_["programs"] and link["id"] not in watched.links:
                targets, _ = await some(self._daemon.targets(link["id"]), NAMES)
                watched.links.add(link["id"])
                for each in targets:
                    if each["address"] is not None:
                        watched.names[int(each["address"], 16)] = _name(each)


class Reader:
    """Reads everything, again and again."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._who: answers.Capabilities | None = None
        #: The first functions of each link: they never change.
        self._first: dict[str, list[str]] = {}
        self._figures = Figures(daemon)

    def forget(self) -> None:
        """The daemon was away: the next one may be another, on another kernel."""
        self._who = None

    async def read(self, now: Callable[[], float]) -> dict[str, Any]:
        """What there is, for the page; ``now`` as ``time.monotonic``. Raises ClientError."""
        daemon = self._daemon
        if self._who is None:
            self._who = await daemon.capabilities()
        policy = self._who["policy"]
        links, more_links = await some(daemon.links(), ITEMS)
        programs, more_programs = await some(daemon.programs(), ITEMS)
        clients, more_clients = await some(daemon.clients(), ITEMS)
        leases, more_leases = await some(daemon.leases(), ITEMS)
        maps, _ = await some(daemon.maps(), ITEMS)
        figures = await self._figures.take(now, maps, links, programs)
        self._first = {each["id"]: await self._functions(each["id"]) for each in links[:ROWS]}
        rows = [{**each, "functions": self._first[each["id"]]} for each in links[:ROWS]]
        return figures | {
            "release": self._who["kernel"]["release"],
            "everyone": policy["administrator"] or policy["read_others"],
            "links": _cut(rows, len(links), more_links),
            "programs": _cut(programs[:ROWS], len(programs), more_programs),
            "clients": _cut(clients[:ROWS], len(clients), more_clients),
            "leases": _cut(leases[:ROWS], len(leases), more_leases),
        }

    async def _functions(self, link: str) -> list[str]:
        """The first few functions of a link. Raises ClientError."""
        if link not in self._first:
            try:
                targets, _ = await some(self._daemon.targets(link), _PREVIEW)
            except ApiError:
                return []  # it has just ended
            return [_name(each) for each in targets]
        return self._first[link]


async def some(items: AsyncIterator[T], most: int) -> tuple[list[T], bool]:
    """The first of these, and whether there are more."""
    found: list[T] = []
    async for each in items:
        if len(found) >= most:
            return found, True
        found.append(each)
    return found, False


def _is_known(map_: answers.Map) -> bool:
    """Whether it is such a map as the builtins ``count`` and ``latency`` have."""
    sizes = (map_["key_size"], map_["value_size"])
    return (map_["name"], sizes) in _KNOWN


def _name(target: answers.Target) -> str:
    name = target["symbol"] or target["address"] or "?"
    return f"{name} [{target['module']}]" if target["module"] else name


def _function(address: int, names: dict[int, str]) -> dict[str, str]:
    shown = f"0x{address:016x}"
    return {"address": shown, "function": names.get(address, shown)}


def _rates(flow: Flow) -> dict[str, Any]:
    return {"calls": flow.calls, "rates": [round(each, 2) for each in flow.rates]}


def _histogram(each: Histogram) -> dict[str, Any]:
    """A histogram without the empty buckets at its ends: ``first`` is the index of the first."""
    used = [index for index, many in enumerate(each.slots) if many]
    first, last = (used[0], used[-1]) if used else (0, -1)
    return {
        "calls": each.calls,
        "mean": each.mean_ns,
        "longest": each.max_ns,
        "half": each.quantile_ns(0.5),
        "most": each.quantile_ns(0.99),
        "first": first,
        "slots": list(each.slots[first : last + 1]),
    }


def _cut(rows: list[Any], all_: int, open_: bool = False) -> dict[str, Any]:
    """Rows, and how many ``more`` there are; ``open``: and even more than that."""
    return {"rows": rows, "more": all_ - len(rows), "open": open_}
