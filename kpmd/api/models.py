"""The shapes of requests and answers; ``openapi.yaml`` is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kpmd.api.fields import (
    U64,
    Address,
    Answer,
    Base64,
    Cursor,
    Decimal,
    Hex,
    Labels,
    Model,
    NumberOrBytes,
    Time,
)
from kpmd.core.model import Reason

AttachName = Literal["kprobe_multi", "kprobe_session"]
KindName = Literal["kprobe", "kretprobe", "session"]

# Requests


class ProcessLifetime(Model):
    """Ends when the client process ends, however it ends."""

    kind: Literal["process"]


class ConnectionLifetime(Model):
    """Ends with this HTTP connection."""

    kind: Literal["connection"]


class LeaseLifetime(Model):
    """Ends when the lease ends: see `POST /leases`."""

    kind: Literal["lease"]
    lease: str


class PersistentLifetime(Model):
    """Ends when it is deleted; survives a restart of the daemon."""

    kind: Literal["persistent"]


LifetimeBody = Annotated[
    ProcessLifetime | ConnectionLifetime | LeaseLifetime | PersistentLifetime,
    Field(discriminator="kind"),
]

#: Seconds that a lease may live without being renewed: 30 days.
MAX_TTL = 30 * 86400

Ttl = Annotated[
    int | float,
    Field(
        gt=0,
        le=MAX_TTL,
        description="Seconds that it lives from now on, unless it is renewed. They do not pass "
        "while the machine is suspended.",
    ),
]

Globals = Annotated[
    dict[str, NumberOrBytes],
    Field(description="Global variables by name, set before the program is loaded."),
]
MaxEntries = Annotated[
    dict[str, Annotated[int, Field(ge=1, lt=1 << 32)]],
    Field(description="Maps by name, and the size they get before they are made."),
]


class ObjectBody(Model):
    """An ELF object as clang makes it: maps, CO-RE and BTF included."""

    kind: Literal["object"]
    elf: Base64
    programs: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None,
        Field(description="Load only these; null: all programs of the object."),
    ] = None
    globals: Globals = Field(default_factory=dict)
    max_entries: MaxEntries = Field(default_factory=dict)


class InstructionsBody(Model):
    """Raw eBPF instructions, no maps."""

    kind: Literal["instructions"]
    instructions: Base64
    license: Annotated[str, Field(max_length=127, pattern="^[ -~]*$", examples=["GPL"])]
    name: Annotated[str, Field(max_length=64, pattern="^[A-Za-z0-9_.]*$")] = ""


class BuiltinBody(Model):
    """A program that ships with kpmd; `GET /capabilities` lists them."""

    kind: Literal["builtin"]
    builtin: str
    globals: Globals = Field(default_factory=dict)
    max_entries: MaxEntries = Field(default_factory=dict)


class ProgramBody(Model):
    """What to load."""

    source: Annotated[ObjectBody | InstructionsBody | BuiltinBody, Field(discriminator="kind")]
    attach: Annotated[
        AttachName | None,
        Field(description="May be left out for objects: each program's section says it."),
    ] = None
    lifetime: LifetimeBody = ProcessLifetime(kind="process")
    labels: Labels = Field(default_factory=dict)
    verifier_log: Annotated[
        bool, Field(description="Return the verifier's log of a program that it accepted, too.")
    ] = False


class LinkBody(Model):
    """What to attach, and to which functions: exactly one of `symbols`, `addresses`, `patterns`."""

    program: str
    kind: KindName
    symbols: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None,
        Field(description="Functions by name; 1 to 2^20 of them."),
    ] = None
    addresses: Annotated[
        Annotated[list[U64], Field(fail_fast=True)] | None,
        Field(description="Functions by the address where they start."),
    ] = None
    cookies: Annotated[
        Annotated[list[U64], Field(fail_fast=True)] | None,
        Field(description="What `bpf_get_attach_cookie` gives at each target, in their order."),
    ] = None
    patterns: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None,
        Field(
            description="Functions by glob (`*`, `?`), of a module with its name behind it in "
            "brackets: `nft_*[nf_tables]`. Functions on the deny list are left out."
        ),
    ] = None
    exclude: Annotated[
        Annotated[list[str], Field(fail_fast=True)],
        Field(description="Globs of what to leave out of `patterns`.", default_factory=list),
    ]
    on_untraceable: Annotated[
        Literal["error", "skip"] | None,
        Field(description="Default: `error` for symbols and addresses, `skip` for patterns."),
    ] = None
    on_ambiguous: Annotated[
        Literal["first", "all", "error"],
        Field(description="Of several functions of one name; `first` is what the kernel takes."),
    ] = "first"
    mechanism: Annotated[
        Literal["kprobe_multi"] | None,
        Field(description="Insist on it, where kprobes one by one would do otherwise."),
    ] = None
    dry_run: Annotated[
        bool, Field(description="Only tell what would be attached, what not, and why.")
    ] = False
    lifetime: LifetimeBody = ProcessLifetime(kind="process")
    labels: Labels = Field(default_factory=dict)


class LeaseBody(Model):
    """A lease to make."""

    ttl: Ttl
    labels: Labels = Field(default_factory=dict)


class RenewBody(Model):
    """How to renew a lease. Without `ttl` it gets the time it got before."""

    ttl: Ttl | None = None


# Queries


class NoQuery(Model):
    """No query parameters."""


class PageQuery(Model):
    """Which part of a list."""

    limit: Annotated[int, Field(ge=1, le=1000, strict=False)] = 100
    after: Annotated[str | None, Field(max_length=2048)] = None


class LinksQuery(PageQuery):
    """Which links."""

    program: str | None = None
    client: str | None = None
    lease: str | None = None


class EventsQuery(Model):
    """From where on."""

    since: Annotated[
        str | None,
        Field(
            max_length=64,
            description="The `seq` of an event: what came after it is sent first. `gone` where "
            "that is not kept any more. The header Last-Event-ID does the same.",
        ),
    ] = None


class SymbolsQuery(PageQuery):
    """Which functions."""

    pattern: Annotated[str, Field(description="A glob, as in `patterns` of a link.")] = "*"


class CapabilitiesQuery(Model):
    """`refresh` runs the feature tests again; for administrators."""

    refresh: Annotated[bool, Field(strict=False)] = False


class ForceQuery(Model):
    """`force` detaches the program's links first."""

    force: Annotated[bool, Field(strict=False)] = False


# Answers


class OwnerAnswer(Answer):
    """A user. `user` is null where the uid has no name."""

    uid: int
    user: str | None


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
    reason: Literal["unknown", "untraceable", "blacklisted", "denied", "ambiguous"]
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


class EntryAnswer(Answer):
    """A map's entry. Per-CPU maps have a list of values, one for each possible CPU."""

    key: Hex
    value: Hex | list[Hex]


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


class EntriesPage(Answer):
    """A page of a map's entries, in the kernel's order."""

    items: list[EntryAnswer]
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


class LimitsAnswer(Answer):
    """The caller's limits."""

    body_bytes: int
    object_bytes: int
    targets_per_link: int
    page: int
    lease_seconds: Annotated[int, Field(description="The longest `ttl` of a lease.")]


class CapabilitiesAnswer(Answer):
    """What this kernel and this kpmd can do for the caller."""

    kernel: KernelAnswer
    features: dict[str, FeatureAnswer]
    api: ApiAnswer
    builtins: list[str]
    limits: LimitsAnswer
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
    request: str = ""


#: What /openapi.json answers.
AnyObject = dict[str, Any]
