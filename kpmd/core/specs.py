"""What a client asks for, checked for shape by the API and for sense here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kpmd.core.model import Attach, Lifetime, LinkKind
from kpmd.errors import Invalid, WrongAttachType

#: The most targets of one link (MAX_KPROBE_MULTI_CNT of the kernel).
MAX_TARGETS = 1 << 20

#: The longest symbol the kernel can have (KSYM_NAME_LEN without its NUL).
MAX_SYMBOL = 511


@dataclass(frozen=True)
class InstructionsSource:
    """Raw eBPF instructions, no maps."""

    instructions: bytes
    license: str
    name: str


@dataclass(frozen=True)
class ObjectSource:
    """An ELF object. ``globals`` and ``max_entries`` are set before it is loaded."""

    elf: bytes
    programs: Sequence[str] | None = None
    globals: Mapping[str, int | bytes] = field(default_factory=dict)
    max_entries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramSpec:
    """A program, or the programs of one object, to load."""

    source: InstructionsSource | ObjectSource
    attach: Attach | None
    labels: Mapping[str, str]
    lifetime: Lifetime
    want_log: bool = False


@dataclass(frozen=True)
class LinkSpec:
    """A link to make. Exactly one of ``symbols`` and ``addresses`` is given."""

    program: str
    kind: LinkKind
    symbols: Sequence[str] | None
    addresses: Sequence[int] | None
    cookies: Sequence[int] | None
    labels: Mapping[str, str]
    lifetime: Lifetime

    def check(self) -> None:
        """The reference library's checks, in its order, and those for names. Raises Invalid."""
        if self.symbols is None and self.addresses is None:
            raise Invalid("give symbols or addresses: a link needs targets")
        if self.symbols is not None and self.addresses is not None:
            raise Invalid("give either symbols or addresses, not both")
        which = "symbols" if self.symbols is not None else "addresses"
        targets: Sequence[str] | Sequence[int] = self.symbols or self.addresses or ()
        if not targets:
            raise Invalid.at([which], "must not be empty")
        if len(targets) > MAX_TARGETS:
            raise Invalid.at(
                [which], f"has {len(targets)} entries; one link takes {MAX_TARGETS} at the most"
            )
        if self.cookies is not None and len(self.cookies) != len(targets):
            raise Invalid.at(
                ["cookies"],
                f"has {len(self.cookies)} entries for {len(targets)} {which}; give one for each",
            )
        for index, name in enumerate(self.symbols or ()):
            _check_symbol(index, name)
        check_distinct(which, targets)


def _check_symbol(index: int, name: str) -> None:
    if not name:
        raise Invalid.at(["symbols", index], "must not be empty")
    if "\0" in name:
        raise Invalid.at(["symbols", index], "has a NUL, where the kernel would cut the name")
    if len(name.encode()) > MAX_SYMBOL:
        raise Invalid.at(
            ["symbols", index],
            f"is longer than the {MAX_SYMBOL} bytes of the kernel's longest name",
        )


def check_distinct(which: str, targets: Sequence[str] | Sequence[int]) -> None:
    """Raise Invalid where a target stands twice; the kernel's own word for it is a bare ESRCH."""
    if len(set(targets)) == len(targets):
        return
    seen: dict[object, int] = {}
    for index, target in enumerate(targets):
        if target in seen:
            shown = target if isinstance(target, str) else f"0x{target:016x}"
            raise Invalid.at(
                [which, index],
                f"{shown} stands at {seen[target]} already; name each function once",
            )
        seen[target] = index


def check_kind(attach: Attach, kind: LinkKind) -> None:
    """Raise WrongAttachType where a program made for ``attach`` cannot be linked as ``kind``.

    The kernel itself takes such a program at load, and at link says a bare EINVAL.
    """
    if (attach == "kprobe_session") != (kind == "session"):
        fits = "session" if attach == "kprobe_session" else "kprobe or kretprobe"
        raise WrongAttachType(
            f"the program was loaded for {attach}: link it as {fits}, "
            f"or load it anew for a {kind} link"
        )
