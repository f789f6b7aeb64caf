"""Calls about the daemon itself."""

from __future__ import annotations

from kpmd import API_VERSION, __version__, builtin
from kpmd.api.answers import (
    ApiAnswer,
    CapabilitiesAnswer,
    FeatureAnswer,
    HealthAnswer,
    KernelAnswer,
    LimitsAnswer,
    VersionAnswer,
)
from kpmd.api.bodies import MAX_TTL, CapabilitiesQuery
from kpmd.api.route import Call, Reply, Route
from kpmd.core.times import rfc3339
from kpmd.errors import Forbidden
from kpmd.runtime.features import Feature


class DaemonCalls:
    """Holds the answers that are made once."""

    def __init__(self, max_body: int, max_object: int) -> None:
        self._max_body = max_body
        self._max_object = max_object
        self._capabilities: tuple[int, bytes] | None = None
        self._version = VersionAnswer(version=__version__, api=API_VERSION)
        self.openapi = b"{}"

    async def capabilities(self, call: Call) -> Reply:
        """Cached bytes, as long as every feature test has given a yes or no."""
        features = call.state.features
        query: CapabilitiesQuery = call.query
        if query.refresh and not call.caller.admin:
            raise Forbidden("only administrators may run the feature tests again")
        cached = self._capabilities
        if not query.refresh and cached and cached[0] == features.version and features.settled:
            return Reply(cached[1])
        found = await features.all(refresh=query.refresh)
        answer = self._describe(call, found).model_dump_json().encode()
        self._capabilities = (features.version, answer)
        return Reply(answer)

    def _describe(self, call: Call, found: list[Feature]) -> CapabilitiesAnswer:
        kernel = call.state.kernel
        return CapabilitiesAnswer(
            kernel=KernelAnswer(release=kernel.release, machine=kernel.machine),
            features={
                each.name: FeatureAnswer(
                    supported=each.supported,
                    min_kernel=each.min_kernel,
                    reason=each.reason,
                    checked_at=rfc3339(each.checked_at),
                )
                for each in found
            },
            api=ApiAnswer(version=API_VERSION, extensions=[]),
            builtins=sorted(builtin.BUILTINS),
            limits=LimitsAnswer(
                body_bytes=self._max_body,
                object_bytes=self._max_object,
                targets_per_link=call.state.max_targets,
                page=1000,
                lease_seconds=MAX_TTL,
            ),
            survives_restart=call.state.carrier.keeps,
        )

    async def healthz(self, call: Call) -> Reply:
        """The daemon's event loop is alive, or this would not come."""
        return Reply(HealthAnswer(status="stopping" if call.state.stopping else "ok"))

    async def version(self, call: Call) -> Reply:
        """Versions."""
        return Reply(self._version)

    async def openapi_json(self, call: Call) -> Reply:
        """The contract itself."""
        return Reply(self.openapi)

    def routes(self) -> list[Route]:
        """The calls about the daemon."""
        return [
            Route(
                "GET",
                "/capabilities",
                self.capabilities,
                "What this kernel and this kpmd can do for the caller",
                CapabilitiesAnswer,
                query=CapabilitiesQuery,
                errors=("forbidden",),
            ),
            Route("GET", "/healthz", self.healthz, "Whether the daemon answers", HealthAnswer),
            Route("GET", "/version", self.version, "Versions", VersionAnswer),
            Route("GET", "/openapi.json", self.openapi_json, "This contract", None),
        ]
