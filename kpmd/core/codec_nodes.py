"""What a codec is made of: numbers, text, arrays, and structs, each told as JSON and taken back.

A node writes itself twice: into a ``Flat``, from which many values are read at once, and, for one
value from a client, into bytes. Sizes and offsets are those of the type, and were checked before.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from kpmd.core.codec_rows import NUMBER_CHARACTERS, TEXT_CHARACTERS, Column, Flat, Rows
from kpmd.errors import Invalid

Loc: TypeAlias = Sequence[str | int]

#: A string as JSON, other characters than control characters as they are.
quoted = json.JSONEncoder(ensure_ascii=False).encode

#: What a JSON number holds exactly wherever it is read: a double's bits.
_EXACT_BITS = 53

#: Bytes of a union at the most of which several members may be given.
_MOST_UNION = 4096

#: Names told in a message at the most.
_MOST_NAMES = 20

#: Bytes of a text at the most that is remembered, and how many of them.
_REMEMBERED_BYTES, _REMEMBERED = 64, 1024

_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}
_NUMBER = re.compile(r"(-?[0-9]{1,40})|0[xX]([0-9a-fA-F]{1,32})")


class Node(Protocol):
    """A type. ``last``: nothing stands behind it, so that a flexible array may go on."""

    @property
    def size(self) -> int:
        """Its bytes, without a flexible array."""

    def flatten(self, flat: Flat, at: int, last: bool) -> None:
        """Add its text and columns, those of a value at ``at``."""

    def write(self, buffer: bytearray, at: int, value: object, loc: Loc, last: bool) -> None:
        """Put a value into a buffer that is zero there. Raises Invalid at ``loc``."""


class Truth(dict[int, str]):
    """The JSON text of a bool: what is not 0 is true."""

    def __missing__(self, number: int) -> str:
        return "true"


class Enumerators(dict[int, str]):
    """The JSON texts of the numbers that have a name; others are told as numbers."""

    def __init__(self, names: dict[str, int], template: str) -> None:
        # Of several names of a number the first one counts.
        super().__init__((number, quoted(name)) for name, number in reversed(names.items()))
        self.names = names
        self.template = template
        self.longest = max(map(len, self.values()), default=0)

    def __missing__(self, number: int) -> str:
        return self.template % number


class Texts(dict[bytes, str]):
    """The JSON text of bytes up to the first NUL; the short ones are remembered, some of them."""

    def __missing__(self, raw: bytes) -> str:
        made = quoted(raw.split(b"\0", 1)[0].decode(errors="replace"))
        if len(raw) <= _REMEMBERED_BYTES:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[raw] = made
        return made


@dataclass(frozen=True)
class Number:
    """An integer, pointer, bool or enum: ``bits`` of ``size`` bytes, from ``shift`` on."""

    size: int
    signed: bool
    bits: int
    shift: int = 0
    pointer: bool = False
    words: Truth | Enumerators | None = None

    @property
    def template(self) -> str:
        """How it stands in a JSON text."""
        if self.words is not None:
            return "%s"
        return '"0x%016x"' if self.pointer else integer_template(self.bits)

    def flatten(self, flat: Flat, at: int, last: bool) -> None:
        """Its column: bytes where it is not just an integer of ``struct``."""
        code = f"{self.size}s"
        read: Callable[[Any], int | str] | None = self._read
        if self.bits == self.size * 8 and self.size in _CODES:
            code = _CODES[self.size] if self.signed else _CODES[self.size].upper()
            read = None if self.words is None else self.words.__getitem__
        most = NUMBER_CHARACTERS
        if isinstance(self.words, Enumerators):
            most = max(most, self.words.longest)
        flat.column(Column(at, self.size, code, read, most), self.template)

    def write(self, buffer: bytearray, at: int, value: object, loc: Loc, last: bool) -> None:
        """Its bits, beside those of other bitfields."""
        number = self._number(value, loc) & (1 << self.bits) - 1
        # Bitfields share bytes, and all of the buffer was zero.
        old = int.from_bytes(buffer[at : at + self.size], "little")
        buffer[at : at + self.size] = (old | number << self.shift).to_bytes(self.size, "little")

    def _read(self, raw: bytes) -> int | str:
        number = int.from_bytes(raw, "little") >> self.shift & (1 << self.bits) - 1
        if self.signed and number >> self.bits - 1:
            number -= 1 << self.bits
        return number if self.words is None else self.words[number]

    def _number(self, value: object, loc: Loc) -> int:
        wanted = "an integer, or a string with one in decimal or, behind 0x, in hexadecimal"
        if isinstance(self.words, Truth):
            wanted = "true or false"
            number = int(value) if isinstance(value, bool) else None
        elif isinstance(self.words, Enumerators):
            wanted = f"an integer, or one of {listed(self.words.names)}"
            named = self.words.names.get(value) if isinstance(value, str) else None
            number = _integer(value) if named is None else named
        else:
            number = _integer(value)
        if number is None:
            raise Invalid.at(loc, f"must be {wanted}")
        low = -(1 << self.bits - 1) if self.signed else 0
        high = low + (1 << self.bits) - 1
        if not low <= number <= high:
            raise Invalid.at(loc, f"must be from {low} to {high}")
        return number


@dataclass(frozen=True)
class Float:
    """A float of 2, 4 or 8 bytes."""

    size: int

    @property
    def _code(self) -> str:
        return {2: "e", 4: "f", 8: "d"}[self.size]

    def flatten(self, flat: Flat, at: int, last: bool) -> None:
        """Its column."""
        flat.column(Column(at, self.size, self._code, _float_text), "%s")

    def write(self, buffer: bytearray, at: int, value: object, loc: Loc, last: bool) -> None:
        """Its bytes."""
        if isinstance(value, str) and value in ("nan", "inf", "-inf"):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Invalid.at(loc, 'must be a number, or "nan", "inf" or "-inf"')
        try:
            struct.pack_into(f"<{self._code}", buffer, at, value)
        except (OverflowError, struct.error):
            raise Invalid.at(loc, f"is too large for a float of {self.size} bytes") from None


@dataclass(frozen=True)
class Text:
    """An array of char: text up to the first NUL. Of size 0 and last, it goes to the end."""

    size: int
    texts: Texts

    def flatten(self, flat: Flat, at: int, last: bool) -> None:
        """Its column; of an empty one in the midst, no more than its text."""
        flexible = last and not self.size
        if not self.size and not flexible:
            flat.text('""')
            return
        size = None if flexible else self.size
        most = TEXT_CHARACTERS if flexible else 2 + TEXT_CHARACTERS * self.size
        flat.column(Column(at, size, f"{self.size}s", self.texts.__getitem__, most), "%s")

    def write(self, buffer: bytearray, at: int, value: object, loc: Loc, last: bool) -> None:
        """Its bytes; what is left of them stays zero."""
        if not isinstance(value, str):
            raise Invalid.at(loc, "must be a string")
        try:
            data = value.encode()
        except UnicodeEncodeError:
            raise Invalid.at(loc, "has half of a surrogate pair, which is no character") from None
        if b"\0" in data:
            raise Invalid.at(loc, "has a NUL, which would be its end: leave it out")
        if len(data) > self.size and (self.size or not last):
            raise Invalid.at(loc, f"has {len(data)} bytes; there is room for {self.size}")
        buffer[at : at + len(data)] = data


@dataclass(frozen=True)
class Array:
    """An array. Without elements and last, it goes to the end."""

    element: Node
    count: int

    @property
    def size(self) -> int:
        """Its bytes, without a flexible array."""
        return self.element.size * self.count

    def flatten(self, flat: Flat, at: int, last: bool) -> None:
        """Its elements' columns, or one for all that there are to the end."""
        if self._flexible(last):
            flat.column(self._rest(at), "%s")
            return
        flat.text("[")
        for index in range(self.count):
            if index:
                flat.text(",")
            self.element.flatten(flat, at + index * self.element.size, last=False)
        flat.text("]")

    def _flexible(self, last: bool) -> bool:
        return last and not self.count and self.element.size > 0

    def _rest(self, at: int) -> Column:
        """The column of as many elements as there are."""
        flat, size = Flat(), self.element.size
        self.element.flatten(flat, 0, last=False)
        rows = Rows(flat)

        def read(raw: bytes) -> str:
            whole = raw[: len(raw) - len(raw) % size]
            return f"[{','.join(rows.texts(whole, 0, size, size))}]"

        return Column(at, None, "", read, -(-(flat.longest + 1) // size))

    def write(self, buffer: bytearray, at: int, value: object, loc: Loc, last: bool) -> None:
        """Its elements; those left out stay zero."""
        if not isinstance(value, list):
            raise Invalid.at(loc, "must be a list")
        flexible = self._flexible(last)
        if len(value) > self.count and not flexible:
            raise Invalid.at(loc, f"has {len(value)} elements; there is room for {self.count}")
        size = self.element.size
        if flexible:
            buffer.extend(bytes(max(0, at + len(value) * size - len(buffer))))
        for index, each in enumerate(value):
            self.element.write(buffer, at + index * size, each, [*loc, index], last=False)


class Part(NamedTuple):
    """A member where it stands. Without a name its own members are those of the parent, too."""

    name: str | None
    offset: int
    node: Node


@dataclass(frozen=True)
class Record:
    """A struct or union, or a section with its variables."""

    name: str
    size: int
    union: bool
    parts: tuple[Part, ...]
    #: Which part each member stands in, by its name: also the members of parts without one.
    names: dict[str, int]

    def flatten(self, flat: Flat, at: int, last: bool) -> None:
        """Its members' columns."""
        before = "{"
        for name, offset, node, ends in self.members(at, last):
            flat.text(f"{before}{quoted(name)}:")
            node.flatten(flat, offset, ends)
            before = ","
        flat.text("{}" if before == "{" else "}")

    def members(self, at: int, last: bool) -> Iterator[tuple[str, int, Node, bool]]:
        """Name, place, node of each member, and whether it is the last."""
        for index, part in enumerate(self.parts):
            ends = last and (self.union or index == len(self.parts) - 1)
            if part.name is not None:
                yield part.name, at + part.offset, part.node, ends
            elif isinstance(part.node, Record):
                yield from part.node.members(at + part.offset, ends)

    def write(self, buffer: bytearray, at: int, value: object, loc: Loc, last: bool) -> None:
        """The members given; those of parts without a name, too."""
        if not isinstance(value, dict):
            raise Invalid.at(loc, f"must be an object with members of {self.name}")
        given: dict[int, dict[str, object]] = {}
        for name, each in value.items():
            if name not in self.names:
                raise Invalid.at(
                    [*loc, name],
                    f"is unknown: {self.name} has {listed(self.names) or 'no members'}",
                )
            given.setdefault(self.names[name], {})[name] = each
        if self.union and len(given) > 1:
            buffer[at : at + self.size] = self._agreed(given, loc)
            return
        for index, members in given.items():
            ends = last and (self.union or index == len(self.parts) - 1)
            self._write_part(self.parts[index], buffer, at, members, loc, ends)

    @staticmethod
    def _write_part(
        part: Part, buffer: bytearray, at: int, members: dict[str, object], loc: Loc, last: bool
    ) -> None:
        if part.name is None:
            part.node.write(buffer, at + part.offset, members, loc, last)
        else:
            here = [*loc, part.name]
            part.node.write(buffer, at + part.offset, members[part.name], here, last)

    def _agreed(self, given: dict[int, dict[str, object]], loc: Loc) -> bytes:
        """The bytes of a union that several of its members are given of.

        What was decoded has all of them, and shall be taken back; but they must say the same.
        """
        agreed = bytearray(self.size)
        written: list[tuple[int, int, bytes]] = []
        for index, members in given.items() if self.size <= _MOST_UNION else ():
            part = self.parts[index]
            own = bytearray(self.size)
            self._write_part(part, own, 0, members, loc, False)
            written.append((part.node.size, part.offset, bytes(own)))
        # The longest one last, so that all others must be found in it.
        for size, offset, one in sorted(written):
            agreed[offset : offset + size] = one[offset : offset + size]
        if not written or any(
            agreed[offset : offset + size] != one[offset : offset + size]
            for size, offset, one in written
        ):
            names = [name for members in given.values() for name in members]
            raise Invalid.at(
                loc, f"{listed(names)} share their bytes, and say different things: give one"
            )
        return bytes(agreed)


def integer_template(bits: int) -> str:
    """How an integer of so many bits stands in JSON: as a string where a number is not exact."""
    return "%d" if bits <= _EXACT_BITS else '"%d"'


def listed(names: Sequence[str] | dict[str, Any]) -> str:
    """Some names in a sentence, not too many of them."""
    some = list(names)[: _MOST_NAMES + 1]
    return ", ".join([*some[:_MOST_NAMES], "…"] if len(some) > _MOST_NAMES else some)


def _integer(value: object) -> int | None:
    """An integer, as such or in a string."""
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value)
        if found is None:
            return None
        return int(found[1]) if found[1] else int(found[2], 16)
    return value if type(value) is int else None


def _float_text(number: float) -> str:
    return repr(number) if math.isfinite(number) else f'"{number}"'
