"""The index of what can be traced: names and globs to functions, addresses to names.

Made of the raw text of kallsyms and of tracefs's list of traceable functions. Two facts shape it
(both measured on 6.12 and 7.3): an address in tracefs lies 4 bytes behind the function's start
where the function begins with ENDBR, and a link made by such an address hands its program cookie 0;
so addresses are those of kallsyms, the starts. And a name can stand for several functions, of which
the kernel, asked by name, takes the first.

A function is known by its position, its place in tracefs's list: the kernel's own in the order of
their addresses, then those of the modules.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, islice
from operator import itemgetter, lt, sub
from typing import Literal, TypeVar

from kpmd.core.globs import VMLINUX, Glob
from kpmd.core.tables import Table, kallsyms_table, tracefs_table

#: How far behind a function's start its traceable place can lie (ENDBR or BTI: 4 bytes; a
#: patchable area of two instructions: 8).
_MOST_DELTA = 16

#: Suffixes that compilers add to a function that is still the one of its name (clang's LTO, gcc's
#: specialised copies). Not ``.cold`` and ``.part``, which are pieces of a function.
_SUFFIX = re.compile(r"\.(?:llvm|constprop|isra)\..*")

#: Characters of names that one search looks through before other threads get their turn.
_STRIDE = 1 << 15

T = TypeVar("T")

#: Why a name cannot be attached to.
Absence = Literal["unknown", "untraceable"]


@dataclass(frozen=True)
class Function:
    """One traceable function. ``address`` is 0 where the kernel hides or does not tell it."""

    symbol: str
    module: str | None
    address: int
    ambiguous: bool


class SymbolIndex:
    """Traceable functions by name, glob and address. Made by ``build``; it never changes."""

    def __init__(
        self,
        functions: Table,
        starts: array[int],
        other: dict[str, int],
        untraceable: str,
        candidates: frozenset[int],
    ) -> None:
        """``functions``: tracefs's; ``starts``: where each begins, 0 where that is not known.

        ``other``: further names of those addresses; ``untraceable``: names of functions that cannot
        be traced, a line break on both sides of each; ``candidates``: where functions of the names
        without a start begin, of which the kernel does not tell which can be traced.
        """
        self.candidates = candidates
        count = len(starts)
        self._text = f"\n{functions.text()}\n" if count else "\n"
        #: Names by position. The strings are shared by all that speak of the function.
        self.names = self._text[1:-1].split("\n") if count else []
        names = self.names
        self._first = dict(zip(reversed(names), range(count - 1, -1, -1), strict=True))
        #: Names that stand for several functions, with all of them.
        self.repeated = _repeated(names, self._first)
        self.addresses = starts
        self._deltas = _deltas(functions.addresses, starts)
        self._modules = functions.modules
        self._module_of = functions.module_of
        self._stripped: dict[str, list[int]] = {}
        for name in dict.fromkeys(name for name in names if "." in name):
            if (base := _SUFFIX.sub("", name)) != name:
                self._stripped.setdefault(base, []).extend(
                    self.repeated.get(name, [self._first[name]])
                )
        known: Sequence[int] = range(count)
        self._sorted = starts
        if not (count and starts[0] and all(map(lt, starts, islice(starts, 1, None)))):
            known = [position for position, start in enumerate(starts) if start]
            known.sort(key=starts.__getitem__)
            self._sorted = array("Q", [starts[position] for position in known])
        self._by_address = known if isinstance(known, range) else array("I", known)
        self._untraceable = untraceable
        # Other names of functions that tracefs does not list. Few (57 on 6.12), but among them are
        # __x64_sys_getpid and the like: tracefs has that function as __do_sys_getpid.
        self._aliases: dict[str, int] = {}
        for name, address in other.items():
            if (position := self.at(address)) is not None:
                self._aliases[name] = self._first[name] = position
        self._alias_names = list(self._aliases)
        #: Whether every traceable function's address is known.
        self.has_addresses = count > 0 and len(known) == count
        #: Whether any is: the kernel does not hide them.
        self.has_any_address = bool(known)
        #: Whether the kernel told at all what can be traced.
        self.knows_traceable = count > 0

    @classmethod
    def build(
        cls, kallsyms: bytes, functions: bytes | None, functions_have_addresses: bool
    ) -> SymbolIndex:
        """Join the raw files. ``functions`` None: nothing is known of what can be traced."""
        traceable = tracefs_table(functions or b"", functions_have_addresses)
        symbols = kallsyms_table(kallsyms)
        candidates: frozenset[int] = frozenset()
        if not any(symbols.addresses):
            starts = array("Q", bytes(8 * len(traceable.addresses)))
        elif functions_have_addresses:
            starts = _starts(traceable.addresses, symbols.addresses)
        else:
            starts, candidates = _starts_by_name(traceable, symbols)
        return cls(traceable, starts, *_rest(symbols, traceable, starts), candidates)

    def __len__(self) -> int:
        return len(self.addresses)

    # One function

    def module(self, position: int) -> str | None:
        """Its module, None for the kernel itself."""
        return self._modules[self._module_of[position]] or None

    def function(self, position: int) -> Function:
        """All of it. Positions of ``page`` behind the last function stand for other names."""
        if position >= len(self):
            name = self._alias_names[position - len(self)]
            at = self._aliases[name]
            return Function(name, self.module(at), self.addresses[at], False)
        name = self.names[position]
        return Function(
            name, self.module(position), self.addresses[position], name in self.repeated
        )

    def at(self, address: int) -> int | None:
        """The function that starts at ``address`` or has its traceable place (start + 4) there."""
        index = bisect_right(self._sorted, address) - 1
        if index < 0:
            return None
        position = self._by_address[index]
        behind = address - self._sorted[index]
        return position if behind in (0, self._deltas[position]) else None

    @staticmethod
    def pick(column: Sequence[T], positions: Sequence[int]) -> list[T]:
        """The column's values at some positions; quick for many."""
        if len(positions) < 2:
            return [column[position] for position in positions]
        return list(itemgetter(*positions)(column))

    def modules(self, positions: Sequence[int]) -> dict[int, str]:
        """The modules of some functions, by place in ``positions``; without the kernel's own."""
        if len(self._modules) == 1:
            return {}
        numbers = self.pick(self._module_of, positions)
        if not any(numbers):
            return {}
        return {place: self._modules[number] for place, number in enumerate(numbers) if number}

    # Names

    def first(self, names: Sequence[str]) -> list[int | None]:
        """For each name the function that the kernel itself would take; quick for many."""
        return list(map(self._first.get, names))

    def find(self, name: str, module: Glob | None = None) -> list[int]:
        """All functions of that name, the one first that the kernel would take.

        Without one of that name: of the compiler's variants of it (``name.isra.0``).
        """
        found = self.repeated.get(name)
        if found is None:
            first = self._first.get(name)
            found = self._stripped.get(name, []) if first is None else [first]
        return self._in_modules(found, module)

    def _in_modules(self, positions: Sequence[int], glob: Glob | None) -> list[int]:
        if glob is None or glob.module is None:
            return list(positions)
        taken = bytes(glob.matches_module(name or VMLINUX) for name in self._modules)
        return [each for each in positions if taken[self._module_of[each]]]

    def kernel_takes(self, position: int) -> bool:
        """Whether the kernel, given its name alone, takes this function and no other."""
        return self._first[self.names[position]] == position

    def absence(self, name: str) -> Absence:
        """Why there is no such function to attach to."""
        if name.startswith("__pfx_") and name.removeprefix("__pfx_") in self._first:
            return "untraceable"
        return "untraceable" if name in self._untraceable_names else "unknown"

    @cached_property
    def _untraceable_names(self) -> frozenset[str]:
        """Made only when a name is missed."""
        return frozenset(self._untraceable.split("\n")) - {""}

    # Globs

    def glob(self, glob: Glob) -> list[int]:
        """All functions that match, each once, in the order of their positions."""
        if glob.literal:
            return sorted(self.find(glob.name, glob))
        if glob.name == "*":
            return self._in_modules(range(len(self)), glob)
        names = set(self._search(glob, self._text, 0))
        found = {self._first[name] for name in names}
        for name in self.repeated.keys() & names:
            found.update(self.repeated[name])
        for base, positions in self._stripped.items():
            if glob.matches_name(base):
                found.update(positions)
        found.update(at for name, at in self._aliases.items() if glob.matches_name(name))
        return self._in_modules(sorted(found), glob)

    @staticmethod
    def _search(glob: Glob, text: str, start: int) -> Iterator[str]:
        """Matching names behind the offset ``start``, a piece of the text at a time."""
        pattern = glob.in_text
        while start < len(text) - 1:
            end = text.find("\n", start + _STRIDE)
            end = len(text) if end < 0 else end + 1
            yield from pattern.findall(text, start, end)
            start = end - 1

    def untraceable(self, glob: Glob) -> list[str]:
        """Names of functions that match and cannot be traced; modules are not told apart."""
        if glob.module not in (None, VMLINUX, "*"):
            return []
        return list(self._search(glob, self._untraceable, 0))

    def page(self, glob: Glob, after: int, limit: int) -> tuple[list[int], int | None]:
        """At most ``limit`` matching functions from position ``after`` on, and where to go on."""
        found: list[int] = []
        for position in range(after, len(self) + len(self._alias_names)):
            if position < len(self):
                name, module = self.names[position], self.module(position)
                taken = glob.matches(name, module) or (
                    "." in name and glob.matches(_SUFFIX.sub("", name), module)
                )
            else:
                function = self.function(position)
                taken = glob.matches(function.symbol, function.module)
            if taken:
                if len(found) == limit:
                    return found, position
                found.append(position)
        return found, None


