"""BTF made by hand, and BTF taken out of ELF objects, for tests; and what codecs do with it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kpmd.core.btf import Btf, BtfError, Kind
from kpmd.core.codec import Codec, compile_type
from kpmd.errors import Invalid

OBJECTS = Path(__file__).parents[1] / "objects"

#: What types.bpf.c says that ``sample`` is, without all but one member of its union.
SAMPLE: dict[str, Any] = {
    "s8": -1,
    "u8": 255,
    "s16": -300,
    "u16": 65535,
    "s32": -70000,
    "u32": 4294967295,
    "s64": "-5000000000",
    "u64": "18446744073709551615",
    "flag": True,
    "colour": "BLUE",
    "low": 5,
    "middle": -3,
    "tint": "GREEN",
    "high": 0xABCDEF0123,
    "pair": {"left": 1, "right": "2"},
    "word": 0x04030201,
    "grid": [[1, 2, 3], [4, 5, 6]],
    "names": ["first", "eight ch"],
    "pointer": "0x0000000000000000",
}

#: The other members of its union, which share their bytes with ``word``.
SAME_BYTES: dict[str, Any] = {"bytes": [1, 2, 3, 4], "first": 0x0201, "second": 0x0403}

_HEADER = struct.Struct("<HBBIIIII")


def header(types: int, names: int, /, **changed: int) -> bytes:
    """The header of BTF with so many bytes of types, and of names behind them."""
    fields = {
        "magic": 0xEB9F,
        "version": 1,
        "flags": 0,
        "length": _HEADER.size,
        "types_at": 0,
        "types": types,
        "names_at": types,
        "names": names,
    } | changed
    return _HEADER.pack(*fields.values())


class Types:
    """Writes types one after the other; each method gives the id of the one that it wrote."""

    def __init__(self) -> None:
        self.count = 0
        self.types = bytearray()
        self.names = bytearray(b"\0")

    def raw(self, **changed: int) -> bytes:
        """All of it, with some fields of the header changed."""
        return header(len(self.types), len(self.names), **changed) + self.types + self.names

    def name(self, name: str | bytes) -> int:
        """Where a name stands."""
        data = name.encode() if isinstance(name, str) else name
        if not data:
            return 0
        at = len(self.names)
        self.names += data + b"\0"
        return at

    def record(
        self,
        kind: int,
        name: str | int = "",
        size: int = 0,
        words: Iterable[int] = (),
        vlen: int = 0,
        flag: bool = False,
    ) -> int:
        """Any record; ``size`` may be a type as well. A number as ``name`` is the name's offset."""
        at = name if isinstance(name, int) else self.name(name)
        words = [each & 0xFFFFFFFF for each in words]
        info = vlen | kind << 24 | flag << 31
        self.types += struct.pack(f"<{3 + len(words)}I", at, info, size, *words)
        self.count += 1
        return self.count

    def integer(
        self,
        name: str,
        size: int,
        signed: bool = False,
        bits: int | None = None,
        offset: int = 0,
        encoding: int = 0,
    ) -> int:
        bits = size * 8 if bits is None else bits
        how = (encoding | signed) << 24 | offset << 16 | bits
        return self.record(Kind.INT, name, size, [how])

    def char(self) -> int:
        return self.integer("char", 1, signed=True)

    def boolean(self) -> int:
        return self.integer("_Bool", 1, encoding=4)

    def ptr(self, to: int = 0) -> int:
        return self.record(Kind.PTR, size=to)

    def typedef(self, name: str, of: int) -> int:
        return self.record(Kind.TYPEDEF, name, of)

    def array(self, of: int, count: int) -> int:
        return self.record(Kind.ARRAY, words=[of, 0, count])

    def struct(
        self,
        name: str,
        size: int,
        members: Iterable[tuple[str, int, int] | tuple[str, int, int, int]],
        kind: int = Kind.STRUCT,
        flag: bool = False,
    ) -> int:
        """A struct or union of (name, type, offset in bits, bits of a bitfield)."""
        words: list[int] = []
        vlen = 0
        for member, type_id, offset, *bits in members:
            words += [self.name(member), type_id, offset | (bits[0] if bits else 0) << 24]
            vlen += 1
        return self.record(kind, name, size, words, vlen, flag)

    def enum(self, name: str, size: int, values: dict[str, int], signed: bool = False) -> int:
        words = [word for each, value in values.items() for word in (self.name(each), value)]
        return self.record(Kind.ENUM, name, size, words, len(values), signed)

    def enum64(self, name: str, values: dict[str, int], signed: bool = False) -> int:
        words = [
            word for each, value in values.items() for word in (self.name(each), value, value >> 32)
        ]
        return self.record(Kind.ENUM64, name, 8, words, len(values), signed)

    def var(self, name: str, of: int) -> int:
        return self.record(Kind.VAR, name, of, [1])

    def section(self, name: str, size: int, variables: Iterable[tuple[int, int, int]]) -> int:
        """A DATASEC of (variable, offset, size)."""
        words = [word for each in variables for word in each]
        return self.record(Kind.DATASEC, name, size, words, len(words) // 3)


def section(path: Path, name: str) -> bytes:
    """The bytes of a section of an ELF object (64 bits, little-endian); empty without it."""
    raw = path.read_bytes()
    (headers,) = struct.unpack_from("<Q", raw, 40)
    _, number, names = struct.unpack_from("<3H", raw, 58)
    found = [struct.unpack_from("<IIQQQQ", raw, headers + 64 * each) for each in range(number)]
    for at, _, _, _, offset, size in found:
        begin = found[names][4] + at
        if raw[begin : raw.index(b"\0", begin)] == name.encode():
            return raw[offset : offset + size]
    return b""


def objects() -> list[Path]:
    """Those objects for tests that have BTF."""
    return [path for path in sorted(OBJECTS.glob("*.bpf.o")) if section(path, ".BTF")]


def made(make: Callable[[Types], int]) -> Codec:
    """The codec of the type that ``make`` writes."""
    types = Types()
    type_id = make(types)
    return compile_type(Btf(types.raw()), type_id)


def refused(make: Callable[[Types], int], words: str) -> None:
    """There is no codec for the type; the error has these words."""
    with pytest.raises(BtfError, match=words):
        made(make)


def wrong(codec: Codec, value: Any, loc: list[str | int], words: str) -> None:
    """``value`` is refused, at ``loc`` in it, with these words."""
    with pytest.raises(Invalid) as caught:
        codec.encode(value, ["value"])
    (told,) = caught.value.fields["errors"]
    assert told["loc"] == ["value", *loc]
    assert words in told["msg"]


def one(codec: Codec, raw: bytes) -> Any:
    """What some bytes are, alone and in rows with others around."""
    value = codec.decode(raw)
    rows = b"".join(b"ab" + raw + b"cde" for _ in range(3))
    texts = codec.rows(rows, 2, len(raw) + 5, len(raw))
    assert [json.loads(text) for text in texts] == [value] * 3
    return value
