"""GET /metrics: the daemon's numbers, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kpmd.api.metric_table import Metric, Values, snapshot
from kpmd.api.route import Call, Reply, Route
from kpmd.runtime.executor import Lane

#: Seconds for which an answer serves whoever asks: what scrapes cost is bounded, however many come.
FRESH = 1.0

_OPENMETRICS = "application/openmetrics-text"


class Metrics:
    """Holds the last answer in each of the two formats."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        #: By whether it is OpenMetrics: when it was made, and what it is.
        self._answers: dict[bool, tuple[float, Reply]] = {}

    async def metrics(self, call: Call) -> Reply:
        """GET /metrics"""
        openmetrics = _OPENMETRICS in call.headers.get("Accept", "")
        loop = asyncio.get_running_loop()
        async with self._lock:
            made_at, reply = self._answers.get(openmetrics, (-FRESH, None))
            if reply is None or loop.time() - made_at >= FRESH:
                state = call.state
                await state.missed.refresh()
                content = snapshot(state)
                body, kind = await state.executor.run(_text, content, openmetrics, lane=Lane.PARSE)
                reply = Reply(body, headers={"Content-Type": kind})
                self._answers[openmetrics] = loop.time(), reply
        return reply

    def routes(self) -> list[Route]:
        """The call."""
        return [
            Route(
                "GET",
                "/metrics",
                self.metrics,
                "The daemon's numbers, in Prometheus' text format or in OpenMetrics",
                None,
                text=("text/plain", _OPENMETRICS),
                right="metrics",
            )
        ]


def _text(content: Sequence[tuple[Metric, Values]], openmetrics: bool) -> tuple[bytes, str]:
    # Only now, and in the pool: few daemons are scraped.
    from kpmd.api import exposition

    return (
        exposition.text(content, openmetrics=openmetrics),
        exposition.CONTENT_TYPES[openmetrics],
    )
