"""Calls about the policy: what it says of a user, and whether something would be allowed."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass, field

from kpmd.api.bodies import ExplainBody
from kpmd.api.policy_answers import (
    ExplainAnswer,
    FunctionsAnswer,
    OwnerAnswer,
    PolicyAnswer,
    ProgramsAllowedAnswer,
    RefusedFunctionAnswer,
)
from kpmd.api.route import Call, Reply, Route
from kpmd.core.globs import Glob, GlobError
from kpmd.core.policy import (
    ADMINISTRATORS,
    NO_RULE,
    RIGHTS,
    Functions,
    Helpers,
    Programs,
    Rule,
    check_right,
)
from kpmd.errors import Forbidden, Invalid, KpmdError, NotFound
from kpmd.runtime.executor import Lane
from kpmd.runtime.sources import check_digest
from kpmd.runtime.state import State

#: What nobody asks of administrators, as a rule would grant it.
_ADMINISTRATORS = Rule(
    ADMINISTRATORS,
    Helpers(None, read_kernel=True, read_user=True, kfuncs=None),
    None,
    rights=frozenset(RIGHTS),
    functions=Functions(risky=True),
    programs=Programs(anything=True),
    reads_others=True,
)

#: What there is for users of whom no rule is.
_NOTHING = Rule(
    NO_RULE,
    Helpers(frozenset()),
    frozenset(),
    rights=frozenset(),
    functions=Functions(allow=()),
    programs=Programs(builtin=False),
)

#: Functions that an answer names at the most.
_SHOWN = 100


@dataclass(frozen=True)
class Who:
    """A user, and the groups to ask the policy with."""

    uid: int
    name: str | None
    groups: frozenset[int]


def policy_answer(admin: bool, rule: Rule | None) -> PolicyAnswer:
    """What a user may do, as the API shows it."""
    shown = _ADMINISTRATORS if admin else rule or _NOTHING
    return PolicyAnswer(
        administrator=admin,
        rule=None if admin or rule is None else rule.name,
        calls=[each for each in RIGHTS if each in shown.rights],
        functions=FunctionsAnswer(
            allow=[str(glob) for glob in shown.functions.allow],
            deny=[str(glob) for glob in shown.functions.deny],
            risky=shown.functions.risky,
        ),
        programs=ProgramsAllowedAnswer(
            any=shown.programs.anything,
            builtin=shown.programs.builtin,
            sha256=sorted(shown.programs.sha256),
            keys=[key.name for key in shown.programs.keys],
        ),
        helpers=_sorted(shown.helpers.allow),
        probe_read_kernel=shown.helpers.read_kernel,
        probe_read_user=shown.helpers.read_user,
        kfuncs=_sorted(shown.helpers.kfuncs),
        map_types=_sorted(shown.map_types),
        read_others=shown.reads_others,
    )


def _sorted(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


async def identify(call: Call, user: str | int | None) -> Who:
    """Whom a call is about: the caller, or for administrators anybody.

    The caller's groups are those of its process, another's those of the user database. Raises
    Forbidden, NotFound.
    """
    state, caller = call.state, call.caller
    if user is None:
        name = await state.owner_name(call.connection.client)
        return Who(caller.uid, name, caller.groups)
    found = await state.executor.run(_look_up, user, uid=caller.uid)
    if not caller.admin and (found is None or found.uid != caller.uid):
        raise Forbidden("only administrators may ask about other users", rule=caller.rule_name)
    if found is None:
        raise NotFound(f"there is no user {user!r} on this machine")
    return found


def _look_up(user: str | int) -> Who | None:
    try:
        if isinstance(user, int) or user.isdecimal():
            entry = pwd.getpwuid(int(user))
        else:
            entry = pwd.getpwnam(user)
    except (KeyError, OverflowError, ValueError):
        return None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Who(entry.pw_uid, entry.pw_name, frozenset(groups))


async def explain(call: Call) -> Reply:
    """POST /policy/explain"""
    body: ExplainBody = call.body
    state = call.state
    who = await identify(call, body.user)
    admin, rule = state.policies.of(who.uid, who.groups)
    found = _Found()
    if body.patterns:
        asked = None if admin else rule or _NOTHING
        found = await state.executor.run(
            _look_at, state, asked, body.patterns, lane=Lane.PARSE, uid=call.caller.uid
        )
    reasons = ([] if admin else _reasons(rule, body)) + found.reasons
    return Reply(
        ExplainAnswer(
            user=OwnerAnswer(uid=who.uid, user=who.name),
            rule=ADMINISTRATORS if admin else rule.name if rule else NO_RULE,
            allowed=not reasons,
            reasons=reasons,
            functions=found.functions,
            refused=found.refused[:_SHOWN],
            refused_total=len(found.refused),
            unmatched=found.unmatched,
        )
    )


def _reasons(rule: Rule | None, body: ExplainBody) -> list[str]:
    """What stands against it, but for the functions."""
    reasons = []
    wanted = {body.call} if body.call else set()
    if body.patterns:
        wanted.add("attach")
    if body.source:
        wanted.add("load")
    for right in RIGHTS:
        if right in wanted or (not wanted and rule is None):
            try:
                check_right(rule, right)
            except KpmdError as error:
                reasons.append(error.detail)
                break
    if body.source and rule is not None and not reasons:
        try:
            check_digest(rule, body.source, body.sha256)
        except KpmdError as error:
            reasons.append(error.detail)
    return reasons


@dataclass
class _Found:
    """What some patterns come to for a user."""

    functions: int = 0
    refused: list[RefusedFunctionAnswer] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def _look_at(state: State, rule: Rule | None, patterns: list[str]) -> _Found:
    """As a link is made: globs leave out what may not be attached to, a name is refused for it."""
    snapshot = state.symbols.current()
    index = snapshot.index
    fence = None if rule is None else state.symbols.fence(rule, snapshot)
    found = _Found()
    positions: set[int] = set()
    outside: dict[int, str] = {}
    for at, text in enumerate(patterns):
        try:
            glob = Glob.parse(text)
        except GlobError as error:
            raise Invalid.at(["patterns", at], str(error)) from None
        matched = set(index.glob(glob))
        refused = {} if fence is None else fence.refused(matched)
        if not matched:
            found.unmatched.append(text)
        elif refused and glob.literal:
            found.reasons.append(f"{text} {next(iter(refused.values()))}")
        elif len(refused) == len(matched):
            found.reasons.append(f"none of what {text} matches may be attached to")
        positions |= matched
        outside |= refused
    found.functions = len(positions) - len(outside)
    found.refused = [
        RefusedFunctionAnswer(
            symbol=index.names[each], module=index.module(each), detail=outside[each]
        )
        for each in sorted(outside)
    ]
    return found


ROUTES = [
    Route(
        "POST",
        "/policy/explain",
        explain,
        "Whether a user may do something, by which rule, and what stands against it",
        ExplainAnswer,
        body=ExplainBody,
        asks_only=True,
        errors=("forbidden", "not-found"),
    ),
]
