"""The daemon's answers, as far as this client reads them; the contract is ``/openapi.json``.

64-bit values come as strings: addresses as ``0x`` and 16 hex digits, cookies in decimal. Times are
RFC 3339 in UTC. Keys and values of maps are hex, of the bytes as they lie in memory.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

#: How a program is called: at one place of each function, or at its entry and its return.
Attach = Literal["kprobe_multi", "kprobe_session"]
#: Where a link runs its program: at the entry, at the return, or (session) at both.
Kind = Literal["kprobe", "kretprobe", "session"]
#: What the policy can let a user do; what only looks at what is one's own needs no leave.
Right = Literal["load", "attach", "maps", "symbols", "leases", "events", "metrics"]
#: Where a program can come from.
Source = Literal["builtin", "object", "instructions"]
#: When a thing ends by itself: with the process that made it, with the connection it was made on,
#: with a lease, or never.
LifetimeKind = Literal["process", "connection", "lease", "persistent"]
#: Why a thing ends: it was deleted, or its program was; the process that made it ended, or was
#: released; the connection closed; the lease ran out, or was ended; the daemon stopped.
EndReason = Literal[
    "deleted",
    "program-deleted",
    "client-gone",
    "client-released",
    "connection-closed",
    "lease-expired",
    "lease-ended",
    "shutdown",
]


class Owner(TypedDict):
    """A user; ``user`` is None where the uid has no name."""

    uid: int
    user: str | None


class Lifetime(TypedDict):
    """When a thing ends by itself; ``lease`` is the id of one, and there with that kind only."""

    kind: LifetimeKind
    lease: NotRequired[str]


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
    """A link. ``missed``: calls it could not run for; None where the kernel is silent.

    While it is ``detaching`` its program still runs, and ``reason`` (there only then) says why it
    ends.
    """

    id: str
    kernel_id: int
    program: str
    state: Literal["attached", "detaching"]
    reason: NotRequired[EndReason]
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
    """What was asked for and is not attached to, and why.

    ``reason`` is a word to switch on: ``"forbidden"`` where the policy does not let the caller.
    """

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


class Decoded(TypedDict):
    """An entry as its object's BTF describes it: of per-CPU maps, a list of values."""

    key: NotRequired[Any]
    value: NotRequired[Any]


class Entry(TypedDict):
    """A map's entry, in hex. Per-CPU maps have a list of values, one for each possible CPU."""

    key: str
    value: str | list[str]
    decoded: NotRequired[Decoded]


#: Whether an entry that is written may be new, must be, or must not be.
Mode = Literal["any", "create", "replace"]


class Global(TypedDict):
    """A global variable, in hex; ``decoded`` and ``type`` as the object's BTF has them."""

    name: str
    section: str
    map: str
    type: str | None
    size: int
    writable: bool
    value: str
    decoded: NotRequired[Any]


class Record(TypedDict):
    """A record, in hex, or in its place how many are missing, and why.

    ``decoded`` is there where its struct is known.
    """

    data: NotRequired[str]
    decoded: NotRequired[Any]
    lost: NotRequired[int]
    reason: NotRequired[str]


class ClientRecord(TypedDict):
    """A process that is connected, or that holds something; each of the counts is what it holds."""

    id: str
    pid: int
    uid: int
    gid: int
    command: str
    since: str
    links: int
    programs: int
    leases: int


class Lease(TypedDict):
    """A lease, and how many links and programs end with it. ``ttl`` is in seconds.

    ``client`` is the id of the client that made it, which may be gone.
    """

    id: str
    ttl: float
    expires_at: str
    owner: Owner
    client: str
    links: int
    programs: int
    labels: dict[str, str]
    created_at: str


class Event(TypedDict):
    """Something that happened to what ``what`` and ``id`` tell. ``seq`` is to resume behind it.

    A link that ends is ``detaching`` first. ``reason`` is there unless it was created; ``client``
    (which made it) unless it is one itself; ``program``, ``kind`` and ``count`` are a link's,
    ``name`` is a program's, ``pid`` and ``command`` are a client's.
    """

    seq: str
    time: str
    what: Literal["program", "link", "client", "lease"]
    event: Literal["created", "detaching", "ended"]
    id: str
    uid: int
    reason: NotRequired[EndReason]
    client: NotRequired[str]
    program: NotRequired[str]
    kind: NotRequired[Kind]
    count: NotRequired[int]
    name: NotRequired[str]
    pid: NotRequired[int]
    command: NotRequired[str]


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


class FunctionsAllowed(TypedDict):
    """Which functions may be attached to: one of ``allow``, and none of ``deny``, which are globs.

    ``risky``: also those on the daemon's deny list, where they are named.
    """

    allow: list[str]
    deny: list[str]
    risky: bool


class ProgramsAllowed(TypedDict):
    """Which programs may be loaded: any, builtins, and of objects those of a SHA-256 or signed.

    ``keys``: names of the keys, one of which has to have signed an object.
    """

    any: bool
    builtin: bool
    sha256: list[str]
    keys: list[str]


class Policy(TypedDict):
    """What the policy lets a user do. Administrators may do everything, and have no ``rule``.

    ``rule`` is None also where no rule is about the user, who may do nothing then. What stands
    behind ``programs`` is about programs that are no builtins; None is everything there.
    """

    administrator: bool
    rule: str | None
    calls: list[Right]
    functions: FunctionsAllowed
    programs: ProgramsAllowed
    helpers: list[str] | None
    probe_read_kernel: bool
    probe_read_user: bool
    kfuncs: list[str] | None
    map_types: list[str] | None
    read_others: bool


#: By the limit's name; None is no limit.
Limits = dict[str, int | float | None]


class UserPolicy(TypedDict):
    """What a user may do, how much, and how much of it is used; ``usage`` is by limits' names.

    ``groups`` are the gids that the policy was asked with.
    """

    user: Owner
    groups: list[int]
    policy: Policy
    limits: Limits
    usage: dict[str, int]


class RefusedFunction(TypedDict):
    """A function that may not be attached to, and why."""

    symbol: str
    module: str | None
    detail: str


class Explanation(TypedDict):
    """Whether a user may do something, by which rule, and what stands against it.

    ``rule`` is ``"administrators"`` or ``"no rule"`` where none is about the user. ``functions`` is
    how many of those asked for may be attached to, ``refused_total`` how many not; ``refused`` has
    the first of these, and ``unmatched`` the names and globs that stand for no function.
    """

    user: Owner
    rule: str
    allowed: bool
    reasons: list[str]
    functions: int
    refused: list[RefusedFunction]
    refused_total: int
    unmatched: list[str]


class Capabilities(TypedDict):
    """What the kernel and the daemon can do for the caller, and what the policy lets them do.

    ``survives_restart``: whether persistent things, leases, and what belongs to a living process
    stay while the daemon is restarted.
    """

    kernel: Kernel
    features: dict[str, Feature]
    api: Api
    builtins: list[str]
    limits: Limits
    policy: Policy
    survives_restart: bool


class Health(TypedDict):
    """The daemon answers. ``warnings``: what an administrator has to look at; others get none."""

    status: Literal["ok", "stopping"]
    warnings: list[str]


class Version(TypedDict):
    """Versions of the daemon and of the contract."""

    version: str
    api: str
