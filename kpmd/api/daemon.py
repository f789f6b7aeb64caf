"""Calls about the daemon itself."""

from __future__ import annotations

import sys
from collections.abc import Callable

from kpmd import API_VERSION, __version__, builtin
from kpmd.api.answers import (
    ApiAnswer,
    CapabilitiesAnswer,
    FeatureAnswer,
    HealthAnswer,
    KernelAnswer,
    VersionAnswer,
)
from kpmd.api.bodies import MAX_TTL, CapabilitiesQuery, UserQuery
from kpmd.api.policy import identify, policy_answer
from kpmd.api.policy_answers import LimitsAnswer, OwnerAnswer, UserPolicyAnswer
from kpmd.api.route import Call, Reply, Route
from kpmd.core.quotas import KEPT, Limits
from kpmd.core.times import rfc3339
from kpmd.errors import Forbidden
from kpmd.runtime.executor import Lane
from kpmd.runtime.features import Feature
from kpmd.runtime.policies import limits_of
from kpmd.runtime.quotas import OPEN
from kpmd.runtime.state import State

#: What goes beyond the contract's first version: clients can look before they ask for it.
EXTENSIONS = ("map-batches", "map-dump", "map-queues", "policy", "program-globals", "work")


class DaemonCalls:
    """Holds the answers that are made once."""

    def __init__(self, max_body: int, max_object: int) -> None:
        self._max_body = max_body
        self._max_object = max_object
        #: The bytes for each rule, as of these versions of the feature tests and of the policy.
        self._answers: dict[str, bytes] = {}
        self._versions = (-1, -1)
        self._version = VersionAnswer(version=__version__, api=API_VERSION)
        #: Makes the contract; that takes a while, and is done when it is first asked for.
        self.describe: Callable[[], bytes] = lambda: b"{}"
        self._openapi: bytes | None = None

    async def capabilities(self, call: Call) -> Reply:
        """Cached bytes, as long as every feature test has given a yes or no."""
        features, policies = call.state.features, call.state.policies
        query: CapabilitiesQuery = call.query
        caller = call.caller
        if query.refresh and not caller.admin:
            raise Forbidden(
                "only administrators may run the feature tests again", rule=caller.rule_name
            )
        versions = (features.version, policies.version)
        cached = self._answers.get(caller.rule_name)
        if not query.refresh and cached and self._versions == versions and features.settled:
            return Reply(cached)
        found = await features.all(refresh=query.refresh)
        answer = self._describe(call, found).model_dump_json().encode()
        # A policy that came into force meanwhile is not what this answer tells of.
        if policies.version == versions[1]:
            versions = (features.version, policies.version)
            if self._versions != versions:
                self._answers.clear()
                self._versions = versions
            self._answers[caller.rule_name] = answer
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
            api=ApiAnswer(version=API_VERSION, extensions=list(EXTENSIONS)),
            builtins=sorted(builtin.BUILTINS),
            limits=self.limits(call.state, call.caller.limits),
            policy=policy_answer(call.caller.admin, call.caller.rule),
            survives_restart=call.state.carrier.keeps,
        )

    def limits(self, state: State, limits: Limits) -> LimitsAnswer:
        """Limits as the API shows them."""
        return LimitsAnswer(
            body_bytes=min(self._max_body, limits.body_bytes),
            object_bytes=min(self._max_object, limits.object_bytes),
            targets_per_link=min(state.max_targets, limits.targets_per_link),
            page=1000,
            lease_seconds=MAX_TTL,
            load_seconds=min(state.load_seconds, limits.load_seconds),
            **{
                name: None if (most := getattr(limits, name)) == sys.maxsize else most
                for name in (*KEPT, *OPEN)
            },
        )

    async def healthz(self, call: Call) -> Reply:
        """The daemon's event loop is alive, or this would not come."""
        return Reply(
            HealthAnswer(
                status="stopping" if call.state.stopping else "ok",
                warnings=call.state.warnings() if call.caller.admin else [],
            )
        )

    async def policy(self, call: Call) -> Reply:
        """GET /policy"""
        query: UserQuery = call.query
        state = call.state
        who = await identify(call, query.user)
        admin, rule = state.policies.of(who.uid, who.groups)
        return Reply(
            UserPolicyAnswer(
                user=OwnerAnswer(uid=who.uid, user=who.name),
                groups=sorted(who.groups),
                policy=policy_answer(admin, rule),
                limits=self.limits(state, limits_of(admin, rule)),
                usage=state.usage(who.uid),
            )
        )

    async def version(self, call: Call) -> Reply:
        """Versions."""
        return Reply(self._version)

    async def openapi_json(self, call: Call) -> Reply:
        """The contract itself."""
        if self._openapi is None:
            self._openapi = await call.state.executor.run(self.describe, lane=Lane.PARSE)
        return Reply(self._openapi)

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
            Route(
                "GET",
                "/policy",
                self.policy,
                "What the policy lets a user do, and how much of it is used",
                UserPolicyAnswer,
                query=UserQuery,
                errors=("forbidden", "not-found"),
            ),
            Route("GET", "/healthz", self.healthz, "Whether the daemon answers", HealthAnswer),
            Route("GET", "/version", self.version, "Versions", VersionAnswer),
            Route("GET", "/openapi.json", self.openapi_json, "This contract", None),
        ]
