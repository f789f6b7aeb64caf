"""A request from its head to its answer, for what counts and traces requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from aiohttp import web

from kpmd.api.route import Route
from kpmd.core.model import Caller
from kpmd.errors import KpmdError
from kpmd.runtime.tallies import RouteTally

if TYPE_CHECKING:  # where requests are traced it is imported, and only there
    from kpmd.api.tracing import RequestTrace


@dataclass(slots=True)
class Exchange:
    """One request, and what has come of it so far.

    ``route`` is None until one is found; ``tally`` counts what has none until then.
    """

    request: web.BaseRequest
    tally: RouteTally
    route: Route | None = None
    caller: Caller | None = None
    status: int = 0
    error: KpmdError | None = None
    begun: float = field(default_factory=perf_counter)
    trace: RequestTrace | None = None

    def finished(self) -> None:
        """Its answer is ready, or the stream that is its answer begins."""
        self.tally.answered(perf_counter() - self.begun, self.status, self.error)
        if self.trace is not None:
            self.trace.end(self)
