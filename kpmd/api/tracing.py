"""Traces of requests by OpenTelemetry's SDK, where the configuration asks for them.

A request is one span, by the template of its route; its phases (``kpmd.runtime.spans``) are spans
in that one. They leave the daemon in a thread of the SDK's, in batches, and never hold up a
request: where they do not leave quickly enough they are lost, counted and told. Nothing else of
kpmd imports opentelemetry, and nothing imports this module at the top: it costs memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from http import HTTPMethod

from multidict import MultiMapping
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
)
from opentelemetry.sdk.resources import HOST_NAME, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from kpmd import __version__
from kpmd.api.exchange import Exchange
from kpmd.config import Tracing
from kpmd.errors import KpmdError
from kpmd.log import Log
from kpmd.runtime import spans

log = Log("kpmd.tracing")

#: Seconds between two lines of the log about the same trouble.
_SELDOM = 10.0

#: Nanoseconds: who has waited less for a thread has not waited.
_WORTH_TELLING = 1_000_000

_METHODS = frozenset(HTTPMethod)
_NOBODY = Context()
_PARENT = "traceparent"
_UNTRACED = nullcontext()


class _Seldom:
    """Lets something through once in a while, and counts what it does not."""

    def __init__(self) -> None:
        self._after = 0.0
        self.held = 0

    def lets_through(self) -> bool:
        """Whether it is time again; if not, it is counted."""
        now = time.monotonic()
        if now < self._after:
            self.held += 1
            return False
        self._after = now + _SELDOM
        return True


class _Words(logging.Handler):
    """The SDK's own lines among kpmd's, seldom: each failed export makes one, or a header can."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seldom = _Seldom()

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, or count it."""
        if self._seldom.lets_through():
            held, self._seldom.held = self._seldom.held, 0
            log.warning("OpenTelemetry", detail=record.getMessage(), left_out=held)


class _Waiting:
    """How many spans wait until they are exported, and how many were lost. For any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._seldom = _Seldom()
        self._number = 0
        self._told = 0
        self.lost = 0

    def come(self) -> bool:
        """Whether there is room for one more; if not, it is lost."""
        with self._lock:
            room = self._number < self._most
            if room:
                self._number += 1
            else:
                self.lost += 1
        if not room:
            self._tell()
        return room

    def gone(self, number: int, *, lost: bool) -> None:
        """So many have arrived, or never will."""
        with self._lock:
            number = min(number, self._number)  # none after the end
            self._number -= number
            if lost:
                self.lost += number
        if lost:
            self._tell()

    def end(self) -> None:
        """What waits now is lost."""
        self.gone(self._most, lost=True)
        self._tell(now=True)

    def _tell(self, *, now: bool = False) -> None:
        with self._lock:
            number = self.lost - self._told
            if not number or not (now or self._seldom.lets_through()):
                return
            self._told = self.lost
        log.warning("spans lost", number=number, total=self.lost)


class _Batches(BatchSpanProcessor):
    """The SDK's, which is given no more than it has room for: what it drops it does not count."""

    def __init__(self, exporter: SpanExporter, waiting: _Waiting, most: int, batch: int) -> None:
        super().__init__(exporter, max_queue_size=most, max_export_batch_size=batch)
        self._waiting = waiting

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span, where there is room."""
        if self._waiting.come():
            super().on_end(span)


class _Exporter(OTLPSpanExporter):
    """The SDK's, of which the failures count."""

    def __init__(self, waiting: _Waiting, endpoint: str | None, timeout: float | None) -> None:
        super().__init__(endpoint=endpoint, timeout=timeout)
        self._waiting = waiting

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; blocks for up to the timeout."""
        result = SpanExportResult.FAILURE
        try:
            result = super().export(spans)
        finally:
            self._waiting.gone(len(spans), lost=result is not SpanExportResult.SUCCESS)
        return result


class _AsIfAlone(Sampler):
    """Decides on a request with a client's trace as on one without.

    The SDK's choice by ratio goes by the trace's id, which is the client's here: with one of its
    choice it would be traced each time.
    """

    def __init__(self, root: Sampler) -> None:
        self._root = root

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        *_more: object,
        **_others: object,
    ) -> SamplingResult:
        """As the sampler for requests without a parent does, by an id that chance makes."""
        return self._root.should_sample(None, random.getrandbits(128), name, kind, attributes)

    def get_description(self) -> str:
        """As the SDK asks."""
        return f"AsIfAlone{{{self._root.get_description()}}}"


class RequestTrace:
    """A request that is traced, from ``Traces.begin`` to ``end``."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._inside = set_span_in_context(span, _NOBODY)
        self._ended = False

    def phase(self, name: str) -> AbstractContextManager[object]:
        """See ``kpmd.runtime.spans.Trace``."""
        return _UNTRACED if self._ended else self._phase(name)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        span = self._tracer.start_span(name, self._inside)
        try:
            yield
        except BaseException as error:
            # Not its message, which can name functions.
            kind = error.kind if isinstance(error, KpmdError) else type(error).__name__
            span.set_attribute("error.type", kind)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def waited(self, lane: str, since: int) -> None:
        """See ``kpmd.runtime.spans.Trace``."""
        now = time.time_ns()
        if not self._ended and now - since >= _WORTH_TELLING:
            span = self._tracer.start_span("wait", self._inside, start_time=since)
            span.set_attribute("kpmd.pool.lane", lane)
            span.end(now)

    def end(self, exchange: Exchange) -> None:
        """Its answer is ready. Paths, queries and bodies stay here: they name what is traced."""
        if self._ended:
            return
        self._ended = True
        known = exchange.request.method in _METHODS
        name = exchange.request.method if known else "HTTP"
        about: dict[str, str | int] = {
            "http.request.method": name if known else "_OTHER",
            "http.response.status_code": exchange.status,
        }
        if exchange.route is not None:
            about["http.route"] = exchange.route.path
            name = f"{name} {exchange.route.path}"
        if exchange.caller is not None:
            about["kpmd.peer.uid"] = exchange.caller.uid
        if exchange.error is not None:
            about["error.type"] = exchange.error.kind
        if exchange.status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.update_name(name)
        self._span.set_attributes(about)
        self._span.end()


