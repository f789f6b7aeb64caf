"""What kpmd holds: ids, and a record for each client, program, map and link."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from kpmd.core.policy import ADMINISTRATORS, NO_RULE, Rule
from kpmd.core.quotas import UNLIMITED, Limits
from kpmd.core.types import ObjectTypes

Attach = Literal["kprobe_multi", "kprobe_session"]
LinkKind = Literal["kprobe", "kretprobe", "session"]
Mechanism = Literal["kprobe_multi", "perf_event"]


#: Why a thing ended, in words that programs can switch on.
Reason = Literal[
    "deleted",
    "program-deleted",
    "client-gone",
    "client-released",
    "connection-closed",
    "lease-expired",
    "lease-ended",
    "shutdown",
]


def new_id(prefix: Literal["prg", "map", "lnk", "cli", "con", "lse", "wrk"]) -> str:
    """A fresh opaque id. 96 random bits: ids of others cannot be guessed."""
    return f"{prefix}-{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Caller:
    """Who asks, as the kernel tells it (SO_PEERCRED); nothing in a request can change it.

    ``rule``: what the policy says of this user; None: nothing, and administrators need none.
    """

    uid: int
    gid: int
    pid: int
    admin: bool
    groups: frozenset[int] = frozenset()
    command: str = ""
    rule: Rule | None = None
    #: How much they may have.
    limits: Limits = UNLIMITED

    @property
    def reads_others(self) -> bool:
        """Whether it may read what belongs to other users."""
        return self.admin or (self.rule is not None and self.rule.reads_others)

    @property
    def rule_name(self) -> str:
        """What a refusal names."""
        return ADMINISTRATORS if self.admin else self.rule.name if self.rule else NO_RULE


@dataclass(frozen=True)
class Lifetime:
    """When a program or a link ends by itself.

    ``process``: with its client; ``connection``: with the connection it was made on; ``lease``:
    with the lease of that id; ``persistent``: never.
    """

    kind: Literal["process", "connection", "lease", "persistent"]
    lease: str = ""


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
    leases: set[str] = field(default_factory=set)
    #: Why nothing can be bound to the process any more; empty while it lives.
    ended: str = ""
    #: Tells its process from all others; None where nothing does.
    process: Hashable = None


@dataclass
class Connection:
    """One HTTP connection of a client."""

    id: str
    client: Client
    closed: bool = False


@dataclass
class Lease:
    """What programs and links can be bound to: it ends ``ttl`` seconds after its last renewal.

    ``deadline`` is a time of CLOCK_MONOTONIC, which does not count while the machine is suspended:
    who would renew it is suspended too.
    """

    id: str
    uid: int
    user: str | None
    client: str
    ttl: float
    deadline: float
    labels: dict[str, str]
    created_at: float


@dataclass
class Program:
    """A loaded program."""

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
    #: The id of what it ends with: its client, a connection, a lease; none where it is persistent.
    anchor: str = ""
    #: Links that are attached with it, or still being detached.
    links: set[str] = field(default_factory=set)
    #: Links being made with it right now; it does not end before they are settled.
    holds: int = 0
    #: Why its own lifetime is over, if it is; it stays only as long as links need it.
    released: Reason | None = None


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
    #: About how many bytes of the kernel's memory it takes when it is full.
    memory: int = 0
    #: Ids of its key's and its value's type in ``types``; 0: the object says nothing of them.
    key_type: int = 0
    value_type: int = 0
    programs: set[str] = field(default_factory=set)
    #: The BTF of its object, if that has any.
    types: ObjectTypes | None = field(default=None, repr=False, compare=False)


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


SkipReason = Literal["unknown", "untraceable", "blacklisted", "denied", "ambiguous", "forbidden"]


@dataclass(frozen=True)
class Skipped:
    """What was asked for and is not attached to, and why. ``symbol`` can be an address."""

    symbol: str
    module: str | None
    reason: SkipReason
    detail: str


@dataclass
class Link:
    """A link. ``count`` is the kernel's, or the request's where the kernel is silent."""

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
    #: The id of what it ends with, as a program's.
    anchor: str = ""
    #: Why it is being detached, if it is: it stays listed until the kernel has let go of it.
    detaching: Reason | None = None
