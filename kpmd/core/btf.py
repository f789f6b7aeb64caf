"""BTF, the types of a BPF object (include/uapi/linux/btf.h), from bytes that nobody vouches for.

Little-endian only, as the machines are that kpmd runs on. A ``Btf`` keeps the bytes, and where each
record begins and its kind; it makes no object of a type before it is asked for. Each record is
known to lie within its section; what it refers to, types and names, is checked when looked up.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

#: Bytes of BTF at the most. That of a BPF object has some hundred KiB where it is large.
MAX_BYTES = 4 << 20

#: Bytes of a name at the most: the kernel's KSYM_NAME_LEN, beyond which it takes no name either.
MAX_NAME = 512

#: Steps through typedefs and qualifiers at the most; the kernel has the same (MAX_RESOLVE_DEPTH).
MAX_CHAIN = 32

_MAGIC, _VERSION = 0xEB9F, 1
_HEADER = struct.Struct("<HBBIIIII")


class Kind(IntEnum):
    """BTF_KIND_*; VOID is type 0, which has no record."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


#: Words behind the three that each record has: a fixed number, and more for each of ``vlen``.
_FIXED = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_EACH = {
    Kind.STRUCT: 3,
    Kind.UNION: 3,
    Kind.ENUM: 2,
    Kind.FUNC_PROTO: 2,
    Kind.DATASEC: 3,
    Kind.ENUM64: 3,
}
_BEHIND = [(_FIXED.get(kind, 0), _EACH.get(kind, 0)) for kind in Kind]

_KINDS = tuple(Kind)
_QUALIFIERS = {Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG}
_TRANSPARENT = {Kind.TYPEDEF, *_QUALIFIERS}

#: How C names the types that it names by a keyword.
_KEYWORDS = {
    Kind.STRUCT: "struct",
    Kind.UNION: "union",
    Kind.ENUM: "enum",
    Kind.ENUM64: "enum",
}


class BtfError(ValueError):
    """The BTF is broken, or of no use for what was asked; the message says why."""


class Integer(NamedTuple):
    """An INT: bytes, how its bits are meant, and which they are."""

    size: int
    signed: bool
    char: bool
    boolean: bool
    offset: int
    bits: int


class Member(NamedTuple):
    """A member of a struct or union; ``bits`` is None where the member itself has no width."""

    name: str
    type: int
    bit_offset: int
    bits: int | None


class Variable(NamedTuple):
    """A variable in a section."""

    name: str
    type: int
    offset: int
    size: int


