"""Globs over function names: ``tcp_*``, ``vfs_?ead``, ``nft_*[nf_tables]``.

``*`` stands for any characters, ``?`` for one. A module stands behind the name in brackets, as the
kernel itself writes it in kallsyms and tracefs (and retsnoop takes it), and may be a glob too;
``[vmlinux]`` is the kernel without its modules. Matching takes time linear in the text however many
stars there are: what is between two stars is found leftmost, and never tried again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

#: The module name that stands for the kernel itself, as in BTF.
VMLINUX = "vmlinux"

#: Characters of a glob at the most: the longest symbol and the longest module name, in brackets.
MAX_GLOB = 511 + 64 + 2

_QUALIFIED = re.compile(r"(?P<name>[^\s\[\]]+)\s*(?:\[(?P<module>[^\s\[\]]+)\])?")


class GlobError(ValueError):
    """The text is no glob; the message says why."""


@dataclass(frozen=True)
class Glob:
    """A glob over names, with a module or glob of modules (None: any, and the kernel itself)."""

    name: str
    module: str | None = None

    @classmethod
    def parse(cls, text: str) -> Glob:
        """Read a glob. Raises GlobError."""
        if not text:
            raise GlobError("must not be empty")
        if len(text) > MAX_GLOB:
            raise GlobError(f"has {len(text)} characters; {MAX_GLOB} are the most")
        if not text.isascii() or not text.isprintable():
            raise GlobError("has characters that no symbol has")
        found = _QUALIFIED.fullmatch(text)
        if found is None:
            raise GlobError("must be NAME or NAME[MODULE], either of them with * and ?")
        return cls(re.sub(r"\*+", "*", found["name"]), found["module"])

    def __str__(self) -> str:
        return self.name if self.module is None else f"{self.name}[{self.module}]"

    @property
    def literal(self) -> bool:
        """Whether the name has no wildcard."""
        return "*" not in self.name and "?" not in self.name

    @property
    def expression(self) -> str:
        """The name as a regular expression."""
        return _translate(self.name)

    @cached_property
    def in_text(self) -> re.Pattern[str]:
        """Finds each matching name in a text of names with a line break on both sides of each."""
        return re.compile(r"\n(" + self.expression + r")(?=\n)")

    @cached_property
    def _name(self) -> re.Pattern[str]:
        return re.compile(self.expression)

    @cached_property
    def _module(self) -> re.Pattern[str] | None:
        return None if self.module is None else re.compile(_translate(self.module))

    def matches_name(self, name: str) -> bool:
        """Whether one name matches."""
        return self._name.fullmatch(name) is not None

    def matches_module(self, module: str) -> bool:
        """Whether a module (``vmlinux``: the kernel itself) matches."""
        return self._module is None or self._module.fullmatch(module) is not None

    def matches(self, name: str, module: str | None) -> bool:
        """Whether a function matches."""
        return self.matches_name(name) and self.matches_module(module or VMLINUX)


def _translate(glob: str) -> str:
    first, *parts = (re.escape(part).replace(r"\?", r"[^\n]") for part in glob.split("*"))
    if not parts:
        return first
    *middle, last = parts
    between = "".join(rf"(?>[^\n]*?{part})" for part in middle)
    return rf"{first}{between}[^\n]*{last}"
