"""Codecs: what C has in bytes as JSON, and back; many rows at once as one at a time."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

import pytest

from kpmd.core.btf import Btf, BtfError, Kind
from kpmd.core.codec import Codec, compile_section, compile_type
from kpmd.core.codec_rows import Around
from tests.unit.btf import OBJECTS, SAME_BYTES, SAMPLE, Types, made, one, refused, section, wrong

U16, U32, U64 = (1 << bits for bits in (16, 32, 64))


@pytest.fixture(scope="module")
def sample() -> Codec:
    """``struct value`` of types.bpf.c."""
    btf = Btf(section(OBJECTS / "types.bpf.o", ".BTF"))
    type_id = btf.find("value", Kind.STRUCT)
    assert type_id is not None
    return compile_type(btf, type_id)


def test_what_clang_lays_out(sample: Codec) -> None:
    raw = section(OBJECTS / "types.bpf.o", ".rodata.sample")
    assert (sample.name, sample.size) == ("struct value", len(raw))
    assert one(sample, raw) == SAMPLE | SAME_BYTES
    assert sample.encode(SAMPLE, []) == raw
    assert list(sample.decode(raw))[:3] == ["s8", "u8", "s16"]


def test_several_forms_of_the_same(sample: Codec) -> None:
    raw = section(OBJECTS / "types.bpf.o", ".rodata.sample")
    others = SAMPLE | {
        "u64": 2**64 - 1,
        "s64": -5000000000,
        "u32": "0xFFFFFFFF",
        "s16": "-300",
        "colour": 0xFFFFFFFF,
        "tint": "7",
        "pointer": 0,
    }
    del others["word"]
    assert sample.encode(others | {"bytes": [1, 2, 3, 4]}, []) == raw
    assert sample.encode(others | {"first": 0x0201, "second": "0x403"}, []) == raw


@pytest.mark.parametrize(
    ("size", "signed", "raw", "value"),
    [
        (1, False, b"\xff", 255),
        (1, True, b"\xff", -1),
        (2, False, b"\1\2", 0x0201),
        (4, True, b"\0\0\0\x80", -(2**31)),
        (8, False, b"\xff" * 8, "18446744073709551615"),
        (8, True, b"\xff" * 8, "-1"),
        (16, False, b"\xff" * 16, str(2**128 - 1)),
        (16, True, b"\xfe" + b"\xff" * 15, "-2"),
    ],
)
def test_integers(size: int, signed: bool, raw: bytes, value: Any) -> None:
    codec = made(lambda types: types.integer("number", size, signed))
    assert one(codec, raw) == value
    assert codec.encode(value, []) == raw
    assert codec.encode(int(value), []) == raw
    low = -(1 << size * 8 - 1) if signed else 0
    high = low + (1 << size * 8) - 1
    for far in (low - 1, high + 1, str(high + 1), 10**5000):
        wrong(codec, far, [], f"must be from {low} to {high}")
    others: list[Any] = [None, True, 1.0, [], {}, "", "1 ", "0x", "one", "1_0", "٣", "9" * 5000]
    for what in others:
        wrong(codec, what, [], "must be an integer, or a string with one in decimal")


def test_pointers() -> None:
    codec = made(lambda types: types.ptr(types.typedef("itself", 2)))
    assert codec.size == 8
    assert one(codec, struct.pack("<Q", 0xFFFFFFFF81000000)) == "0xffffffff81000000"
    assert codec.encode("0xffffffff81000000", []) == struct.pack("<Q", 0xFFFFFFFF81000000)
    wrong(codec, "0x1" + "0" * 16, [], "must be from 0 to 18446744073709551615")


def test_bools() -> None:
    codec = made(lambda types: types.typedef("bool", types.boolean()))
    assert codec.name == "bool"
    assert [one(codec, bytes([each])) for each in (0, 1, 255)] == [False, True, True]
    assert codec.encode(True, []) == b"\1"
    for what in (1, "true", None):
        wrong(codec, what, [], "must be true or false")


@pytest.mark.parametrize("signed", [False, True])
def test_enums(signed: bool) -> None:
    codec = made(lambda types: types.enum("e", 4, {"A": 1, "B": -1, "AGAIN": 1}, signed))
    assert codec.name == "enum e"
    assert one(codec, b"\1\0\0\0") == "A"
    assert one(codec, b"\xff\xff\xff\xff") == "B"
    assert one(codec, b"\xfe\xff\xff\xff") == (-2 if signed else 0xFFFFFFFE)
    assert codec.encode("AGAIN", []) == b"\1\0\0\0"
    assert codec.encode("B", []) == b"\xff" * 4
    assert codec.encode(7, []) == codec.encode("7", []) == b"\7\0\0\0"
    wrong(codec, "C", [], "must be an integer, or one of A, B, AGAIN")
    wrong(codec, -(2**40), [], "must be from")
    none = made(lambda types: types.enum("e", 4, {}, signed))
    assert one(none, b"\2\0\0\0") == 2
    wrong(none, "C", [], "must be an integer, or a string with one")
    many = made(lambda types: types.enum("e", 4, {f"E{each}": each for each in range(100)}))
    wrong(many, "C", [], "E18, E19, …")


@pytest.mark.parametrize("signed", [False, True])
def test_enums_of_64_bits(signed: bool) -> None:
    codec = made(lambda types: types.enum64("e", {"FAR": 1 << 40, "LAST": -1}, signed))
    assert one(codec, struct.pack("<Q", 1 << 40)) == "FAR"
    assert one(codec, b"\xff" * 8) == "LAST"
    assert one(codec, b"\xfe" + b"\xff" * 7) == ("-2" if signed else str(U64 - 2))
    assert codec.encode("FAR", []) == struct.pack("<Q", 1 << 40)


def test_small_enums() -> None:
    """One byte of an enum that the compiler gave 32 bits for each name."""
    codec = made(lambda types: types.enum("e", 1, {"LESS": -1, "MORE": 300}))
    assert one(codec, b"\xff") == "LESS"
    assert codec.encode("LESS", []) == b"\xff"
    wide = made(lambda types: types.enum("e", 8, {"LESS": -1}, signed=True))
    assert one(wide, b"\xff" * 8) == "LESS"


def test_floats() -> None:
    for size, code in ((2, "e"), (4, "f"), (8, "d")):
        codec = made(partial(Types.record, kind=Kind.FLOAT, name="float", size=size))
        assert one(codec, struct.pack(f"<{code}", -1.5)) == -1.5
        assert codec.encode(-1.5, []) == struct.pack(f"<{code}", -1.5)
        for special in ("nan", "inf", "-inf"):
            raw = struct.pack(f"<{code}", float(special))
            assert one(codec, raw) == special
            assert one(codec, codec.encode(special, [])) == special
        for far in (10**400, 1e300 if size < 8 else 10**309):
            wrong(codec, far, [], f"too large for a float of {size} bytes")
        others: list[Any] = ["1.5", None, True, []]
        for what in others:
            wrong(codec, what, [], "must be a number")
    refused(lambda types: types.record(Kind.FLOAT, "long double", 16), "16 bytes, which kpmd does")


def test_text() -> None:
    codec = made(lambda types: types.array(types.record(Kind.CONST, size=types.char()), 8))
    assert codec.name == "char[8]"
    for raw, text in {
        b"bash\0x\0\0": "bash",
        bytes(8): "",
        b"12345678": "12345678",
        "Grüße\0".encode(): "Grüße",
        b'"\\\n\x01%d\0\0': '"\\\n\x01%d',
        b"\xff\xfeA\0\0\0\0\0": "\ufffd\ufffdA",
        b"\xed\xa0\x80\xed\xb0\x80\0\0": "\ufffd" * 6,
        b"1234567\xc3": "1234567\ufffd",
    }.items():
        assert one(codec, raw) == text
        codec.rows(raw, 0, 8)[0].encode()
    assert codec.encode("bash", []) == b"bash\0\0\0\0"
    assert codec.encode("12345678", []) == b"12345678"
    wrong(codec, "123456789", [], "has 9 bytes; there is room for 8")
    wrong(codec, "Grüßße", [], "has 9 bytes; there is room for 8")
    wrong(codec, "a\0b", [], "has a NUL")
    wrong(codec, "\ud800", [], "half of a surrogate pair")
    for what in (None, 1, list(b"bash")):
        wrong(codec, what, [], "must be a string")


def _text(types: Types, size: int) -> int:
    return types.array(types.char(), size)


def test_text_of_many_kinds_is_not_kept() -> None:
    """More texts than are remembered, and ones too long for it, are decoded as well."""
    for size in (8, 65):
        codec = made(partial(_text, size=size))
        rows = b"".join(str(each).encode().ljust(size, b"\0") for each in range(3000))
        assert codec.rows(rows, 0, size) == [f'"{each}"' for each in range(3000)]


def test_which_arrays_are_text() -> None:
    def of(name: str, encoding: int = 0) -> Any:
        return made(lambda types: types.array(types.integer(name, 1, encoding=encoding), 2)).decode(
            b"a\0"
        )

    assert of("char") == "a"
    assert of("unsigned char", encoding=2) == "a"
    assert of("unsigned char") == [97, 0]
    assert of("signed char", encoding=1) == [97, 0]
    assert of("char", encoding=4) == [True, False]
    assert made(lambda types: types.char()).decode(b"a") == 97


def test_bitfields_of_old_compilers() -> None:
    """The INT has its own width and place; the struct has no flag."""

    def make(types: Types) -> int:
        three, five = (
            types.integer("int", 4, signed=True, bits=3),
            types.integer("int", 4, bits=5, offset=3),
        )
        whole = types.integer("unsigned int", 4)
        return types.struct("s", 8, [("a", three, 0), ("b", five, 0), ("c", whole, 32)])

    codec = made(make)
    assert one(codec, b"\xaf\0\0\0\1\0\0\0") == {"a": -1, "b": 21, "c": 1}
    assert codec.encode({"a": -1, "b": 21, "c": 1}, []) == b"\xaf\0\0\0\1\0\0\0"
    wrong(codec, {"a": 4}, ["a"], "must be from -4 to 3")
    alone = made(lambda types: types.array(types.integer("int", 2, bits=4, offset=6), 2))
    assert one(alone, b"\x40\x02\0\0") == [9, 0]


def test_bitfields_that_cross_bytes() -> None:
    def make(types: Types) -> int:
        u64, enum = types.integer("u64", 8), types.enum("e", 4, {"X": 2, "FAR": 100})
        members = [
            ("a", u64, 4, 61),
            ("yes", types.boolean(), 65, 1),
            ("e", enum, 66, 2),
            ("", u64, 68, 60),
        ]
        return types.struct("s", 16, members, flag=True)

    codec = made(make)
    raw = ((2**61 - 2) << 4 | 1 << 65 | 2 << 66 | 0xF << 68).to_bytes(16, "little")
    assert one(codec, raw) == {"a": str(2**61 - 2), "yes": True, "e": "X"}
    assert codec.encode(codec.decode(raw), []) == raw[:8] + b"\x0b" + bytes(7)
    wrong(codec, {"e": "FAR"}, ["e"], "must be from 0 to 3")
    wrong(codec, {"a": 2**61}, ["a"], f"must be from 0 to {2**61 - 1}")


def test_structs() -> None:
    def make(types: Types) -> int:
        u32 = types.integer("u32", 4)
        inner = types.struct("inner", 4, [("x", u32, 0)])
        empty = types.struct("empty", 0, [])
        members = [("in", inner, 0), ('a"%d\\', u32, 64), ("empty", empty, 64)]
        return types.struct("outer", 16, members)

    codec = made(make)
    raw = struct.pack("<4I", 1, 2, 3, 4)
    assert one(codec, raw) == {"in": {"x": 1}, 'a"%d\\': 3, "empty": {}}
    assert codec.encode({'a"%d\\': 3}, []) == struct.pack("<4I", 0, 0, 3, 0)
    assert codec.encode({}, []) == bytes(16)
    wrong(codec, {"in": {"y": 1}}, ["in", "y"], "is unknown: struct inner has x")
    wrong(codec, {"in": {"x": "?"}}, ["in", "x"], "must be an integer")
    others: list[Any] = [None, [], "in", 1]
    for what in others:
        wrong(codec, what, [], "must be an object with members of struct outer")


def test_arrays() -> None:
    codec = made(lambda types: types.array(types.array(types.integer("u16", 2), 2), 2))
    assert codec.name == "u16[2][2]"
    assert one(codec, struct.pack("<4H", 1, 2, 3, 4)) == [[1, 2], [3, 4]]
    assert codec.encode([[1], [3, 4]], []) == struct.pack("<4H", 1, 0, 3, 4)
    wrong(codec, [[1, 2, 3]], [0], "has 3 elements; there is room for 2")
    wrong(codec, [[1], [2, U16]], [1, 1], "must be from 0 to 65535")
    wrong(codec, {"0": 1}, [], "must be a list")


def test_unions() -> None:
    def make(types: Types) -> int:
        u8, u32 = types.integer("u8", 1), types.integer("u32", 4)
        both = types.struct("", 8, [("c", u32, 0), ("d", u32, 32)])
        members = [("a", u8, 0), ("b", u32, 0), ("", both, 0), ("text", types.array(u8, 3), 0)]
        return types.struct("u", 8, members, Kind.UNION)

    codec = made(make)
    assert codec.name == "union u"
    raw = struct.pack("<II", 0x01020304, 5)
    assert one(codec, raw) == {"a": 4, "b": 0x01020304, "c": 0x01020304, "d": 5, "text": [4, 3, 2]}
    assert codec.encode({"c": 1, "d": 2}, []) == struct.pack("<II", 1, 2)
    assert codec.encode({"a": 255}, []) == b"\xff" + bytes(7)
    assert codec.encode({}, []) == bytes(8)
    assert codec.encode(codec.decode(raw), []) == raw
    assert codec.encode({"a": 4, "b": 0x01020304}, []) == raw[:4] + bytes(4)
    wrong(codec, {"a": 1, "d": 1}, [], "a, d share their bytes, and say different things")
    wrong(codec, codec.decode(raw) | {"a": 5}, [], "a, b, c, d, text share their bytes")
    wrong(codec, {"a": 1, "text": [1, 2, 256]}, ["text", 2], "must be from 0 to 255")


def test_anonymous_members_are_those_of_the_parent() -> None:
    def make(types: Types) -> int:
        u8, u32 = types.integer("u8", 1), types.integer("u32", 4)
        union = types.struct("", 4, [("a", u32, 0), ("b", u8, 0)], Kind.UNION)
        deeper = types.struct("", 8, [("", union, 0), ("c", u32, 32)])
        nothing = types.struct("", 0, [])
        members = [("x", u32, 0), ("", deeper, 32), ("", nothing, 96), ("", u32, 96)]
        return types.struct("s", 16, members)

    codec = made(make)
    assert one(codec, struct.pack("<4I", 1, 2, 3, 4)) == {"x": 1, "a": 2, "b": 2, "c": 3}
    assert codec.encode({"x": 1, "b": 2, "c": 3}, []) == struct.pack("<4I", 1, 2, 3, 0)
    wrong(codec, {"a": 1, "b": 2}, [], "a, b share their bytes")
    wrong(codec, {"c": U32}, ["c"], "must be from 0 to 4294967295")
    wrong(codec, {"d": 1}, ["d"], "struct s has x, a, b, c")


def test_flexible_arrays() -> None:
    def numbers(types: Types) -> int:
        u32, u16 = types.integer("u32", 4), types.integer("u16", 2)
        return types.struct("s", 4, [("n", u32, 0), ("rest", types.array(u16, 0), 32)])

    codec = made(numbers)
    assert codec.size == 4
    assert codec.flexible
    assert one(codec, b"\1\0\0\0") == {"n": 1, "rest": []}
    assert one(codec, b"\1\0\0\0\2\0\3\0\4") == {"n": 1, "rest": [2, 3]}
    assert codec.encode({"n": 1, "rest": [2, 3]}, []) == b"\1\0\0\0\2\0\3\0"
    wrong(codec, {"rest": [1, U16]}, ["rest", 1], "must be from 0 to 65535")
    assert codec.rows(bytes(16), 0, 8) == ['{"n":0,"rest":[0,0]}'] * 2
    assert codec.rows(bytes(16), 0, 8, 4) == ['{"n":0,"rest":[]}'] * 2

    def text(types: Types) -> int:
        u32, none = types.integer("u32", 4), types.array(types.char(), 0)
        flexible = types.struct("", 4, [("n", u32, 0), ("text", none, 16)])
        return types.struct("s", 8, [("first", none, 0), ("a", u32, 0), ("", flexible, 32)])

    codec = made(text)
    assert one(codec, b"\1\0\0\0\2\0hello") == {
        "first": "",
        "a": 1,
        "n": 0x65680002,
        "text": "hello",
    }
    assert codec.encode({"text": "hello"}, []) == bytes(6) + b"hello"
    wrong(codec, {"first": "h"}, ["first"], "there is room for 0")


def test_flexible_arrays_of_structs() -> None:
    def make(types: Types) -> int:
        pair = types.struct("pair", 2, [("a", types.char(), 0), ("b", types.char(), 8)])
        return types.struct("s", 1, [("n", 2, 0), ("pairs", types.array(pair, 0), 8)])

    codec = made(make)
    assert one(codec, b"\0abcd") == {"n": 0, "pairs": [{"a": 97, "b": 98}, {"a": 99, "b": 100}]}
    assert codec.encode({"pairs": [{}, {"b": 1}]}, []) == b"\0\0\0\0\1"


def test_only_the_last_is_flexible() -> None:
    def make(types: Types) -> int:
        u32 = types.integer("u32", 4)
        none = types.array(u32, 0)
        inner = types.struct("inner", 4, [("n", u32, 0), ("none", none, 32)])
        return types.struct("s", 8, [("in", types.array(inner, 1), 0), ("n", u32, 32)])

    codec = made(make)
    assert not codec.flexible
    assert one(codec, struct.pack("<II", 1, 2)) == {"in": [{"n": 1, "none": []}], "n": 2}
    wrong(codec, {"in": [{"none": [1]}]}, ["in", 0, "none"], "there is room for 0")


def test_sections() -> None:
    types = Types()
    u32, text = types.integer("u32", 4), types.array(types.char(), 4)
    first, second = types.var("first", u32), types.var("second", text)
    types.section(".data", 12, [(second, 8, 4), (first, 4, 4)])
    types.section(".empty", 0, [])
    types.section(".huge", (1 << 20) + 1, [])
    types.section(".twice", 12, [(first, 8, 4), (first, 4, 4)])
    types.section(".small", 12, [(first, 0, 2)])
    btf = Btf(types.raw())
    codec = compile_section(btf, ".data")
    assert (codec.name, codec.size) == (".data", 12)
    assert one(codec, b"\0\0\0\0\1\0\0\0ab\0\0") == {"second": "ab", "first": 1}
    assert codec.encode({"first": 1}, []) == b"\0\0\0\0\1\0\0\0\0\0\0\0"
    wrong(codec, {"third": 1}, ["third"], ".data has second, first")
    for name, words in {
        ".none": "there is no section '.none'",
        ".empty": "has 0 bytes",
        ".huge": "has 1048577 bytes",
        ".twice": "two members 'first'",
        ".small": "'first' is smaller than its type",
    }.items():
        with pytest.raises(BtfError, match=words):
            compile_section(btf, name)


def test_rows() -> None:
    codec = made(lambda types: types.integer("u16", 2))
    rows = struct.pack("<HHH", 1, 2, 3)
    assert codec.rows(rows, 0, 2) == ["1", "2", "3"]
    assert codec.rows(memoryview(rows), 0, 2) == ["1", "2", "3"]
    assert codec.rows(rows, 2, 4) == ["2"]
    assert codec.rows(rows, 0, 4) == ["1"]
    assert codec.rows(b"", 0, 2) == codec.rows(b"1", 0, 2) == []
    for before, stride in ((0, 1), (1, 2), (-1, 4), (0, 0), (0, -2)):
        with pytest.raises(BtfError, match="u16 has 2 bytes"):
            codec.rows(rows, before, stride)
    padding = made(lambda types: types.struct("s", 2, [("", types.char(), 0)]))
    assert padding.rows(rows, 0, 2) == ["{}"] * 3
    for stride in range(2, 300):
        assert codec.rows(bytes(stride * 2), 0, stride) == ["0", "0"]


def test_too_short() -> None:
    codec = made(lambda types: types.integer("u16", 2))
    assert codec.decode(b"\1\0\2\0") == 1
    for raw in (b"", b"1"):
        with pytest.raises(BtfError, match=f"u16 has 2 bytes; these are {len(raw)}"):
            codec.decode(raw)
    flexible = made(
        lambda types: types.struct(
            "s", 2, [("n", types.char(), 0), ("rest", types.array(1, 0), 16)]
        )
    )
    with pytest.raises(BtfError, match="struct s has 2 bytes; these are 1"):
        flexible.decode(b"1")


def test_what_stands_around_a_value_that_has_nothing_to_be_told() -> None:
    """Each row has its line, also where its type has no member with a name."""
    codec = made(lambda types: types.struct("s", 4, [("", types.integer("u32", 4), 0)]))
    for texts in (None, ["a", "b"]):
        shown = "" if texts is None else "%s"
        around = Around(f"<{shown}", ">", texts)
        assert codec.rows(bytes(8), 0, 4, around=around) == [
            f"<{each}{{}}>" for each in texts or ("", "")
        ]
