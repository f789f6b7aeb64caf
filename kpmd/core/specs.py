"""What a client asks for, checked for shape by the API and for sense here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from kpmd.core.globs import Glob, GlobError
from kpmd.core.model import Attach, Lifetime, LinkKind, Mechanism
from kpmd.errors import Invalid, WrongAttachType

#: The most targets of one link (MAX_KPROBE_MULTI_CNT of the kernel).
MAX_TARGETS = 1 << 20

#: The longest symbol the kernel can have (KSYM_NAME_LEN without its NUL).
MAX_SYMBOL = 511

#: Globs of one request at the most. Each is looked for among all names, which takes up to 10 ms.
MAX_GLOBS = 256

OnUntraceable = Literal["error", "skip"]
OnAmbiguous = Literal["first", "all", "error"]


@dataclass(frozen=True)
class InstructionsSource:
    """Raw eBPF instructions, no maps."""

    instructions: bytes
    license: str
    name: str


@dataclass(frozen=True)
class ObjectSource:
    """An ELF object. ``globals`` and ``max_entries`` are set before it is loaded.

    ``signature``: of its bytes, for policies that ask for one.
    """

    elf: bytes
    programs: Sequence[str] | None = None
    globals: Mapping[str, int | bytes] = field(default_factory=dict)
    max_entries: Mapping[str, int] = field(default_factory=dict)
    signature: bytes | None = None

    @cached_property
    def sha256(self) -> str:
        """The object's SHA-256 in hex. The first look takes a while for a large one."""
        return hashlib.sha256(self.elf).hexdigest()


@dataclass(frozen=True)
class BuiltinSource:
    """A program that ships with kpmd; which object it is depends on what the kernel has."""

    name: str
    globals: Mapping[str, int | bytes] = field(default_factory=dict)
    max_entries: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramSpec:
    """A program, or the programs of one object, to load."""

    source: InstructionsSource | ObjectSource | BuiltinSource
    attach: Attach | None
    labels: Mapping[str, str]
    lifetime: Lifetime
    want_log: bool = False


@dataclass(frozen=True)
class TargetSpec:
    """What to attach to. Exactly one of ``symbols``, ``addresses`` and ``patterns`` is given.

    ``on_untraceable`` None: an error for symbols and addresses, skipped for patterns.
    """

    symbols: Sequence[str] | None = None
    addresses: Sequence[int] | None = None
    patterns: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    cookies: Sequence[int] | None = None
    on_untraceable: OnUntraceable | None = None
    on_ambiguous: OnAmbiguous = "first"

    @property
    def which(self) -> Literal["symbols", "addresses", "patterns"]:
        """The field that names the targets."""
        if self.symbols is not None:
            return "symbols"
        return "addresses" if self.addresses is not None else "patterns"

    @property
    def given(self) -> Sequence[str] | Sequence[int]:
        """What that field holds."""
        return self.symbols or self.addresses or self.patterns or ()

    @property
    def skips(self) -> bool:
        """Whether what cannot be traced is left out, rather than an error."""
        return self.on_untraceable == "skip" or (
            self.on_untraceable is None and self.patterns is not None
        )

    def check(self) -> None:
        """The reference library's checks, in its order, and those for names. Raises Invalid."""
        fields = [self.symbols, self.addresses, self.patterns]
        given = sum(each is not None for each in fields)
        if given == 0:
            raise Invalid("give symbols, addresses or patterns: a link needs targets")
        if given > 1:
            raise Invalid("give only one of symbols, addresses and patterns")
        which, targets = self.which, self.given
        if not targets:
            raise Invalid.at([which], "must not be empty")
        if len(targets) > MAX_TARGETS:
            raise Invalid.at(
                [which], f"has {len(targets)} entries; one link takes {MAX_TARGETS} at the most"
            )
        self._check_cookies(len(targets))
        if self.exclude and self.patterns is None:
            raise Invalid.at(["exclude"], "goes with patterns; leave out of symbols what you mean")
        if self.symbols is not None:
            _check_symbols(self.symbols)
        for field_, globs in (("patterns", self.patterns or ()), ("exclude", self.exclude)):
            check_globs(field_, globs)
        check_distinct(which, targets)

    def _check_cookies(self, targets: int) -> None:
        if self.cookies is None:
            return
        if self.patterns is not None:
            raise Invalid.at(
                ["cookies"], "need to know their functions: give symbols or addresses with them"
            )
        if len(self.cookies) != targets:
            raise Invalid.at(
                ["cookies"],
                f"has {len(self.cookies)} entries for {targets} {self.which}; give one for each",
            )


@dataclass(frozen=True)
class LinkSpec:
    """A link to make. ``mechanism`` None: whatever the kernel has."""

    program: str
    kind: LinkKind
    targets: TargetSpec
    labels: Mapping[str, str]
    lifetime: Lifetime
    mechanism: Mechanism | None = None


def _check_symbols(names: Sequence[str]) -> None:
    text = "".join(names)
    longest = max(map(len, names))
    if "" not in names and "\0" not in text and text.isascii() and longest <= MAX_SYMBOL:
        return  # as nearly always; one by one only to tell which is wrong
    for index, name in enumerate(names):
        _check_symbol(index, name)


def _check_symbol(index: int, name: str) -> None:
    if not name:
        raise Invalid.at(["symbols", index], "must not be empty")
    if "\0" in name:
        raise Invalid.at(["symbols", index], "has a NUL, where the kernel would cut the name")
    if len(name) > MAX_SYMBOL or len(name.encode()) > MAX_SYMBOL:
        raise Invalid.at(
            ["symbols", index],
            f"is longer than the {MAX_SYMBOL} bytes of the kernel's longest name",
        )


def check_globs(field_: str, texts: Sequence[str]) -> list[Glob]:
    """Read globs. Raises Invalid that names the one that is none."""
    if len(texts) > MAX_GLOBS:
        raise Invalid.at([field_], f"has {len(texts)} entries; {MAX_GLOBS} are the most")
    globs = []
    for index, text in enumerate(texts):
        try:
            globs.append(Glob.parse(text))
        except GlobError as error:
            raise Invalid.at([field_, index], str(error)) from None
    return globs


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
