"""Rates out of the entries of the builtin's map ``counts``, from one sample to the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

#: Rates of a function that are kept.
HISTORY = 60

#: Seconds without a sample after which the rates before them are no picture of the last minute.
_PAUSE = 10.0


@dataclass
class Flow:
    """The calls of one function, and how many there were in each second of late."""

    calls: int
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    @property
    def lately(self) -> float:
        """How busy it was, over all of the rates that are kept."""
        return sum(self.rates)


class Rates:
    """Calls per second of each function in one map, from one sample to the next."""

    def __init__(self) -> None:
        self.flows: dict[int, Flow] = {}
        self._at: float | None = None

    def sample(self, now: float, calls: dict[int, int]) -> None:
        """Take what has been counted until ``now``, in seconds, by the functions' addresses."""
        seconds = None if self._at is None else now - self._at
        self._at = now
        flows = {}
        for address, many in calls.items():
            flow = self.flows.get(address) or Flow(0 if seconds is not None else many)
            if seconds is None or seconds > _PAUSE:
                flow.rates.clear()
            elif seconds > 0:
                # Less than before: somebody has cleared the map.
                more = many - flow.calls if many >= flow.calls else many
                flow.rates.append(more / seconds)
            flow.calls = many
            flows[address] = flow
        self.flows = flows
