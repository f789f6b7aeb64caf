"""The index of what can be traced: names to addresses and back, in compact form.

Made of the raw text of kallsyms and of tracefs's list of traceable functions. Two facts shape it
(both measured on 6.12 and 7.3): an address in tracefs lies 4 bytes behind the function's start
where the function begins with ENDBR, and a link made by such an address hands its program cookie 0;
so addresses are those of kallsyms, the starts. And a name can stand for several functions, of which
the kernel, asked by name, takes the first.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: How far behind a function's start its traceable place can lie (ENDBR or BTI: 4 bytes; a
#: patchable area of two instructions: 8).
_MOST_DELTA = 16

_KALLSYMS = re.compile(rb"^([0-9a-f]+) [tTwW] ([^\t\n]+)(?:\t\[([^\]\n]+)\])?$", re.MULTILINE)
_WITH_ADDRESS = re.compile(rb"^([0-9a-f]+) ([^ \n]+)(?: \[([^\]\n]+)\])?$", re.MULTILINE)
_NAMES_ONLY = re.compile(rb"^([^ \n]+)(?: \[([^\]\n]+)\])?$", re.MULTILINE)


@dataclass(frozen=True)
class Function:
    """One traceable function. ``address`` is 0 where the kernel hides or does not tell it."""

    symbol: str
    module: str | None
    address: int
    ambiguous: bool


def _starts(kallsyms: bytes) -> list[tuple[int, bytes, bytes]]:
    return [
        (int(address, 16), name, module) for address, name, module in _KALLSYMS.findall(kallsyms)
    ]


class SymbolIndex:
    """Traceable functions by name and by address. Build it with ``build``; it never changes."""

    def __init__(
        self,
        rows: Sequence[tuple[bytes, int, int, bytes]],
        aliases: dict[bytes, int],
        complete: bool,
    ) -> None:
        """``rows``: (name, address, delta, module); ``aliases``: other names of those addresses."""
        rows = sorted(rows, key=lambda row: (row[0], row[3] != b"", row[1]))
        names = [row[0] for row in rows]
        self._text = b"\n".join(names)
        self._offsets = array("I", [0])
        for name in names:
            self._offsets.append(self._offsets[-1] + len(name) + 1)
        self._addresses = array("Q", [row[1] for row in rows])
        self._deltas = bytes(row[2] for row in rows)
        self._module_names = sorted({row[3] for row in rows})
        numbers = {name: number for number, name in enumerate(self._module_names)}
        self._modules = array("H", [numbers[row[3]] for row in rows])
        by_address = sorted(
            (position for position in range(len(rows)) if rows[position][1]),
            key=self._addresses.__getitem__,
        )
        self._by_address = array("I", by_address)
        self._sorted_addresses = array("Q", [self._addresses[each] for each in by_address])
        self._aliases = aliases
        #: Whether every traceable function's address is known.
        self.has_addresses = complete and len(by_address) == len(rows)
        #: Whether the kernel told at all what can be traced.
        self.knows_traceable = bool(rows)

    @classmethod
    def build(
        cls, kallsyms: bytes, functions: bytes | None, functions_have_addresses: bool
    ) -> SymbolIndex:
        """Join the raw files. ``functions`` None: nothing is known of what can be traced."""
        starts = _starts(kallsyms)
        if functions is None:
            return cls([], {}, False)
        hidden = not any(address for address, _, _ in starts)
        if functions_have_addresses and not hidden:
            return cls._with_addresses(starts, functions)
        if functions_have_addresses:
            listed = [(name, module) for _, name, module in _WITH_ADDRESS.findall(functions)]
        else:
            listed = _NAMES_ONLY.findall(functions)
        return cls._by_names([] if hidden else starts, listed)

    @classmethod
    def _with_addresses(
        cls, starts: list[tuple[int, bytes, bytes]], functions: bytes
    ) -> SymbolIndex:
        known = sorted({address for address, _, _ in starts})
        rows = []
        traceable: dict[int, bytes] = {}
        for hexadecimal, name, module in _WITH_ADDRESS.findall(functions):
            place = int(hexadecimal, 16)
            position = bisect_right(known, place) - 1
            start = known[position] if position >= 0 else 0
            if place - start > _MOST_DELTA:
                continue  # no function of kallsyms starts here: nothing to attach to by address
            rows.append((name, start, place - start, module))
            traceable[start] = name
        aliases: dict[bytes, int] = {}
        listed = {row[0] for row in rows}
        for address, name, _ in starts:
            if address in traceable and name not in listed:
                aliases.setdefault(name, address)
        return cls(rows, aliases, True)

    @classmethod
    def _by_names(
        cls, starts: list[tuple[int, bytes, bytes]], listed: list[tuple[bytes, bytes]]
    ) -> SymbolIndex:
        """Before 6.5 tracefs tells names only: an address is sure if all of its name are."""
        wanted = Counter(listed)
        found: dict[tuple[bytes, bytes], list[int]] = {}
        for address, name, module in starts:
            if (name, module) in wanted:
                found.setdefault((name, module), []).append(address)
        rows: list[tuple[bytes, int, int, bytes]] = []
        for (name, module), count in wanted.items():
            addresses = found.get((name, module), [])
            sure = addresses if len(addresses) == count else [0] * count
            rows.extend((name, address, 0, module) for address in sure)
        return cls(rows, {}, bool(starts))

    def __len__(self) -> int:
        return len(self._addresses)

    def _name(self, position: int) -> bytes:
        return self._text[self._offsets[position] : self._offsets[position + 1] - 1]

    def _range(self, name: bytes) -> range:
        """Positions of the functions of that name, as the kernel would meet them."""
        every = range(len(self))
        first = bisect_left(every, name, key=self._name)
        last = first
        while last < len(self) and self._name(last) == name:
            last += 1
        return range(first, last)

    def _function(self, position: int) -> Function:
        module = self._module_names[self._modules[position]]
        name = self._name(position)
        ambiguous = (position > 0 and self._name(position - 1) == name) or (
            position + 1 < len(self) and self._name(position + 1) == name
        )
        return Function(
            name.decode(),
            module.decode() or None,
            self._addresses[position],
            ambiguous,
        )

    def find(self, symbol: str) -> list[Function]:
        """All traceable functions of that name, first the one that the kernel would take.

        An alias (another name of the same address, which tracefs does not list) is found too.
        """
        name = symbol.encode()
        if found := self._range(name):
            return [self._function(position) for position in found]
        address = self._aliases.get(name)
        if address is None:
            return []
        at = self.at(address)
        return [Function(symbol, at.module if at else None, address, False)]

    def at(self, address: int) -> Function | None:
        """The function that starts at ``address`` or has its traceable place (start + 4) there."""
        index = bisect_right(self._sorted_addresses, address) - 1
        if index < 0:
            return None
        position = self._by_address[index]
        if address - self._sorted_addresses[index] not in (0, self._deltas[position]):
            return None
        return self._function(position)

    def __iter__(self) -> Iterator[Function]:
        return (self._function(position) for position in range(len(self)))


def names_in(kallsyms: bytes, names: set[str]) -> set[str]:
    """Which of ``names`` the kernel has at all, traceable or not, functions or data."""
    present = set(re.findall(rb"^[0-9a-f]+ \S ([^\t\n]+)", kallsyms, re.MULTILINE))
    return {name for name in names if name.encode() in present}
