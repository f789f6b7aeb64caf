"""An OTLP collector on loopback: takes spans over HTTP, as OpenTelemetry's protocol says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class Span:
    """A span as it came; ids in hexadecimal, "" for no parent."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    begun: int
    ended: int
    failed: bool
    attributes: dict[str, str | int]
    #: Everything in it, to look for what must not be.
    raw: bytes


@dataclass
class Collector:
    """Answers with ``status``, or, while ``hangs``, not at all."""

    status: int = 200
    hangs: bool = False
    spans: list[Span] = field(default_factory=list)
    resource: dict[str, str | int] = field(default_factory=dict)
    #: Of the last request: its path, and its headers.
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Collector:
        self._gone = asyncio.Event()
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port: int = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._gone.set()
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str) -> list[Span]:
        """The spans of that name."""
        return [each for each in self.spans if each.name == name]

    def inside(self, parent: Span) -> list[Span]:
        """The spans in that one, in the order in which they began."""
        found = [each for each in self.spans if each.parent == parent.id]
        return sorted(found, key=lambda each: each.begun)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.path, self.headers = request.path, dict(request.headers)
        self.asked.set()
        if self.hangs:
            await self._gone.wait()
        if self.status != 200:
            return web.Response(status=self.status)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = _attributes(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += map(_span, scope.spans)
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )


def _span(sent: Any) -> Span:
    return Span(
        name=sent.name,
        kind=sent.kind,
        trace=sent.trace_id.hex(),
        id=sent.span_id.hex(),
        parent=sent.parent_span_id.hex(),
        begun=sent.start_time_unix_nano,
        ended=sent.end_time_unix_nano,
        failed=sent.status.code == 2,
        attributes=_attributes(sent.attributes),
        raw=sent.SerializeToString(),
    )


def _attributes(sent: Any) -> dict[str, str | int]:
    return {each.key: _value(each.value) for each in sent}


def _value(sent: AnyValue) -> str | int:
    return sent.string_value if sent.HasField("string_value") else sent.int_value
