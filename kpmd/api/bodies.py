"""The shapes of requests; ``openapi.yaml`` is made from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kpmd.api.fields import (
    U64,
    Base64,
    Labels,
    Model,
    NumberOrBytes,
)
from kpmd.core.policy import Right
from kpmd.core.specs import MAX_GLOBS

AttachName = Literal["kprobe_multi", "kprobe_session"]
KindName = Literal["kprobe", "kretprobe", "session"]


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
    signature: Annotated[
        Base64 | None,
        Field(
            description="Ed25519 signature of the object's bytes, where the policy asks for one: "
            "`openssl pkeyutl -sign -rawin -inkey KEY -in OBJECT`."
        ),
    ] = None


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


User = Annotated[
    Annotated[str, Field(min_length=1, max_length=256)] | Annotated[int, Field(ge=0, lt=1 << 32)],
    Field(description="A user's name, or uid."),
]


class ExplainBody(Model):
    """What somebody would do. Of others only administrators may ask."""

    user: User | None = None
    call: Annotated[Right | None, Field(description="Make this call.")] = None
    patterns: Annotated[
        list[Annotated[str, Field(max_length=577)]],
        Field(
            description="Attach to these functions, each a name or a glob.",
            max_length=MAX_GLOBS,
            default_factory=list,
        ),
    ]
    source: Annotated[
        Literal["builtin", "object", "instructions"] | None,
        Field(description="Load such a program; an `object` by its `sha256`."),
    ] = None
    sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None


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


class UserQuery(Model):
    """Whose policy; the caller's own by default. Of others only administrators may ask."""

    user: Annotated[
        str | None, Field(min_length=1, max_length=256, description="A user's name, or uid.")
    ] = None


class CapabilitiesQuery(Model):
    """`refresh` runs the feature tests again; for administrators."""

    refresh: Annotated[bool, Field(strict=False)] = False


class ForceQuery(Model):
    """`force` detaches the program's links first."""

    force: Annotated[bool, Field(strict=False)] = False
