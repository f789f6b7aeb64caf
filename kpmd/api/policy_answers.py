"""The shapes of answers that tell who may do what, and how much."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kpmd.api.fields import Answer
from kpmd.core.policy import Right


class OwnerAnswer(Answer):
    """A user. `user` is null where the uid has no name."""

    uid: int
    user: str | None


_Most = Annotated[int | None, Field(description="Null: as many as the machine can bear.")]


class LimitsAnswer(Answer):
    """The caller's limits. What is reached is told as `quota`, with how much is used."""

    body_bytes: int
    object_bytes: int
    targets_per_link: int
    page: int
    lease_seconds: Annotated[int, Field(description="The longest `ttl` of a lease.")]
    load_seconds: Annotated[float, Field(description="The longest time that a load may take.")]
    programs: _Most
    links: _Most
    targets: _Most
    map_bytes: _Most
    leases: _Most
    streams: _Most
    requests: Annotated[int | None, Field(description="Requests in flight. Null: no limit.")]
    connections: _Most


class FunctionsAnswer(Answer):
    """Which functions may be attached to: one of `allow`, and none of `deny` (globs)."""

    allow: list[str]
    deny: list[str]
    risky: Annotated[bool, Field(description="Those on the daemon's deny list, too, by name.")]


class ProgramsAllowedAnswer(Answer):
    """Which programs may be loaded."""

    any: bool
    builtin: bool
    sha256: Annotated[list[str], Field(description="Objects with these, in hex.")]
    keys: Annotated[list[str], Field(description="Objects that are signed with one of these.")]


class PolicyAnswer(Answer):
    """What the policy lets a user do. Administrators may do everything and have no rule."""

    administrator: bool
    rule: Annotated[str | None, Field(description="Null: none is about this user.")]
    calls: list[Right]
    functions: FunctionsAnswer
    programs: ProgramsAllowedAnswer
    helpers: Annotated[list[str] | None, Field(description="Null: all of them.")]
    probe_read_kernel: bool
    probe_read_user: bool
    kfuncs: Annotated[list[str] | None, Field(description="Null: all of them.")]
    map_types: Annotated[list[str] | None, Field(description="Null: all of them.")]
    read_others: bool


class UserPolicyAnswer(Answer):
    """What a user may do, how much, and how much of it is used."""

    user: OwnerAnswer
    groups: Annotated[list[int], Field(description="What the policy was asked with.")]
    policy: PolicyAnswer
    limits: LimitsAnswer
    usage: Annotated[dict[str, int], Field(description="By the names of the limits.")]


class RefusedFunctionAnswer(Answer):
    """A function that may not be attached to."""

    symbol: str
    module: str | None
    detail: str


class ExplainAnswer(Answer):
    """Whether a user may do something, by which rule, and what stands against it."""

    user: OwnerAnswer
    rule: Annotated[str, Field(description="`administrators`, a rule's name, or `no rule`.")]
    allowed: bool
    reasons: Annotated[list[str], Field(description="Why not; empty where it is allowed.")]
    functions: Annotated[int, Field(description="Functions that were asked for and may be.")]
    refused: Annotated[list[RefusedFunctionAnswer], Field(description="At most 100 of them.")]
    refused_total: int
    unmatched: Annotated[list[str], Field(description="Patterns that match no function.")]
