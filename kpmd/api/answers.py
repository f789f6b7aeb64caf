"""The shapes of answers; ``openapi.yaml`` is made from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kpmd.api.bodies import AttachName, KindName
from kpmd.api.fields import (
    Address,
    Answer,
    Cursor,
    Decimal,
    Time,
)
from kpmd.api.policy_answers import LimitsAnswer, OwnerAnswer, PolicyAnswer
from kpmd.core.model import Reason


class LifetimeAnswer(Answer):
    """When a thing ends by itself. `lease` is there with that kind."""

    kind: Literal["process", "connection", "lease", "persistent"]
    lease: str = ""


class ProgramAnswer(Answer):
    """A loaded program."""

    id: str
    kernel_id: int
    name: str
    tag: str
    attach: AttachName
    owner: OwnerAnswer
    client: str
    lifetime: LifetimeAnswer
    maps: list[str]
    links: Annotated[int, Field(description="How many links use it.")]
    labels: dict[str, str]
    created_at: Time
    verified_instructions: int
    jited_bytes: int
    verifier_log: str = Field(default="", description="Only where the request asked for it.")


class MapAnswer(Answer):
    """A map; it lives as long as the programs that use it."""

    id: str
    kernel_id: int
    name: str
    type: Annotated[str, Field(examples=["hash", "percpu_array"])]
    key_size: int
    value_size: int
    max_entries: int
    programs: list[str]


class LoadedAnswer(Answer):
    """What one load made."""

    programs: list[ProgramAnswer]
    maps: list[MapAnswer]


class LinkAnswer(Answer):
    """A link. While it is `detaching` the kernel still holds it; `reason` says why it ends."""

    id: str
    kernel_id: Annotated[
        int,
        Field(
            description="The first's, where the kernel has several links for it; 0 where it has "
            "none (kprobes one by one before 5.15)."
        ),
    ]
    program: str
    state: Literal["attached", "detaching"]
    reason: Annotated[Reason | None, Field(description="Only while it is detaching.")] = None
    kind: KindName
    mechanism: Literal["kprobe_multi", "perf_event"]
    count: Annotated[int, Field(description="Functions attached to, as the kernel tells it.")]
    missed: Annotated[
        int | None,
        Field(description="Calls the kernel could not run it for; null where it does not tell."),
    ]
    skipped: Annotated[int, Field(description="Asked for, but not attached to.")]
    owner: OwnerAnswer
    client: str
    lifetime: LifetimeAnswer
    labels: dict[str, str]
    created_at: Time


class TargetAnswer(Answer):
    """A function that a link is attached to; null is what kpmd cannot know."""

    symbol: str | None
    module: str | None
    address: Address | None
    cookie: Decimal


class SkippedAnswer(Answer):
    """What was asked for and is not attached to, and why."""

    symbol: str
    module: str | None
    reason: Literal["unknown", "untraceable", "blacklisted", "denied", "ambiguous", "forbidden"]
    detail: str


class RefusalAnswer(Answer):
    """The error that a request would get."""

    kind: str
    detail: str


class DryRunAnswer(Answer):
    """What a request would attach to and what not. `attachable`: whether it would succeed so."""

    dry_run: Literal[True]
    attachable: bool
    refusal: Annotated[RefusalAnswer | None, Field(description="Why it would not succeed.")]
    program: str
    kind: KindName
    mechanism: Literal["kprobe_multi", "perf_event"]
    count: int
    targets: list[TargetAnswer]
    skipped: list[SkippedAnswer]


class SymbolAnswer(Answer):
    """A traceable function. `address` is null where the kernel hides it."""

    symbol: str
    module: str | None
    address: Address | None
    ambiguous: Annotated[bool, Field(description="Whether several functions have this name.")]


class ClientAnswer(Answer):
    """A process that is connected, or that holds something."""

    id: str
    pid: int
    uid: int
    gid: int
    command: str
    since: Time
    links: int
    programs: int
    leases: int


class LeaseAnswer(Answer):
    """A lease, and how much is bound to it."""

    id: str
    ttl: int | float
    expires_at: Time
    owner: OwnerAnswer
    client: Annotated[str, Field(description="Which client made it; it may be gone.")]
    links: int
    programs: int
    labels: dict[str, str]
    created_at: Time


class EventAnswer(Answer):
    """Something that happened. A link that ends is `detaching` first."""

    seq: Annotated[str, Field(description="To resume behind it: `?since=`.")]
    time: Time
    what: Literal["program", "link", "client", "lease"]
    event: Literal["created", "detaching", "ended"]
    id: str
    uid: int
    reason: Annotated[Reason, Field(description="Why it ends.")] = "deleted"
    client: Annotated[str, Field(description="The client that made it.")] = ""
    program: Annotated[str, Field(description="A link's program.")] = ""
    kind: Annotated[KindName, Field(description="A link's kind.")] = "kprobe"
    count: Annotated[int, Field(description="How many functions a link is attached to.")] = 0
    name: Annotated[str, Field(description="A program's name.")] = ""
    pid: Annotated[int, Field(description="A client's process.")] = 0
    command: Annotated[str, Field(description="A client's command.")] = ""


class ProgramsPage(Answer):
    """A page of programs."""

    items: list[ProgramAnswer]
    next: Cursor


class MapsPage(Answer):
    """A page of maps."""

    items: list[MapAnswer]
    next: Cursor


class LinksPage(Answer):
    """A page of links."""

    items: list[LinkAnswer]
    next: Cursor


class TargetsPage(Answer):
    """A page of a link's targets, in the order of the request."""

    items: list[TargetAnswer]
    next: Cursor