class Btf:
    """The types of an object, by their ids from 1 on. What is asked for raises BtfError."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        types, self._strings = _sections(raw)
        self._words = array("I", types)
        if sys.byteorder == "big":
            self._words.byteswap()
        self._records, self._kinds = _records(self._words)

    def __len__(self) -> int:
        """How many types there are, without void."""
        return len(self._records)

    def kind(self, type_id: int) -> Kind:
        """Of which kind a type is."""
        if type_id:
            self._at(type_id)
        return _KINDS[self._kinds[type_id]]

    def name(self, type_id: int) -> str:
        """The name of a type; empty where it has none."""
        return self._string(self._words[self._at(type_id)])

    def size(self, type_id: int) -> int:
        """The size of an INT, STRUCT, UNION, ENUM, DATASEC, FLOAT or ENUM64, in bytes."""
        return self._words[self._at(type_id) + 2]

    def target(self, type_id: int) -> int:
        """The type that a pointer, typedef, qualifier, function, variable or tag is of."""
        return self._words[self._at(type_id) + 2]

    def integer(self, type_id: int) -> Integer:
        """What an INT is."""
        at = self._at(type_id, Kind.INT)
        how = self._words[at + 3]
        encoding = how >> 24 & 0xF
        signed, char, boolean = (bool(encoding & bit) for bit in (1, 2, 4))
        return Integer(self._words[at + 2], signed, char, boolean, how >> 16 & 0xFF, how & 0xFF)

    def array(self, type_id: int) -> tuple[int, int]:
        """The type of an array's elements, and how many there are."""
        at = self._at(type_id, Kind.ARRAY)
        return self._words[at + 3], self._words[at + 5]

    def members(self, type_id: int) -> Iterator[Member]:
        """The members of a struct or union, as they are declared."""
        at = self._at(type_id, Kind.STRUCT, Kind.UNION)
        widths = self._flag(at)
        for name, member, offset in self._entries(at, 3):
            if widths:
                yield Member(self._string(name), member, offset & 0xFFFFFF, offset >> 24 or None)
            else:
                yield Member(self._string(name), member, offset, None)

    def signed(self, type_id: int) -> bool:
        """Whether an enum is of a signed type."""
        return self._flag(self._at(type_id, Kind.ENUM, Kind.ENUM64))

    def enumerators(self, type_id: int) -> Iterator[tuple[str, int]]:
        """The names and values of an enum; the values without a sign, of 32 or 64 bits."""
        at = self._at(type_id, Kind.ENUM, Kind.ENUM64)
        wide = self.kind(type_id) == Kind.ENUM64
        for name, low, *high in self._entries(at, 3 if wide else 2):
            yield self._string(name), low | high[0] << 32 if wide else low

    def params(self, type_id: int) -> Iterator[tuple[str, int]]:
        """The names and types of a FUNC_PROTO's parameters."""
        for name, param in self._entries(self._at(type_id, Kind.FUNC_PROTO), 2):
            yield self._string(name), param

    def resolve(self, type_id: int) -> int:
        """The type behind typedefs and qualifiers."""
        for _ in range(MAX_CHAIN):
            if self.kind(type_id) not in _TRANSPARENT:
                return type_id
            type_id = self.target(type_id)
        raise BtfError(f"type {type_id} is behind more than {MAX_CHAIN} typedefs, or is its own")

    def describe(self, type_id: int) -> str:
        """A type as C writes it, without qualifiers: ``struct event``, ``char[16]``, ``void *``."""
        declarator = ""
        for _ in range(MAX_CHAIN):
            kind = self.kind(type_id)
            if kind in _QUALIFIERS:
                type_id = self.target(type_id)
            elif kind == Kind.PTR:
                declarator = f"*{declarator}"
                type_id = self.target(type_id)
            elif kind in (Kind.ARRAY, Kind.FUNC_PROTO):
                if declarator.startswith("*"):
                    declarator = f"({declarator})"
                if kind == Kind.ARRAY:
                    type_id, count = self.array(type_id)
                    declarator += f"[{count}]"
                else:
                    type_id = self.target(type_id)
                    declarator += "()"
            else:
                space = " " if declarator.startswith(("*", "(")) else ""
                return f"{self._base(type_id, kind)}{space}{declarator}"
        raise BtfError(f"type {type_id} is behind more than {MAX_CHAIN} others, or is its own")

    def find(self, name: str, *kinds: Kind) -> int | None:
        """The first type of that name, of one of these kinds (none given: of any)."""
        if "\0" in name:
            return None  # it would be found where two names stand behind each other
        wanted = name.encode(errors="surrogatepass") + b"\0"
        for type_id in self._all(*kinds or _KINDS[1:]):
            if self._strings.startswith(wanted, self._words[self._records[type_id - 1]]):
                return type_id
        return None

    def structs(self) -> list[str]:
        """The names of all structs and unions, sorted."""
        found = {self.name(each) for each in self._all(Kind.STRUCT, Kind.UNION)}
        return sorted(found - {""})

    def variables(self, section: str) -> list[Variable]:
        """The variables of a section, each known to lie within it."""
        type_id = self.find(section, Kind.DATASEC)
        if type_id is None:
            raise BtfError(f"there is no section {section!r}")
        whole = self.size(type_id)
        found = []
        for variable, offset, size in self._entries(self._at(type_id), 3):
            self._at(variable, Kind.VAR)
            name = self.name(variable)
            if offset + size > whole:
                raise BtfError(f"variable {name!r} lies beyond the end of section {section!r}")
            found.append(Variable(name, self.target(variable), offset, size))
        return found

    def globals_pointing_to_structs(self) -> list[tuple[str, str]]:
        """Each variable that is a pointer to a struct with a name: its name, the struct's.

        A ring buffer does not tell of which type its records are; a variable like this may.
        """
        found = []
        for variable in self._all(Kind.VAR):
            type_id = self.resolve(self.target(variable))
            if self.kind(type_id) != Kind.PTR:
                continue
            type_id = self.resolve(self.target(type_id))
            if self.kind(type_id) != Kind.STRUCT:
                continue
            if name := self.name(type_id):
                found.append((self.name(variable), name))
        return found

    def _all(self, *kinds: Kind) -> Iterator[int]:
        return (each for each, kind in enumerate(self._kinds) if kind in kinds)

    def _at(self, type_id: int, *kinds: Kind) -> int:
        """Where a type's record begins, in words; it must be of one of these kinds, if any."""
        if not 0 < type_id <= len(self._records):
            raise BtfError(f"there is no type {type_id}")
        if kinds and self.kind(type_id) not in kinds:
            wanted = " or ".join(kind.name for kind in kinds)
            raise BtfError(f"type {type_id} is a {self.kind(type_id).name} where {wanted} belongs")
        return self._records[type_id - 1]

    def _flag(self, at: int) -> bool:
        return bool(self._words[at + 1] >> 31)

    def _entries(self, at: int, width: int) -> Iterator[tuple[int, ...]]:
        """What stands behind a record, ``vlen`` times so many words."""
        begin = at + 3
        end = begin + width * (self._words[at + 1] & 0xFFFF)
        return zip(*(self._words[begin + each : end : width] for each in range(width)), strict=True)

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset, offset + MAX_NAME + 1)
        if offset >= len(self._strings) or end < 0:
            raise BtfError(f"there is no name of at most {MAX_NAME} bytes at {offset}")
        try:
            name = self._strings[offset:end].decode()
        except UnicodeDecodeError:
            name = "\0"
        if not name.isprintable():
            raise BtfError(f"the name at {offset} has characters that no name has")
        return name

    def _base(self, type_id: int, kind: Kind) -> str:
        if kind == Kind.VOID:
            return "void"
        if kind == Kind.FWD:
            keyword = "union" if self._flag(self._at(type_id)) else "struct"
        else:
            keyword = _KEYWORDS.get(kind, "")
        return f"{keyword} {self.name(type_id)}".strip() or kind.name