class Traces:
    """Decides which requests are traced, and sends off what they tell."""

    def __init__(self, settings: Tracing) -> None:
        """Starts the thread that exports. Raises ValueError, RuntimeError, OSError."""
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = [_Words()], False
        most = settings.queue_spans or _number(OTEL_BSP_MAX_QUEUE_SIZE, 2048)
        # While one batch is on its way there is room for another.
        batch = max(1, min(most // 2, _number(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, 512)))
        self._waiting = _Waiting(most)
        self._exporter = _Exporter(self._waiting, _endpoint(settings), settings.timeout_seconds)
        ratio = settings.sample_ratio
        self._provider = TracerProvider(
            sampler=None if ratio is None else TraceIdRatioBased(ratio),
            resource=_resource(settings),
            shutdown_on_exit=False,
        )
        root = self._provider.sampler  # where the file is silent, the environment's
        self._provider.sampler = ParentBased(root, remote_parent_sampled=_AsIfAlone(root))
        self._provider.add_span_processor(_Batches(self._exporter, self._waiting, most, batch))
        self._tracer = self._provider.get_tracer("kpmd", __version__)
        self._honour = settings.parent == "honour"
        self._propagator = TraceContextTextMapPropagator()

    @property
    def lost(self) -> int:
        """How many spans did not get to where they should go."""
        return self._waiting.lost

    def begin(self, headers: MultiMapping[str], request_id: str) -> RequestTrace | None:
        """Trace a request in this task, until the next one begins; None: not this one."""
        parent = self._parent(headers) if self._honour else _NOBODY
        about = {"kpmd.request.id": request_id, "network.transport": "unix"}
        span = self._tracer.start_span("HTTP", parent, SpanKind.SERVER, about)
        trace = RequestTrace(self._tracer, span) if span.is_recording() else None
        spans.current.set(trace)
        return trace

    def _parent(self, headers: MultiMapping[str]) -> Context:
        """The client's trace, where it names one and no more, as the standard says.

        Its ``tracestate`` is not looked at: it would be text of the client's in each span.
        """
        given = headers.getall(_PARENT, [])
        if len(given) != 1:
            return _NOBODY
        return self._propagator.extract({_PARENT: given[0]}, _NOBODY)

    async def close(self, seconds: float) -> None:
        """Send off what waits, for so many seconds at the most; the rest is lost, and told."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop may have ended long before
                loop.call_soon_threadsafe(ended.set)

        # Not of a pool, which would be waited for at the end of the process.
        threading.Thread(target=shut_down, name="kpmd-tracing", daemon=True).start()
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            # Which ends its waiting for another try.
            self._exporter.shutdown()  # type: ignore[no-untyped-call]
        self._waiting.end()


def _number(variable: str, default: int) -> int:
    """A positive number of the environment. Raises ValueError."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{variable} must be a positive number, not {text!r}")
    return int(text)


def _endpoint(settings: Tracing) -> str | None:
    """The URL to post to; without a path in it, the path that the standard gives."""
    url = settings.endpoint
    if url is None:
        return None
    bare = url.path in (None, "/") and url.query is None
    return str(url).rstrip("/") + "/v1/traces" if bare else str(url)


def _resource(settings: Tracing) -> Resource:
    """What the spans are of: the file's word, the environment's, and kpmd on this machine."""
    own = Resource({SERVICE_VERSION: __version__, HOST_NAME: os.uname().nodename})
    made = own.merge(Resource.create(dict(settings.resource)))
    name = settings.service_name
    if name is None and str(made.attributes[SERVICE_NAME]).startswith("unknown_service"):
        name = "kpmd"
    return made if name is None else made.merge(Resource({SERVICE_NAME: name}))
