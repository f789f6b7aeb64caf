"""Who may do what: rules by user and group, of which the first that fits a caller is its rule.

One rule says everything about its caller: what it does not grant is refused, and the refusal names
it. Administrators need no rule. Pure: names of users are numbers here already, and what a rule says
of instructions is checked where they are loaded (``kpmd.bpf.rights``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from kpmd.core.deny import Denials, DenyList
from kpmd.core.globs import Glob
from kpmd.core.quotas import Limits
from kpmd.core.symbols import SymbolIndex
from kpmd.errors import Forbidden

#: What a rule can grant. What tells of the daemon, and what tells of the caller's own things and
#: ends them, needs no grant.
Right = Literal["load", "attach", "maps", "symbols", "leases", "events", "metrics"]
RIGHTS: tuple[Right, ...] = ("load", "attach", "maps", "symbols", "leases", "events", "metrics")

#: What a rule grants that does not say it: numbers of all users are not for every one of them.
USUAL: tuple[Right, ...] = tuple(each for each in RIGHTS if each != "metrics")

_DOES: dict[Right, str] = {
    "load": "load programs",
    "attach": "attach to functions",
    "maps": "read and write maps",
    "symbols": "list functions",
    "leases": "make leases",
    "events": "listen to events",
    "metrics": "read the daemon's numbers",
}

#: What a refusal names where no rule fits the caller.
NO_RULE = "no rule"

#: What stands for a rule where an administrator asks; no rule may be called so.
ADMINISTRATORS = "administrators"

_DENIED, _NOT_ALLOWED = "is denied", "is not among those allowed"
_RISKY = "is on the deny list"


@dataclass(frozen=True)
class Functions:
    """Which functions a rule lets attach to: one of ``allow``, none of ``deny``.

    ``risky``: also those on the deny list, which nobody but administrators may name otherwise.
    """

    allow: tuple[Glob, ...] = (Glob("*"),)
    deny: tuple[Glob, ...] = ()
    risky: bool = False

    @property
    def all_allowed(self) -> bool:
        """Whether ``allow`` leaves nothing out."""
        return any(glob == Glob("*") for glob in self.allow)

    @property
    def unrestricted(self) -> bool:
        """Whether it allows every function there is."""
        return self.all_allowed and not self.deny and self.risky

    def refusal(self, name: str, module: str | None) -> str | None:
        """Why a function may not be attached to, as far as the globs say; None: it may."""
        if any(glob.matches(name, module) for glob in self.deny):
            return _DENIED
        if self.all_allowed or any(glob.matches(name, module) for glob in self.allow):
            return None
        return _NOT_ALLOWED


@dataclass(frozen=True)
class Key:
    """A public key whose signatures under objects a rule accepts. ``raw``: Ed25519, 32 bytes."""

    name: str
    raw: bytes


@dataclass(frozen=True)
class Programs:
    """Which programs a rule lets load. ``sha256``: of whole objects, in hex."""

    anything: bool = False
    builtin: bool = True
    sha256: frozenset[str] = frozenset()
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Helpers:
    """What the programs of a rule may call and read. Names without ``bpf_``; None: everything.

    Builtins are kpmd's own, and not asked.
    """

    allow: frozenset[str] | None
    read_kernel: bool = False
    read_user: bool = False
    kfuncs: frozenset[str] | None = frozenset()


@dataclass(frozen=True)
class Rule:
    """What one rule says. ``users`` and ``groups`` are ids; ``everyone``: it fits whoever asks."""

    name: str
    helpers: Helpers
    map_types: frozenset[str] | None
    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    everyone: bool = False
    rights: frozenset[Right] = frozenset(USUAL)
    functions: Functions = Functions()
    programs: Programs = Programs()
    #: It may read what is others', and touch none of it.
    reads_others: bool = False
    limits: Limits = field(default_factory=Limits)

    def fits(self, uid: int, groups: Collection[int]) -> bool:
        """Whether it is about this user."""
        return self.everyone or uid in self.users or not self.groups.isdisjoint(groups)


@dataclass(frozen=True)
class Policy:
    """Rules in their order, and who is an administrator."""

    rules: tuple[Rule, ...] = ()
    admin_users: frozenset[int] = frozenset({0})
    admin_groups: frozenset[int] = frozenset()
    #: Where it stands, for people.
    source: str = "built in"
    #: What its reader has to say of it: names that this machine does not have.
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def is_admin(self, uid: int, groups: Collection[int]) -> bool:
        """Whether this user is an administrator."""
        return uid in self.admin_users or not self.admin_groups.isdisjoint(groups)

    def rule_for(self, uid: int, groups: Collection[int]) -> Rule | None:
        """The first rule that fits; None: there is none, and everything is refused."""
        return next((rule for rule in self.rules if rule.fits(uid, groups)), None)


def check_right(rule: Rule | None, right: Right) -> Rule:
    """The rule, which grants the right. Raises Forbidden where it does not, or there is none."""
    if rule is None:
        raise Forbidden(
            f"you may not {_DOES[right]}: no rule of the policy is about you; ask the "
            "administrator for one, or to be taken into the group kpmd",
            rule=NO_RULE,
        )
    if right not in rule.rights:
        granted = ", ".join(each for each in RIGHTS if each in rule.rights) or "nothing"
        raise Forbidden(
            f"you may not {_DOES[right]}: the policy's rule {rule.name!r} does not grant "
            f"{right!r} (it grants {granted})",
            rule=rule.name,
        )
    return rule


def forbidden(rule: Rule, what: str, **fields: object) -> Forbidden:
    """A refusal by a rule. ``what`` ends the sentence "the policy's rule … does not"."""
    return Forbidden(
        f"the policy's rule {rule.name!r} does not {what}; GET /policy shows what it allows",
        rule=rule.name,
        **fields,
    )


class Fence:
    """A rule's functions in one index: worked out once for each, since globs take their time."""

    def __init__(
        self, rule: Rule, index: SymbolIndex, deny: DenyList, denials: Denials | None = None
    ) -> None:
        """``denials``: what the list takes out of the index, where that is known already."""
        functions = rule.functions
        self.rule = rule
        self._deny = DenyList() if functions.risky else deny
        risky = self._deny.denials(index) if denials is None or functions.risky else denials
        self.index = index
        self._risky = risky
        self._allowed = None if functions.all_allowed else _found(index, functions.allow)
        self._denied = _found(index, functions.deny)

    def refused(self, positions: Iterable[int]) -> dict[int, str]:
        """Those of the positions that may not be attached to, each with the reason."""
        asked = set(positions)
        found = dict.fromkeys(sorted(asked & self._denied), _DENIED)
        if self._allowed is not None:
            found.update(dict.fromkeys(sorted(asked - self._allowed), _NOT_ALLOWED))
        for position in sorted(asked & self._risky.keys()):
            found[position] = f"{_RISKY}: {self._risky[position]}"
        return found

    def refused_name(self, name: str) -> str | None:
        """Why a function may not be attached to of which only the name is known; None: it may."""
        reason = self._deny.reason(name)
        if reason is not None:
            return f"{_RISKY}: {reason}"
        return self.rule.functions.refusal(name, None)


def _found(index: SymbolIndex, globs: Iterable[Glob]) -> frozenset[int]:
    return frozenset(position for glob in globs for position in index.glob(glob))
