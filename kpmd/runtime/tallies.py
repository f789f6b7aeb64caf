"""What is counted as it happens: plain numbers, for whoever shows them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from kpmd.core.quotas import Limits
from kpmd.errors import BadObject, KpmdError

#: Bounds in seconds: of requests, from those whose answer is ready to loads at their limit; of what
#: the kernel takes its time for.
REQUEST = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
LONG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


#: What quotas are on; ``fd_store``: places in the service manager's.
LIMITS = (*Limits.__dataclass_fields__, "fd_store")

#: What loads mostly come to.
OUTCOMES = ("ok", "bad-object", "verifier-rejected", "crashed", "gave-up", "timed-out")


class Histogram:
    """How many observations were in each bucket, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        #: Up to each bound, and over the one before; the last ones are over all bounds.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """As of now."""
        made = Histogram(self.bounds)
        made.counts, made.sum = self.counts.copy(), self.sum
        return made


class RouteTally:
    """The requests to one route. Each request comes by here: it must take no time."""

    __slots__ = ("errors", "seconds", "successes")

    def __init__(self) -> None:
        #: By status.
        self.successes: dict[int, int] = {}
        #: By status and kind of error.
        self.errors: dict[tuple[int, str], int] = {}
        self.seconds = Histogram(REQUEST)

    def answered(self, seconds: float, status: int, error: KpmdError | None) -> None:
        """A request was answered."""
        if error is None:
            self.successes[status] = self.successes.get(status, 0) + 1
        else:
            key = status, error.kind
            self.errors[key] = self.errors.get(key, 0) + 1
        self.seconds.observe(seconds)


class RecordCounts:
    """What came out of buffers, in records and bytes, and what of it readers did not get."""

    def __init__(self) -> None:
        self.records = self.bytes = 0
        #: By reason. What a slow reader does not get counts for each such reader.
        self.lost: Counter[str] = Counter()
        #: Readers that were cut off.
        self.cut = 0

    def taken(self, records: int, length: int) -> None:
        """A batch was taken out of a buffer."""
        self.records += records
        self.bytes += length


class Tallies:
    """One daemon's counts since it started. For the event loop only.

    What they are counted by is bounded: by the routes, the kinds of errors, the policy's rules.
    """

    def __init__(self) -> None:
        #: By method and template.
        self.routes: defaultdict[tuple[str, str], RouteTally] = defaultdict(RouteTally)
        #: By rule, and by limit.
        self.forbidden: Counter[str] = Counter()
        self.quota: Counter[str] = Counter()
        #: Connections that were refused or cut, by kind of error.
        self.connections: Counter[str] = Counter()
        #: By what has ended or come, what of the two, and the reason.
        self.events: Counter[tuple[str, str, str]] = Counter()
        #: By outcome: "ok", how the loader's process ended, or the kind of error.
        self.loads: Counter[str] = Counter()
        self.load_seconds = Histogram(LONG)

    def refused(self, error: KpmdError, rule: str) -> None:
        """Something was refused; ``rule``: what the policy says of who asked."""
        if error.kind == "forbidden":
            self.forbidden[error.fields.get("rule") or rule] += 1
        elif error.kind == "quota":
            limit = error.fields.get("limit", "fd_store")
            self.quota[limit if limit in LIMITS else "other"] += 1

    @contextmanager
    def load(self) -> Iterator[None]:
        """Count a load, and what it takes with waiting for its turn, as the block ends."""
        begun = perf_counter()
        outcome = "cancelled"
        try:
            yield
            outcome = "ok"
        except KpmdError as error:
            outcome = (error.ended if isinstance(error, BadObject) else "") or error.kind
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self.loads[outcome] += 1
            self.load_seconds.observe(perf_counter() - begun)
