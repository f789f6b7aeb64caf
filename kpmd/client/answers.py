"""The daemon's answers, as far as this client reads them; the contract is ``/openapi.json``.

64-bit values come as strings: addresses as ``0x`` and 16 hex digits, cookies in decimal. Times are
RFC 3339 in UTC. Keys and values of maps are hex, of the bytes as they lie in memory.
"""

from __future__ import annotations

from typing import Literal, TypedDict

#: How a program is called: at one place of each function, or at its entry and its return.
Attach = Literal["kprobe_multi", "kprobe_session"]
#: Where a link runs its program: at the entry, at the return, or (session) at both.
Kind = Literal["kprobe", "kretprobe", "session"]
#: When a thing ends by itself: with the process that made it, or never.
LifetimeKind = Literal["process", "persistent"]


class Owner(TypedDict):
    """A user; ``user`` is None where the uid has no name."""

    uid: int
    user: str | None


class Lifetime(TypedDict):
    """When a thing ends by itself."""

    kind: LifetimeKind


class Program(TypedDict):
    """A loaded program."""

    id: str
    kernel_id: int
    name: str
    tag: str
    attach: Attach
    owner: Owner
    client: str
    lifetime: Lifetime
    maps: list[str]
    links: int
    labels: dict[str, str]
    created_at: str
    verified_instructions: int
    jited_bytes: int


class Map(TypedDict):
    """A map; sizes are in bytes."""

    id: str
    kernel_id: int
    name: str
    type: str
    key_size: int
    value_size: int
    max_entries: int
    programs: list[str]


class Loaded(TypedDict):
    """What one load made."""

    programs: list[Program]
    maps: list[Map]


class Link(TypedDict):
    """An attached link. ``missed``: calls it could not run for; None where the kernel is silent."""

    id: str
    kernel_id: int
    program: str
    kind: Kind
    mechanism: str
    count: int
    missed: int | None
    skipped: int
    owner: Owner
    client: str
    lifetime: Lifetime
    labels: dict[str, str]
    created_at: str


class Skipped(TypedDict):
    """What was asked for and is not attached to, and why."""

    symbol: str
    module: str | None
    reason: str
    detail: str


class Symbol(TypedDict):
    """A function that can be traced; ``ambiguous``: several have its name."""

    symbol: str
    module: str | None
    address: str | None
    ambiguous: bool


class Target(TypedDict):
    """A function that a link is attached to; None is what the daemon cannot know."""

    symbol: str | None
    module: str | None
    address: str | None
    cookie: str


class Refusal(TypedDict):
    """The error that a request would get."""

    kind: str
    detail: str


class Plan(TypedDict):
    """What a request for a link would come to; ``attachable``: whether it would succeed."""

    attachable: bool
    refusal: Refusal | None
    program: str
    kind: Kind
    mechanism: str
    count: int
    targets: list[Target]
    skipped: list[Skipped]


class Entry(TypedDict):
    """A map's entry, in hex. Per-CPU maps have a list of values, one for each possible CPU."""

    key: str
    value: str | list[str]


class Kernel(TypedDict):
    """The running kernel."""

    release: str
    machine: str


class Feature(TypedDict):
    """``supported`` None: the test told nothing, for the ``reason``."""

    supported: bool | None
    min_kernel: str
    reason: str | None
    checked_at: str


class Api(TypedDict):
    """The contract's version, and what was added to it since."""

    version: str
    extensions: list[str]


class Capabilities(TypedDict):
    """What the kernel and the daemon can do for the caller."""

    kernel: Kernel
    features: dict[str, Feature]
    api: Api
    builtins: list[str]
    limits: dict[str, int]


class Version(TypedDict):
    """Versions of the daemon and of the contract."""

    version: str
    api: str
