"""Metrics as Prometheus and OpenMetrics write them.

The only module that imports the Prometheus client library, and imported by the first scrape: a
daemon that nobody scrapes does without the library's megabyte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from kpmd.api.metric_table import Metric, Values
from kpmd.runtime.tallies import Histogram

#: Content types, by whether OpenMetrics is wanted.
CONTENT_TYPES: Final = {False: CONTENT_TYPE_PLAIN_0_0_4, True: CONTENT_TYPE_LATEST}


class _Snapshot(Collector):
    """What was read, for the library."""

    def __init__(self, content: Sequence[tuple[Metric, Values]]) -> None:
        self._content = content

    def collect(self) -> Iterator[Family]:
        """A family for each metric."""
        for metric, values in self._content:
            yield _family(metric, values)


def text(content: Sequence[tuple[Metric, Values]], *, openmetrics: bool) -> bytes:
    """Metrics as text, with those of this process (``kpmd_process_…``). Blocks on /proc.

    The prefix: a textfile of node_exporter's must have none of the names that it uses itself.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(content))
    ProcessCollector("kpmd", registry=registry)
    if openmetrics:
        made: bytes = generate_openmetrics(registry)  # type: ignore[no-untyped-call]
        return made
    return generate_latest(registry)


def _family(metric: Metric, values: Values) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, value in values.items():
            if isinstance(value, Histogram):
                histogram.add_metric(labels, list(_buckets(value)), value.sum)
        return histogram
    if metric.kind == "info":
        info = InfoMetricFamily(metric.name, metric.help)
        for labels in values:
            info.add_metric((), dict(zip(metric.labels, labels, strict=True)))
        return info
    made = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = made(metric.name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        if not isinstance(value, Histogram):
            family.add_metric(labels, value)
    return family


def _buckets(histogram: Histogram) -> Iterable[tuple[str, float]]:
    below = 0
    for bound, number in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        below += number
        yield (f"{bound:g}" if bound != float("inf") else "+Inf"), below