def blacklist(text: bytes) -> frozenset[str]:
    """Names in ``kprobes/blacklist`` of debugfs (``START-END<tab>NAME`` a line)."""
    return frozenset(
        line.rpartition(b"\t")[2].decode("ascii", "replace") for line in text.splitlines()
    )


def _repeated(names: list[str], first: dict[str, int]) -> dict[str, list[int]]:
    """Names that stand for several functions, with the positions of all of them."""
    found: dict[str, list[int]] = {}
    if len(first) < len(names):
        for position, name in enumerate(names):
            if first[name] != position:
                found.setdefault(name, [first[name]]).append(position)
    return found


def _deltas(places: array[int], starts: array[int]) -> bytes:
    """How far behind its start each function's traceable place lies."""
    try:
        deltas = bytes(map(sub, places, starts))
        if max(deltas, default=0) <= _MOST_DELTA:
            return deltas
    except ValueError:  # some are not known, on either side
        pass
    return bytes(
        place - start if start and 0 <= place - start <= _MOST_DELTA else 0
        for place, start in zip(places, starts, strict=True)
    )


def _rest(symbols: Table, traceable: Table, starts: array[int]) -> tuple[dict[str, int], str]:
    """Of the functions that tracefs does not list: other names of such, and all others."""
    listed = set(traceable.names())
    begun = set(starts) - {0}
    aliases: dict[str, int] = {}
    missing: dict[str, None] = {}
    strange = [
        (name, address)
        for name, address in zip(symbols.names(), symbols.addresses, strict=True)
        # __pfx_: the padding in front of a function.
        if name not in listed and name[:6] != "__pfx_"
    ]
    for name, address in strange:
        if address in begun:
            aliases.setdefault(name, address)
        else:
            missing[name] = None
    return aliases, "\n" + "\n".join(missing) + "\n"


