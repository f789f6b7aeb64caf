"""The policy as an administrator writes it (TOML), and the policy where there is none.

Names become numbers here: users and groups by the user database, classes of helpers and of map
types by what they stand for. The file must be safe to believe: nobody but root (or the daemon's own
user) may be able to write it.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kpmd.bpf import helpers as bpf_helpers
from kpmd.bpf.abi import MAP_TYPES
from kpmd.config import Config, load_deny_list
from kpmd.core.globs import Glob, GlobError
from kpmd.core.policy import (
    ADMINISTRATORS,
    RIGHTS,
    USUAL,
    Functions,
    Helpers,
    Key,
    Policy,
    Programs,
    Right,
    Rule,
)
from kpmd.core.quotas import Limits
from kpmd.errors import KpmdError

DEFAULT_POLICY = Path("/etc/kpmd/policy.toml")

#: The group whose members may use builtins, and the administrators', where no file says otherwise.
USERS_GROUP, ADMIN_GROUP = "kpmd", "kpmd-admin"

#: Map types that hold what a program counts and tells, and no more.
PLAIN_MAPS = frozenset(
    {
        "hash",
        "array",
        "prog_array",
        "perf_event_array",
        "percpu_hash",
        "percpu_array",
        "stack_trace",
        "lru_hash",
        "lru_percpu_hash",
        "lpm_trie",
        "array_of_maps",
        "hash_of_maps",
        "queue",
        "stack",
        "ringbuf",
        "bloom_filter",
    }
)

#: Words for sets of names.
HARMLESS, PLAIN, ALL = "harmless", "plain", "all"


class PolicyError(ValueError):
    """The policy cannot be used; the message says where and why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Who = Annotated[str, Field(min_length=1, max_length=256)] | Annotated[int, Field(ge=0, lt=1 << 32)]


class FunctionsTable(_Model):
    """``functions``: globs of those that may be attached to."""

    allow: list[str] = ["*"]
    deny: list[str] = []
    risky: bool = False

    @field_validator("allow", "deny")
    @classmethod
    def _globs(cls, globs: list[str]) -> list[str]:
        for text in globs:
            try:
                Glob.parse(text)
            except GlobError as error:
                raise ValueError(f"the glob {text!r} {error}") from None
        return globs

    def to_functions(self) -> Functions:
        """As the policy has it."""
        allow, deny = (tuple(Glob.parse(text) for text in each) for each in (self.allow, self.deny))
        return Functions(allow, deny, self.risky)


class ProgramsTable(_Model):
    """``programs``: which ones may be loaded."""

    any: bool = False
    builtin: bool = True
    sha256: list[Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]] = []
    keys: list[Path] = []


class HelpersTable(_Model):
    """``helpers``: what the instructions of a program may call and read."""

    allow: list[str] = [HARMLESS]
    probe_read_kernel: bool = False
    probe_read_user: bool = False
    kfuncs: list[str] = []

    @field_validator("allow")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in (HARMLESS, ALL) and name.removeprefix("bpf_") not in bpf_helpers.IDS:
                raise ValueError(f"there is no helper {name!r}")
        return names

    def to_helpers(self) -> Helpers:
        """As the policy has it."""
        names = {name.removeprefix("bpf_") for name in self.allow}
        allow = names - {HARMLESS} | (bpf_helpers.HARMLESS if HARMLESS in names else frozenset())
        return Helpers(
            allow=None if ALL in names else frozenset(allow),
            read_kernel=self.probe_read_kernel,
            read_user=self.probe_read_user,
            kfuncs=None if ALL in self.kfuncs else frozenset(self.kfuncs),
        )


class MapsTable(_Model):
    """``maps``: of which types they may be."""

    types: list[str] = [PLAIN]

    @field_validator("types")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in (PLAIN, ALL) and name not in MAP_TYPES.values():
                raise ValueError(f"there is no map type {name!r}")
        return names

    def to_types(self) -> frozenset[str] | None:
        """As the policy has it."""
        if ALL in self.types:
            return None
        return frozenset(self.types) - {PLAIN} | (PLAIN_MAPS if PLAIN in self.types else set())