def _sections(raw: bytes) -> tuple[bytes, bytes]:
    """The types and the strings. Raises BtfError."""
    if len(raw) > MAX_BYTES:
        raise BtfError(f"it has {len(raw)} bytes; {MAX_BYTES} are the most")
    if len(raw) < _HEADER.size:
        raise BtfError("it is shorter than its header")
    magic, version, _, header, type_at, type_size, name_at, name_size = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise BtfError("it does not begin as BTF in little-endian does")
    if version != _VERSION:
        raise BtfError(f"it has version {version}; kpmd reads {_VERSION}")
    if header < _HEADER.size or header > len(raw):
        raise BtfError("its header has no possible length")
    body = len(raw) - header
    if type_at + type_size > body or name_at + name_size > body:
        raise BtfError("a section lies beyond its end")
    types = raw[header + type_at : header + type_at + type_size]
    names = raw[header + name_at : header + name_at + name_size]
    if type_size % 4:
        raise BtfError("its types are cut off")
    if not names.startswith(b"\0") or not names.endswith(b"\0"):
        raise BtfError("its names do not begin and end with a NUL")
    return types, names


def _records(words: array[int]) -> tuple[array[int], bytearray]:
    """Where each record begins, in words, and the kinds from void on. Raises BtfError."""
    found, kinds = array("I"), bytearray([Kind.VOID])
    at, end = 0, len(words)
    while at < end:
        if at + 3 > end:
            raise BtfError(f"type {len(found) + 1} is cut off")
        info = words[at + 1]
        kind = info >> 24 & 0x1F
        if not 0 < kind < len(_BEHIND):
            raise BtfError(f"type {len(found) + 1} is of kind {kind}, which kpmd does not know")
        found.append(at)
        kinds.append(kind)
        fixed, each = _BEHIND[kind]
        at += 3 + fixed + each * (info & 0xFFFF)
    if at > end:
        raise BtfError(f"type {len(found)} is cut off")
    return found, kinds