def _starts(places: array[int], symbols: array[int]) -> array[int]:
    """Where the function of each traceable place starts; 0 where no symbol is near."""
    known = set(symbols)
    starts = array(
        "Q",
        [place if place in known else place - 4 if place - 4 in known else 0 for place in places],
    )
    if 0 in starts:
        ordered = sorted(known)
        for position in compress(range(len(starts)), [not start for start in starts]):
            index = bisect_right(ordered, places[position]) - 1
            if index >= 0 and places[position] - ordered[index] <= _MOST_DELTA:
                starts[position] = ordered[index]
    return starts


def _starts_by_name(traceable: Table, symbols: Table) -> tuple[array[int], frozenset[int]]:
    """Before 6.5 tracefs tells names only: an address is sure if all of its name are traceable.

    Returns the starts, and the addresses of those names of which not all are.
    """
    wanted: dict[tuple[str, str], list[int]] = {}
    for position, name in enumerate(traceable.names()):
        module = traceable.modules[traceable.module_of[position]]
        wanted.setdefault((name, module), []).append(position)
    found: dict[tuple[str, str], list[int]] = {}
    for index, name in enumerate(symbols.names()):
        key = (name, symbols.modules[symbols.module_of[index]])
        if key in wanted:
            found.setdefault(key, []).append(symbols.addresses[index])
    starts = array("Q", bytes(8 * len(traceable.addresses)))
    candidates: set[int] = set()
    for key, positions in wanted.items():
        addresses = found.get(key, [])
        if len(addresses) == len(positions):
            for position, address in zip(positions, sorted(addresses), strict=True):
                starts[position] = address
        else:
            candidates.update(addresses)
    return starts, frozenset(candidates)