_Count = Annotated[int, Field(ge=0)]


class LimitsTable(_Model):
    """``limits``: the most that each user may have; what is left out is as in ``[limits]``."""

    programs: _Count | None = None
    links: _Count | None = None
    targets_per_link: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    targets: _Count | None = None
    map_bytes: _Count | None = None
    leases: _Count | None = None
    streams: _Count | None = None
    requests: Annotated[int, Field(ge=1)] | None = None
    connections: Annotated[int, Field(ge=1)] | None = None
    body_bytes: Annotated[int, Field(ge=1 << 10)] | None = None
    object_bytes: Annotated[int, Field(ge=0)] | None = None
    load_seconds: Annotated[float, Field(gt=0)] | None = None

    def over(self, limits: Limits) -> Limits:
        """Those limits, with what is said here instead."""
        return Limits(**{**vars(limits), **self.model_dump(exclude_none=True)})


class RuleTable(_Model):
    """One of ``[[rules]]``."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")]
    users: list[Who] = []
    groups: list[Who] = []
    calls: list[Right] = list(USUAL)
    functions: FunctionsTable = FunctionsTable()
    programs: ProgramsTable = ProgramsTable()
    helpers: HelpersTable = HelpersTable()
    maps: MapsTable = MapsTable()
    read_others: bool = False
    limits: LimitsTable = LimitsTable()


class AdministratorsTable(_Model):
    """``[administrators]``: root always is one."""

    users: list[Who] = []
    groups: list[Who] = [ADMIN_GROUP]


class PolicyTable(_Model):
    """The whole file."""

    version: Literal[1] = 1
    administrators: AdministratorsTable = AdministratorsTable()
    limits: LimitsTable = LimitsTable()
    rules: list[RuleTable] = []

    @field_validator("rules")
    @classmethod
    def _distinct(cls, rules: list[RuleTable]) -> list[RuleTable]:
        names = [rule.name for rule in rules]
        for name in names:
            if name == ADMINISTRATORS:
                raise ValueError(f"no rule may be called {name!r}: they need none")
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name!r}")
        return rules


class _Reader:
    """Turns a file's table into a policy, and collects what there is to say of it."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._warnings: list[str] = []

    def policy(self, table: PolicyTable) -> Policy:
        limits = table.limits.over(Limits())
        rules = tuple(self._rule(each, limits) for each in table.rules)
        admin_users = self._users(table.administrators.users, "administrators") | {0}
        admin_groups = self._groups(table.administrators.groups, "administrators")
        return Policy(rules, admin_users, admin_groups, self._source, tuple(self._warnings))

    def _rule(self, table: RuleTable, limits: Limits) -> Rule:
        where = f"rule {table.name}"
        if not table.users and not table.groups:
            raise PolicyError(f'{where}: name users or groups; users = ["*"] is everyone')
        return Rule(
            name=table.name,
            helpers=table.helpers.to_helpers(),
            map_types=table.maps.to_types(),
            users=self._users([each for each in table.users if each != "*"], where),
            groups=self._groups(table.groups, where),
            everyone="*" in table.users,
            rights=frozenset(table.calls),
            functions=table.functions.to_functions(),
            programs=Programs(
                anything=table.programs.any,
                builtin=table.programs.builtin,
                sha256=frozenset(each.lower() for each in table.programs.sha256),
                keys=tuple(_key(path, where) for path in table.programs.keys),
            ),
            reads_others=table.read_others,
            limits=table.limits.over(limits),
        )

    def _users(self, names: Iterable[str | int], where: str) -> frozenset[int]:
        found = set()
        for name in names:
            try:
                found.add(name if isinstance(name, int) else pwd.getpwnam(name).pw_uid)
            except KeyError:
                self._warnings.append(f"{where}: there is no user {name!r} on this machine")
        return frozenset(found)

    def _groups(self, names: Iterable[str | int], where: str) -> frozenset[int]:
        found = set()
        for name in names:
            try:
                found.add(name if isinstance(name, int) else grp.getgrnam(name).gr_gid)
            except KeyError:
                # The group of the policy that ships with kpmd may well not have been made.
                if name != ADMIN_GROUP:
                    self._warnings.append(f"{where}: there is no group {name!r} on this machine")
        return frozenset(found)