class SkippedPage(Answer):
    """A page of what a link was asked for and is not attached to."""

    items: list[SkippedAnswer]
    next: Cursor


class SymbolsPage(Answer):
    """A page of traceable functions: the kernel's own by address, then those of modules."""

    items: list[SymbolAnswer]
    next: Cursor


class ClientsPage(Answer):
    """A page of clients."""

    items: list[ClientAnswer]
    next: Cursor


class LeasesPage(Answer):
    """A page of leases."""

    items: list[LeaseAnswer]
    next: Cursor


class KernelAnswer(Answer):
    """The running kernel."""

    release: str
    machine: str


class FeatureAnswer(Answer):
    """A feature test's answer. `supported` null: it told nothing, and is tried again next time."""

    supported: bool | None
    min_kernel: str
    reason: str | None
    checked_at: Time


class ApiAnswer(Answer):
    """The contract's version, and what was added to it since."""

    version: str
    extensions: list[str]


class CapabilitiesAnswer(Answer):
    """What this kernel and this kpmd can do for the caller."""

    kernel: KernelAnswer
    features: dict[str, FeatureAnswer]
    api: ApiAnswer
    builtins: list[str]
    limits: LimitsAnswer
    policy: PolicyAnswer
    survives_restart: Annotated[
        bool,
        Field(
            description="Whether persistent things, leases, and what belongs to a living process "
            "stay while the daemon is restarted: where systemd keeps its file descriptors."
        ),
    ]


class HealthAnswer(Answer):
    """The daemon answers."""

    status: Literal["ok", "stopping"]
    warnings: Annotated[
        list[str],
        Field(description="For administrators: what they have to look at; `[]` for others."),
    ]


class VersionAnswer(Answer):
    """Versions of the daemon and of the contract."""

    version: str
    api: str


class ErrorItem(Answer):
    """One thing that is wrong, and where."""

    loc: list[str | int]
    msg: str


class Problem(Answer):
    """RFC 9457. `kind` is the stable word to switch on."""

    type: str
    title: str
    status: int
    detail: str
    kind: str
    errno: str = ""
    errors: list[ErrorItem] = Field(default_factory=list)
    symbols: list[str] = Field(default_factory=list)
    symbols_total: int = 0
    addresses: list[Address] = Field(default_factory=list)
    addresses_total: int = 0
    verifier_log: str = ""
    verifier_log_truncated: bool = False
    needs: str = ""
    rule: str = Field(default="", description="The rule of the policy that does not allow it.")
    refused: list[str] = Field(default_factory=list)
    limit: str = ""
    used: int = 0
    most: int = 0
    asked: int = 0
    done: int = Field(default=0, description="Entries that were written or deleted before it.")
    request: str = ""
