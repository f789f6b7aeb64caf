"""The policy in force, and what it makes of each caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from kpmd.bpf.rights import Rights
from kpmd.core.model import Caller
from kpmd.core.policy import Policy, Rule, check_right
from kpmd.core.quotas import Limits
from kpmd.log import Log
from kpmd.runtime.executor import Executor
from kpmd.runtime.peer import Peer

log = Log("kpmd.policy")

#: Users and their groups of which the rule is remembered, at the most.
_REMEMBERED = 4096


class Policies:
    """The policy in force. A new one that cannot be read leaves the old one in force."""

    def __init__(self, policy: Policy, read: Callable[[], Policy] | None = None) -> None:
        """``read`` reads it anew; it blocks, and raises ValueError where the policy is bad."""
        self.current = policy
        #: Why the last new policy is not in force; None: it is.
        self.fault: str | None = None
        #: Grows with each policy that comes into force.
        self.version = 0
        #: When the one in force came into force, in seconds since the epoch.
        self.since = time.time()
        self._read = read
        self._known: dict[tuple[int, frozenset[int]], tuple[bool, Rule | None]] = {}
        self._tell(policy)

    def caller(self, peer: Peer) -> Caller:
        """What the policy in force makes of who is at the other end of a connection."""
        admin, rule = self.of(peer.uid, peer.groups)
        return Caller(
            uid=peer.uid,
            gid=peer.gid,
            pid=peer.pid,
            admin=admin,
            groups=peer.groups,
            command=peer.command,
            rule=rule,
            limits=limits_of(admin, rule),
        )

    def of(self, uid: int, groups: Iterable[int]) -> tuple[bool, Rule | None]:
        """Whether a user is an administrator, and the rule that fits them."""
        key = (uid, frozenset(groups))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            policy = self.current
            known = policy.is_admin(uid, key[1]), policy.rule_for(uid, key[1])
            self._known[key] = known
        return known

    async def renew(self, executor: Executor) -> None:
        """Read the policy anew, and put it in force for the requests that begin from now on.

        A bad one leaves the one before in force, and that is told.
        """
        if self._read is None:
            return
        try:
            policy = await executor.run(self._read)
        except Exception as error:
            self.fault = f"the policy before stays in force: {error}"
            # Not a ValueError: the user database cannot be asked, say, or a bug.
            bug = None if isinstance(error, ValueError) else error
            log.error("bad policy", bug, source=self.current.source, reason=self.fault)
        else:
            self._use(policy)

    def _use(self, policy: Policy) -> None:
        self._known.clear()
        self.current = policy
        self.version += 1
        self.since = time.time()
        self.fault = None
        self._tell(policy)
        log.info(
            "policy in force", source=policy.source, rules=[each.name for each in policy.rules]
        )

    @staticmethod
    def _tell(policy: Policy) -> None:
        for warning in policy.warnings:
            log.warning("policy", source=policy.source, warning=warning)


def limits_of(admin: bool, rule: Rule | None) -> Limits:
    """How much a user may have."""
    if admin:
        return Limits.unlimited()
    return rule.limits if rule is not None else Limits()


def rights_of(caller: Caller, *, builtin: bool, map_bytes: int) -> Rights | None:
    """What the instructions of a caller's program may do; None: everything.

    ``map_bytes``: what is left to the caller. Builtins are kpmd's own, and may do all they do.
    Raises Forbidden where the caller may load nothing at all.
    """
    if caller.admin:
        return None
    rule = check_right(caller.rule, "load")
    if builtin:
        return Rights(None, True, True, None, None, map_bytes, caller.limits.load_seconds)
    return Rights(
        helpers=rule.helpers.allow,
        read_kernel=rule.helpers.read_kernel,
        read_user=rule.helpers.read_user,
        kfuncs=rule.helpers.kfuncs,
        map_types=rule.map_types,
        map_bytes=map_bytes,
        seconds=caller.limits.load_seconds,
    )
