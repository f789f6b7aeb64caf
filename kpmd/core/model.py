"""What kpmd holds: ids, and a record for each client, program, map and link."""

from __future__ import annotations

import secrets
from array import array
from dataclasses import dataclass, field
from typing import Literal

Attach = Literal["kprobe_multi", "kprobe_session"]
LinkKind = Literal["kprobe", "kretprobe", "session"]
Mechanism = Literal["kprobe_multi", "perf_event"]


def new_id(prefix: Literal["prg", "map", "lnk", "cli"]) -> str:
    """A fresh opaque id. 96 random bits: ids of others cannot be guessed."""
    return f"{prefix}-{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Caller:
    """Who asks, as the kernel tells it (SO_PEERCRED); nothing in a request can change it."""

    uid: int
    gid: int
    pid: int
    admin: bool


@dataclass(frozen=True)
class Lifetime:
    """When a thing ends by itself: ``process``, with its client; ``persistent``, never."""

    kind: Literal["process", "persistent"]


@dataclass
class Client:
    """One process at the other end of the socket, however many connections it has.

    ``pid`` is 0 where the process cannot be seen from the daemon's PID namespace.
    """

    id: str
    pid: int
    uid: int
    gid: int
    command: str
    since: float
    connections: int = 0
    requests: int = 0
    programs: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    #: Why nothing can be bound to the process any more; empty while it lives.
    ended: str = ""


@dataclass
class Program:
    """A loaded program. ``group`` names what was loaded with it and shares its maps."""

    id: str
    kernel_id: int
    name: str
    tag: str
    attach: Attach
    #: How its links are made; fixed at load, where the kernel wants to know it.
    mechanism: Mechanism
    uid: int
    user: str | None
    client: str
    lifetime: Lifetime
    maps: tuple[str, ...]
    labels: dict[str, str]
    created_at: float
    verified_instructions: int
    jited_bytes: int
    #: It cannot tell functions apart at their return: the builtin for kernels before 5.15.
    entry_only: bool = False
    links: set[str] = field(default_factory=set)
    #: Links being made with it right now; it does not end before they are settled.
    holds: int = 0
    #: Its own lifetime is over; it stays only as long as links need it.
    released: bool = False


@dataclass
class Map:
    """A map of one or more programs; it ends with the last of them."""

    id: str
    kernel_id: int
    name: str
    type: str
    key_size: int
    value_size: int
    max_entries: int
    uid: int
    percpu: bool
    programs: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Targets:
    """What a link is attached to, in the order it was asked for, in compact form.

    ``addresses`` is empty where the link was made by names because addresses are hidden;
    ``names`` is empty where it was made by addresses that have no name. ``modules`` maps a position
    to the module of its function; what is not in it is in the kernel itself.
    """

    names: tuple[str, ...]
    addresses: array[int]
    cookies: array[int]
    modules: dict[int, str]

    def __len__(self) -> int:
        return len(self.names) or len(self.addresses)


SkipReason = Literal["unknown", "untraceable", "blacklisted", "denied", "ambiguous"]


@dataclass(frozen=True)
class Skipped:
    """What was asked for and is not attached to, and why. ``symbol`` can be an address."""

    symbol: str
    module: str | None
    reason: SkipReason
    detail: str


@dataclass
class Link:
    """An attached link. ``count`` is the kernel's, or the request's where the kernel is silent."""

    id: str
    kernel_id: int
    program: str
    kind: LinkKind
    mechanism: Mechanism
    count: int
    skipped: tuple[Skipped, ...]
    uid: int
    user: str | None
    client: str
    lifetime: Lifetime
    labels: dict[str, str]
    created_at: float
    targets: Targets
