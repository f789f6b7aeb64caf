"""The deny list: functions that are dangerous or useless to trace in the mass, with reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from kpmd.core.globs import Glob, GlobError
from kpmd.core.symbols import SymbolIndex

#: A glob, which may have its module behind a blank, and the rest of the line.
_LINE = re.compile(r"(?P<glob>\S+(?:\s+\[[^\]\s]*\])?)\s+(?P<reason>\S.*)")


class DenyListError(ValueError):
    """The file is no deny list; the message names the line."""


@dataclass(frozen=True)
class Denied:
    """One line: what it takes out, and why."""

    glob: Glob
    reason: str


#: Functions by position in an index, and why they are denied.
Denials = Mapping[int, str]


class DenyList:
    """Lines of ``GLOB REASON``; empty lines and those that begin with # are left out."""

    def __init__(self, lines: Iterable[Denied] = ()) -> None:
        self.lines = tuple(lines)

    @classmethod
    def parse(cls, text: str) -> DenyList:
        """Read the file's text. Raises DenyListError."""
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            parts = _LINE.fullmatch(line.strip())
            if parts is None:
                raise DenyListError(f"line {number}: the reason is missing behind {line.strip()!r}")
            try:
                lines.append(Denied(Glob.parse(parts["glob"]), parts["reason"]))
            except GlobError as error:
                raise DenyListError(f"line {number}: the glob {error}") from error
        return cls(lines)

    def denials(self, index: SymbolIndex) -> Denials:
        """What the list takes out of an index: worked out once for each, since it takes 0.1 s."""
        if not self.lines:
            return {}
        found = {}
        for position, name in enumerate(index.names):
            if self._any_line.fullmatch(name):
                reason = self._reason(name, index.module(position))
                if reason is not None:
                    found[position] = reason
        return found

    def reason(self, name: str) -> str | None:
        """Why a function of the kernel itself is denied; None: it is not."""
        if not self.lines or not self._any_line.fullmatch(name):
            return None
        return self._reason(name, None)

    @cached_property
    def _any_line(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{line.glob.expression})" for line in self.lines))

    def _reason(self, name: str, module: str | None) -> str | None:
        matching = (line.reason for line in self.lines if line.glob.matches(name, module))
        return next(matching, None)
