"""From a type in BTF to the nodes of a codec, within bounds: whatever the BTF is, it ends.

Types that contain themselves, or too much, are refused; a pointer is but a number.
"""

from __future__ import annotations

from dataclasses import replace

from kpmd.core.btf import Btf, BtfError, Kind
from kpmd.core.codec_nodes import (
    Array,
    Enumerators,
    Float,
    Node,
    Number,
    Part,
    Record,
    Text,
    Texts,
    Truth,
    integer_template,
)

#: Of one type at the most: bytes, values in it, structs and arrays in one another, enumerators.
MAX_SIZE = 1 << 20
MAX_LEAVES = 4096
MAX_DEPTH = 32
MAX_ENUMERATORS = 4096

_POINTER_SIZE = 8


class Planner:
    """Makes the nodes of one type, or of one section."""

    def __init__(self, btf: Btf) -> None:
        self._btf = btf
        self._leaves = 0
        self._enumerators = 0
        self._texts = Texts()
        self._enums: dict[int, Number] = {}
        #: The structs, unions and arrays around what is being planned.
        self._around: list[int] = []

    def type(self, type_id: int) -> Node:
        """A type. Raises BtfError."""
        node = self._node(type_id, 1)
        if not node.size:
            raise self._error(type_id, "has no size")
        return node

    def section(self, name: str) -> Record:
        """A section as an object of its variables. Raises BtfError."""
        type_id = self._btf.find(name, Kind.DATASEC)
        variables = self._btf.variables(name)
        size = 0 if type_id is None else self._btf.size(type_id)
        if not 0 < size <= MAX_SIZE:
            raise BtfError(f"section {name!r} has {size} bytes; kpmd reads from 1 to {MAX_SIZE}")
        parts = []
        for variable in variables:
            node = self._node(variable.type, 1)
            if node.size > variable.size:
                raise BtfError(f"variable {variable.name!r} is smaller than its type")
            parts.append(Part(variable.name, variable.offset, node))
        return _record(name, size, False, parts)

    def _error(self, type_id: int, words: str) -> BtfError:
        return BtfError(f"{self._btf.describe(type_id)} {words}")

    def _node(self, type_id: int, times: int) -> Node:
        """A type that stands so many times in what is planned."""
        type_id = self._btf.resolve(type_id)
        kind = self._btf.kind(type_id)
        if kind == Kind.ARRAY:
            return self._array(type_id, times)
        if kind in (Kind.STRUCT, Kind.UNION):
            return self._struct(type_id, times)
        self._count(type_id, times)
        if kind == Kind.FLOAT:
            if (size := self._btf.size(type_id)) not in (2, 4, 8):
                raise self._error(type_id, f"has {size} bytes, which kpmd does not read")
            return Float(size)
        return self._number(type_id)

    def _count(self, type_id: int, times: int) -> None:
        self._leaves += times
        if self._leaves > MAX_LEAVES:
            around = self._around[0] if self._around else type_id
            raise self._error(
                around, f"has more than {MAX_LEAVES} values in it, which is too much to decode"
            )

    def _enter(self, type_id: int) -> None:
        if type_id in self._around:
            raise self._error(type_id, "contains itself")
        if len(self._around) >= MAX_DEPTH:
            raise self._error(self._around[0], f"is nested more than {MAX_DEPTH} deep")
        self._around.append(type_id)

    def _array(self, type_id: int, times: int) -> Node:
        element_id, count = self._btf.array(type_id)
        if self._is_char(element_id):
            self._count(type_id, times)
            self._fits(type_id, count)
            return Text(count, self._texts)
        self._enter(type_id)
        element = self._node(element_id, times * max(1, count))
        self._around.pop()
        self._fits(type_id, element.size * count)
        return Array(element, count)

    def _is_char(self, type_id: int) -> bool:
        type_id = self._btf.resolve(type_id)
        if self._btf.kind(type_id) != Kind.INT:
            return False
        integer = self._btf.integer(type_id)
        if integer.size != 1 or integer.bits != 8 or integer.boolean:
            return False
        return integer.char or self._btf.name(type_id) == "char"

    def _fits(self, type_id: int, size: int) -> None:
        if size > MAX_SIZE:
            raise self._error(type_id, f"has {size} bytes; {MAX_SIZE} are the most to decode")

    def _struct(self, type_id: int, times: int) -> Record:
        self._enter(type_id)
        size = self._btf.size(type_id)
        self._fits(type_id, size)
        parts = []
        for member in self._btf.members(type_id):
            offset, node = self._member(member.type, member.bit_offset, member.bits, times)
            if offset + node.size > size:
                raise self._error(type_id, f"is smaller than its member {member.name!r} needs")
            if member.name:
                parts.append(Part(member.name, offset, node))
            elif isinstance(node, Record):
                parts.append(Part(None, offset, node))
            # Anything else without a name is padding.
        if not parts:
            self._count(type_id, times)
        self._around.pop()
        union = self._btf.kind(type_id) == Kind.UNION
        return _record(self._btf.describe(type_id), size, union, parts)

    def _member(
        self, type_id: int, bit_offset: int, bits: int | None, times: int
    ) -> tuple[int, Node]:
        """A member's place and node: a bitfield as the bytes in which it has a part."""
        node = self._node(type_id, times)
        offset, shift = divmod(bit_offset, 8)
        if bits is None and not shift:
            return offset, node
        if not isinstance(node, Number):
            raise self._error(type_id, "stands where only a number can: it is a bitfield")
        if bits is not None and bits > node.bits:
            raise self._error(type_id, f"is the type of a bitfield of {bits} bits")
        bits = bits or node.bits
        offset, shift = divmod(bit_offset + node.shift, 8)
        return offset, replace(node, size=(shift + bits + 7) // 8, bits=bits, shift=shift)

    def _number(self, type_id: int) -> Number:
        kind = self._btf.kind(type_id)
        if kind == Kind.INT:
            return self._integer(type_id)
        if kind == Kind.PTR:
            return Number(_POINTER_SIZE, False, 8 * _POINTER_SIZE, pointer=True)
        if kind in (Kind.ENUM, Kind.ENUM64):
            if type_id not in self._enums:
                self._enums[type_id] = self._enum(type_id)
            return self._enums[type_id]
        if kind == Kind.FWD:
            raise self._error(type_id, "is declared, but its members are not in the BTF")
        raise self._error(type_id, f"({kind.name}) has no value that could be decoded")

    def _integer(self, type_id: int) -> Number:
        size, signed, _, boolean, shift, bits = self._btf.integer(type_id)
        if size not in (1, 2, 4, 8, 16) or not bits or shift + bits > size * 8:
            raise self._error(type_id, f"has {bits} bits from {shift} on in {size} bytes")
        words = Truth({0: "false"}) if boolean else None
        return Number(size, signed, bits, shift, words=words)

    def _enum(self, type_id: int) -> Number:
        size, signed = self._btf.size(type_id), self._btf.signed(type_id)
        if size not in (1, 2, 4, 8):
            raise self._error(type_id, f"has {size} bytes, which no enum has")
        wide = 64 if self._btf.kind(type_id) == Kind.ENUM64 else 32
        bits = size * 8
        names: dict[str, int] = {}
        for name, number in self._btf.enumerators(type_id):
            self._enumerators += 1
            if self._enumerators > MAX_ENUMERATORS:
                raise self._error(type_id, f"has more than {MAX_ENUMERATORS} names")
            names.setdefault(name, _cut(number, wide, bits, signed))
        words = Enumerators(names, integer_template(bits)) if names else None
        return Number(size, signed, bits, words=words)


def _cut(number: int, wide: int, bits: int, signed: bool) -> int:
    """An enumerator of ``wide`` bits as the number that an enum of ``bits`` holds for it."""
    if signed and number >> wide - 1:
        number -= 1 << wide
    number &= (1 << bits) - 1
    return number - (1 << bits) if signed and number >> bits - 1 else number


def _record(name: str, size: int, union: bool, parts: list[Part]) -> Record:
    """A record, its members' names known to be different."""
    names: dict[str, int] = {}
    for index, part in enumerate(parts):
        if part.name is not None:
            inner = [part.name]
        else:
            inner = list(part.node.names) if isinstance(part.node, Record) else []
        for each in inner:
            if each in names:
                raise BtfError(f"{name} has two members {each!r}")
            names[each] = index
    return Record(name, size, union, tuple(parts), names)
