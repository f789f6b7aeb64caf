"""How long calls take, by the builtin ``latency``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpmd.kpmctl.histogram import Histogram, parse, together
from kpmd.kpmctl.tracing import Tracing, u64

if TYPE_CHECKING:
    from kpmd.client.client import Client
    from kpmd.kpmctl.filters import Wanted

#: Functions that the map has room for at first.
_ROOM = 1024


@dataclass(frozen=True)
class FunctionTimes:
    """How long a function's calls took."""

    name: str
    module: str | None
    address: int
    times: Histogram


@dataclass(frozen=True)
class LatencyReport:
    """What there is until one moment: first the functions that took most time together.

    ``missed`` are calls that the kernel could not run the programs for (None: it does not tell);
    ``lost`` is what the builtin tells of calls that are not in here.
    """

    attached: int
    attach_seconds: float
    elapsed: float
    missed: int | None
    lost: Mapping[str, int]
    functions: list[FunctionTimes] = field(default_factory=list)

    @property
    def together(self) -> Histogram:
        """The calls of all functions."""
        return together(each.times for each in self.functions)


class Latencies:
    """The builtin ``latency``, attached for as long as this process lives.

    ``start``, then ``report`` at any time; ``end`` detaches, ``close`` gives everything back.
    """

    def __init__(self, client: Client) -> None:
        self.tracing = Tracing(client, "latency")

    def start(self, wanted: Wanted) -> None:
        """Load and attach. Raises ClientError."""
        self.tracing.start(wanted, room=("latencies", _ROOM))

    def report(self) -> LatencyReport:
        """What there is now. Raises ClientError."""
        entries = list(self.tracing.client.entries(self.tracing.map("latencies")))
        elapsed = time.monotonic() - self.tracing.began
        functions = []
        for entry in entries:
            address, times = u64(entry["key"]), parse(entry["value"])
            # An entry is made before its first call is in it.
            if times.calls:
                functions.append(FunctionTimes(*self.tracing.name(address), address, times))
        functions.sort(key=lambda each: (-each.times.total_ns, each.name, each.address))
        return LatencyReport(
            self.tracing.attached,
            self.tracing.attach_seconds,
            elapsed,
            self.tracing.missed(),
            self.tracing.lost(),
            functions,
        )

    def end(self) -> None:
        """Detach; what was found can still be reported. Raises ClientError."""
        self.tracing.end()

    def close(self) -> None:
        """Give everything back."""
        self.tracing.close()