def _key(path: Path, where: str) -> Key:
    """A public key out of its PEM file (Ed25519, as ``openssl pkey -pubout`` writes it)."""
    # Only now: few policies have keys, and the library costs megabytes.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_trusted(path))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise PolicyError(f"{where}: {path} is no public key in PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PolicyError(f"{where}: {path} is no Ed25519 key")
    return Key(path.name, key.public_bytes_raw())


def _trusted(path: Path) -> bytes:
    """The content of a file that nobody may write but root and the daemon's user.

    Raises OSError, PolicyError.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PolicyError(f"{path} is no regular file")
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise PolicyError(
                f"{path} could be written by others than root: chown root it, and chmod go-w it"
            )
        return file.read()


def load(path: Path | None, socket_group: str | None = None) -> Policy:
    """The policy of a file; None: that of ``/etc/kpmd``, or the one built in where there is none.

    ``socket_group``: a group that the configuration lets connect; the policy that is built in is
    about its members too. Raises PolicyError.
    """
    if path is None and not DEFAULT_POLICY.exists():
        return built_in(socket_group)
    path = path or DEFAULT_POLICY
    try:
        text = _trusted(path).decode()
        table = PolicyTable.model_validate(tomllib.loads(text))
        return _Reader(str(path)).policy(table)
    except ValidationError as error:
        lines = [_line(each["loc"], each["msg"]) for each in error.errors(include_url=False)]
        raise PolicyError(f"{path}: " + "; ".join(lines)) from None
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KpmdError) as error:
        raise PolicyError(f"{path}: {error}") from error


def built_in(socket_group: str | None = None) -> Policy:
    """What holds where no file says otherwise: who is in group kpmd may use builtins."""
    groups: list[Who] = [USERS_GROUP]
    if socket_group is not None and socket_group != USERS_GROUP:
        groups.append(int(socket_group) if socket_group.isdecimal() else socket_group)
    known = [group for group in groups if isinstance(group, int) or _exists(group)]
    rules = [RuleTable(name="builtins", groups=known)] if known else []
    return _Reader("built in").policy(PolicyTable(rules=rules))


def _exists(group: str) -> bool:
    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True


def _line(loc: tuple[str | int, ...], message: str) -> str:
    where = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in loc))
    return f"{where}: {message.removeprefix('Value error, ')}"


def report(config: Config) -> str:
    """What a daemon with this configuration would do, for people. Raises ValueError."""
    deny = load_deny_list(config.deny_file)
    policy = load(config.policy, config.group)
    lines = [
        "The configuration is good.",
        f"socket: {config.socket}, group {config.group or 'of the daemon'}, mode {config.mode:04o}",
        f"deny list: {len(deny.lines)} lines ({config.deny_file or 'built in'})",
        *(["tracing: " + config.tracing.told()] if config.tracing is not None else []),
        f"policy: {policy.source}; its rules, of which the first that fits a user counts:",
        *(f"  {rule.name}: {_grants(rule)}" for rule in policy.rules),
    ]
    if not policy.rules:
        lines.append("  none: only administrators may do anything")
    return "\n".join([*lines, *(f"warning: {each}" for each in policy.warnings)])


def _grants(rule: Rule) -> str:
    programs = rule.programs
    kinds = [
        "any program" if programs.anything else "builtins" if programs.builtin else "",
        f"{len(programs.sha256)} objects by SHA-256" if programs.sha256 else "",
        f"objects signed with {', '.join(key.name for key in programs.keys)}"
        if programs.keys
        else "",
    ]
    who = "everyone" if rule.everyone else f"uids {sorted(rule.users)}, gids {sorted(rule.groups)}"
    calls = ", ".join(each for each in RIGHTS if each in rule.rights) or "nothing"
    return f"{who}; {calls}; {', '.join(filter(None, kinds)) or 'no program'}"
