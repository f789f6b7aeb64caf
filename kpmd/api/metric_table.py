"""Every number that ``GET /metrics`` tells: its name, what it means, and where it is read.

Reading takes no system call, and copies: it is done on the event loop, all else is not. Labels are
bounded: templates of routes, words of the code, names out of the policy; never what a client says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from kpmd import API_VERSION, __version__
from kpmd.core.model import LinkKind, Mechanism
from kpmd.core.policy import NO_RULE
from kpmd.runtime.buffers import NO_ROOM, TOO_LARGE
from kpmd.runtime.executor import Lane, Use
from kpmd.runtime.records import SLOW
from kpmd.runtime.state import State
from kpmd.runtime.tallies import LIMITS, OUTCOMES, Histogram

Value = float | Histogram

_KINDS = tuple(
    (kind, mechanism)
    for kind in get_args(LinkKind)
    for mechanism in get_args(Mechanism)
    if (kind, mechanism) != ("session", "perf_event")
)

#: A number for each set of labels.
Values = Mapping[tuple[str, ...], Value]

#: Kinds of errors that connections are refused or cut with.
_CUT = ("kernel", "malformed", "quota", "timeout")


@dataclass(frozen=True)
class Metric:
    """A metric, with its labels in the order of the keys that ``read`` gives."""

    kind: Literal["counter", "gauge", "histogram", "info"]
    name: str
    help: str
    read: Callable[[State], Values]
    labels: tuple[str, ...] = ()


def snapshot(state: State) -> list[tuple[Metric, Values]]:
    """All of them as of now; for the event loop."""
    return [(each, each.read(state)) for each in METRICS]


def _one(read: Callable[[State], Value]) -> Callable[[State], Values]:
    return lambda state: {(): read(state)}


def _by_word(
    read: Callable[[State], Mapping[str, float]], known: Iterable[str] = ()
) -> Callable[[State], Values]:
    """``known``: those that are told as 0 until they are counted, so that the first one is seen."""
    zeros = dict.fromkeys(known, 0.0)
    return lambda state: {(word,): number for word, number in {**zeros, **read(state)}.items()}


def _by_kind(read: Callable[[State], Mapping[tuple[str, str], float]]) -> Callable[[State], Values]:
    """By kind and mechanism of links."""
    zeros = dict.fromkeys(_KINDS, 0.0)
    return lambda state: dict({**zeros, **read(state)}.items())


def _events(state: State) -> Values:
    return dict(state.tallies.events.items())


def _forbidden(state: State) -> Values:
    rules = (NO_RULE, *(rule.name for rule in state.policies.current.rules))
    return {(rule,): state.tallies.forbidden[rule] for rule in {*rules, *state.tallies.forbidden}}


def _requests(state: State) -> Values:
    found: dict[tuple[str, ...], float] = {}
    for route, tally in state.tallies.routes.items():
        for status, number in tally.successes.items():
            found[*route, str(status), ""] = number
        for (status, kind), number in tally.errors.items():
            found[*route, str(status), kind] = number
    return found


def _bugs(state: State) -> float:
    routes = state.tallies.routes.values()
    return sum(tally.errors.get((500, "internal"), 0) for tally in routes)


def _request_seconds(state: State) -> Values:
    routes = state.tallies.routes.items()
    return {
        route: tally.seconds.copy() for route, tally in routes if tally.successes or tally.errors
    }


def _lanes(read: Callable[[Use], int]) -> Callable[[State], Values]:
    return lambda state: {(_lane(lane),): read(use) for lane, use in state.executor.use().items()}


def _lane(lane: Lane) -> str:
    return lane.name.lower()


def _features(state: State) -> Values:
    known = state.features.known()
    return {(each.name,): float(each.supported) for each in known if each.supported is not None}


def _oldest(state: State) -> float:
    since = state.closing.oldest
    return 0.0 if since is None else max(0.0, state.now() - since)


def _build(state: State) -> Values:
    return {(__version__, API_VERSION, state.kernel.release, state.kernel.machine): 1}


def _gauge(name: str, told: str, read: Callable[[State], float]) -> Metric:
    return Metric("gauge", name, told, _one(read))


def _counter(name: str, told: str, read: Callable[[State], float]) -> Metric:
    return Metric("counter", name, told, _one(read))


METRICS: tuple[Metric, ...] = (
    Metric(
        "info",
        "kpmd_build",
        "The daemon's version, that of its API, and the kernel it runs on.",
        _build,
        ("version", "api", "kernel", "machine"),
    ),
    # Requests
    Metric(
        "counter",
        "kpmd_http_requests",
        "Requests answered, by route, status and kind of error; streams count when they begin.",
        _requests,
        ("method", "route", "code", "kind"),
    ),
    Metric(
        "histogram",
        "kpmd_http_request_duration_seconds",
        "Time from a request's head until its answer was ready; of streams until they began.",
        _request_seconds,
        ("method", "route"),
    ),
    _counter(
        "kpmd_internal_errors", "Requests answered with an internal error: each is a bug.", _bugs
    ),
    _gauge(
        "kpmd_http_requests_in_flight",
        "Requests that are being answered.",
        lambda state: state.counters.total("requests"),
    ),
    _gauge(
        "kpmd_http_streams",
        "Answers that are streams, being sent.",
        lambda state: state.counters.total("streams"),
    ),
    _gauge(
        "kpmd_http_connections",
        "Open connections.",
        lambda state: state.counters.total("connections"),
    ),
    Metric(
        "counter",
        "kpmd_http_connections_refused",
        "Connections refused, or cut because what came could not be read, by kind of error.",
        _by_word(lambda state: state.tallies.connections, _CUT),
        ("kind",),
    ),
    # Refusals
    Metric(
        "counter",
        "kpmd_forbidden",
        "Requests that the policy refused, by its rule.",
        _forbidden,
        ("rule",),
    ),
    Metric(
        "counter",
        "kpmd_quota_refusals",
        "Requests and connections refused because a limit was reached, by limit.",
        _by_word(lambda state: state.tallies.quota, LIMITS),
        ("limit",),
    ),
    Metric(
        "gauge",
        "kpmd_quota_used_ratio",
        "What part of a limit the user has used who has used most of theirs, from 0 to 1.",
        _by_word(lambda state: state.registry.accounts.fullest()),
        ("limit",),
    ),
    # What there is
    Metric(
        "gauge",
        "kpmd_links",
        "Links, those included that are being detached.",
        _by_kind(lambda state: state.registry.links_of),
        ("kind", "mechanism"),
    ),
    Metric(
        "gauge",
        "kpmd_link_targets",
        "Functions that links are attached to, each as often as links are.",
        _by_kind(lambda state: state.registry.targets_of),
        ("kind", "mechanism"),
    ),
    Metric(
        "counter",
        "kpmd_link_missed_calls",
        "Calls that links have missed, where the kernel tells it (from 6.7 on); up to 256 links "
        "are asked for each scrape, in turns, and what a link missed since then ends with it.",
        _by_kind(lambda state: state.missed.total),
        ("kind", "mechanism"),
    ),
    _gauge("kpmd_programs", "Programs.", lambda state: len(state.registry.programs)),
    _gauge("kpmd_maps", "Maps.", lambda state: len(state.registry.maps)),
    _gauge(
        "kpmd_maps_lent",
        "Maps that have ended here, and that clients still have a file descriptor of.",
        lambda state: len(state.registry.lent),
    ),
    _gauge("kpmd_clients", "Clients.", lambda state: len(state.registry.clients)),
    _gauge("kpmd_leases", "Leases.", lambda state: len(state.registry.leases.shelf)),
    Metric(
        "counter",
        "kpmd_events",
        "What has happened to programs, links, clients and leases, and why.",
        _events,
        ("what", "event", "reason"),
    ),
    # Loading, detaching, the pools
    Metric(
        "counter",
        "kpmd_loads",
        "Loads by outcome: ok, crashed, gave-up or timed-out where the process that read the "
        "object ended so, cancelled, or the kind of error.",
        _by_word(lambda state: state.tallies.loads, OUTCOMES),
        ("outcome",),
    ),
    Metric(
        "histogram",
        "kpmd_load_duration_seconds",
        "What a load took, with waiting for its turn.",
        _one(lambda state: state.tallies.load_seconds.copy()),
    ),
    Metric(
        "histogram",
        "kpmd_detach_duration_seconds",
        "What the kernel took to detach a link.",
        _one(lambda state: state.closing.seconds.copy()),
    ),
    _gauge(
        "kpmd_detach_waiting",
        "Links that have ended and are still attached.",
        lambda state: state.closing.waiting,
    ),
    _gauge(
        "kpmd_detach_oldest_seconds", "For how long the first of them has been waiting.", _oldest
    ),
    Metric(
        "gauge",
        "kpmd_pool_threads",
        "Threads for blocking work, by lane.",
        _lanes(lambda use: use.threads),
        ("lane",),
    ),
    Metric(
        "gauge",
        "kpmd_pool_busy_threads",
        "Threads that are at work, by lane.",
        _lanes(lambda use: use.busy),
        ("lane",),
    ),
    Metric(
        "gauge",
        "kpmd_pool_waiting",
        "Pieces of work that wait for a thread, by lane.",
        _lanes(lambda use: use.waiting),
        ("lane",),
    ),
    # Streams
    _gauge(
        "kpmd_record_readers",
        "Streams of records that are being read.",
        lambda state: state.records.readers,
    ),
    _counter(
        "kpmd_records",
        "Records taken out of maps' buffers.",
        lambda state: state.records.counts.records,
    ),
    _counter(
        "kpmd_record_bytes",
        "Bytes of maps' buffers that records were taken out of.",
        lambda state: state.records.counts.bytes,
    ),
    Metric(
        "counter",
        "kpmd_records_lost",
        "Records that readers did not get, by reason; reader-too-slow counts for each reader.",
        _by_word(lambda state: state.records.counts.lost, (NO_ROOM, TOO_LARGE, SLOW)),
        ("reason",),
    ),
    _counter(
        "kpmd_record_readers_cut",
        "Readers of records that were cut off.",
        lambda state: state.records.counts.cut,
    ),
    _gauge("kpmd_event_listeners", "Listeners to events.", lambda state: state.journal.listeners),
    _counter(
        "kpmd_event_listeners_cut",
        "Listeners to events that were cut off because they were too far behind.",
        lambda state: state.journal.cut,
    ),
    # The machine, and what the daemon knows of it
    _gauge(
        "kpmd_symbol_index_functions",
        "Functions in the symbol index; 0 before it was built.",
        lambda state: state.symbols.functions,
    ),
    _counter(
        "kpmd_symbol_index_builds",
        "How often the symbol index was built: once, and when modules have come or gone.",
        lambda state: state.symbols.builds,
    ),
    _gauge(
        "kpmd_symbol_index_build_duration_seconds",
        "What building the symbol index took the last time.",
        lambda state: state.symbols.build_seconds,
    ),
    _gauge(
        "kpmd_symbol_index_built_timestamp_seconds",
        "When the symbol index was built, in seconds since the epoch; 0 before that.",
        lambda state: state.symbols.built_at,
    ),
    Metric(
        "gauge",
        "kpmd_feature_supported",
        "Whether the kernel has a feature, as its test found; without one that could not tell.",
        _features,
        ("feature",),
    ),
    _gauge(
        "kpmd_policy_rules",
        "Rules of the policy in force.",
        lambda state: len(state.policies.current.rules),
    ),
    _gauge(
        "kpmd_policy_last_reload_successful",
        "Whether the policy that was read last is in force: 1, or 0 where it was bad.",
        lambda state: float(state.policies.fault is None),
    ),
    _gauge(
        "kpmd_policy_in_force_timestamp_seconds",
        "Since when the policy is in force, in seconds since the epoch.",
        lambda state: state.policies.since,
    ),
    _counter(
        "kpmd_audit_records_lost",
        "Audit records that could not be written.",
        lambda state: state.audit.lost,
    ),
    _gauge(
        "kpmd_audit_failing",
        "Whether a destination of the audit trail cannot be written to now.",
        lambda state: float(state.audit.failing is not None),
    ),
    _gauge(
        "kpmd_fd_store_used",
        "Places taken in the service manager's FD store.",
        lambda state: state.carrier.places[0],
    ),
    _gauge(
        "kpmd_fd_store_capacity",
        "Places in the service manager's FD store; 0: nothing outlives the daemon.",
        lambda state: state.carrier.places[1],
    ),
)
