"""Whether the policy lets a caller load a program, as far as its source tells."""

from __future__ import annotations

from typing import Literal

from kpmd.core.model import Caller
from kpmd.core.policy import Key, Rule, check_right, forbidden
from kpmd.core.specs import BuiltinSource, InstructionsSource, ObjectSource, ProgramSpec
from kpmd.runtime.executor import Executor


async def check_source(executor: Executor, caller: Caller, spec: ProgramSpec) -> None:
    """Raise Forbidden unless the policy lets the caller load it.

    That is any program, builtins, or this very object. What the instructions do is checked where
    they are loaded.
    """
    if caller.admin:
        return
    source = spec.source
    rule = check_right(caller.rule, "load")
    if isinstance(source, ObjectSource) and not rule.programs.anything:
        await executor.run(_check_object, rule, source, uid=caller.uid)
    elif isinstance(source, InstructionsSource):
        check_digest(rule, "instructions", None)
    elif isinstance(source, BuiltinSource):
        check_digest(rule, "builtin", None)


def check_digest(
    rule: Rule, kind: Literal["builtin", "object", "instructions"], sha256: str | None
) -> None:
    """Raise Forbidden unless the rule lets load such a program, signatures aside."""
    allowed = rule.programs
    if allowed.anything:
        return
    if kind == "builtin":
        if not allowed.builtin:
            raise forbidden(rule, "let you load builtins")
    elif kind == "instructions":
        raise forbidden(rule, "let you load instructions of your own")
    elif sha256 not in allowed.sha256:
        which = "" if sha256 is None else f" (the SHA-256 of this one: {sha256})"
        signed = " that are not signed with one of its keys" if allowed.keys else ""
        raise forbidden(rule, f"let you load objects of your own{signed}{which}")


def _check_object(rule: Rule, source: ObjectSource) -> None:
    """Raise Forbidden unless it is one of those that the rule names, or signed by a key of its."""
    if not _signed(source, rule.programs.keys):
        check_digest(rule, "object", source.sha256)


def _signed(source: ObjectSource, keys: tuple[Key, ...]) -> bool:
    """Whether one of the keys made the signature (Ed25519, of the object's bytes)."""
    if not keys or source.signature is None:
        return False
    # Only now: the library costs megabytes, and few policies have keys.
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    for key in keys:
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(source.signature, source.elf)
        except InvalidSignature:
            continue
        return True
    return False
