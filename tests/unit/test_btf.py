"""BTF: what is read of it, and that nothing in it does harm."""

from __future__ import annotations

import struct

import pytest

from kpmd.core.btf import MAX_BYTES, Btf, BtfError, Integer, Kind, Member, Variable
from tests.unit.btf import OBJECTS, Types, header, objects, section


@pytest.fixture(scope="module")
def types() -> Btf:
    """Those of types.bpf.c."""
    return Btf(section(OBJECTS / "types.bpf.o", ".BTF"))


def _found(btf: Btf, name: str, *kinds: Kind) -> int:
    type_id = btf.find(name, *kinds)
    assert type_id is not None
    return type_id


def test_objects_of_clang() -> None:
    for path in objects():
        btf = Btf(section(path, ".BTF"))
        assert len(btf) > 0, path
        for type_id in range(1, len(btf) + 1):
            btf.name(type_id)
            btf.describe(type_id)
            btf.resolve(type_id)


def test_members(types: Btf) -> None:
    pair = _found(types, "pair", Kind.STRUCT)
    assert types.kind(pair) == Kind.STRUCT
    assert types.size(pair) == 16
    u32, u64 = (_found(types, name) for name in ("__u32", "__u64"))
    assert list(types.members(pair)) == [
        Member("left", u32, 0, None),
        Member("right", u64, 64, None),
    ]
    bitfields = {each.name: each.bits for each in types.members(_found(types, "value"))}
    assert (bitfields["low"], bitfields["high"], bitfields["u8"]) == (3, 40, None)


def test_integers(types: Btf) -> None:
    assert types.integer(_found(types, "long long")) == Integer(8, True, False, False, 0, 64)
    assert types.integer(_found(types, "_Bool")) == Integer(1, False, False, True, 0, 8)
    with pytest.raises(BtfError, match="is a STRUCT where INT belongs"):
        types.integer(_found(types, "pair"))


def test_enumerators(types: Btf) -> None:
    colour = _found(types, "colour", Kind.ENUM)
    assert list(types.enumerators(colour)) == [("RED", 0), ("GREEN", 7), ("BLUE", 0xFFFFFFFF)]
    made = Types()
    wide = made.enum64("wide", {"NEAR": 1, "FAR": -1}, signed=True)
    btf = Btf(made.raw())
    assert list(btf.enumerators(wide)) == [("NEAR", 1), ("FAR", 2**64 - 1)]
    assert btf.signed(wide)
    assert not types.signed(colour)


def test_functions(types: Btf) -> None:
    proto = types.target(_found(types, "types", Kind.FUNC))
    assert [name for name, _ in types.params(proto)] == ["ctx"]


def test_names_as_c_writes_them(types: Btf) -> None:
    made = Types()
    integer = made.integer("int", 4)
    declared = made.record(Kind.FWD, "later")
    union = made.record(Kind.FWD, "later", flag=True)
    rows = made.array(made.array(integer, 3), 2)
    function = made.record(Kind.FUNC_PROTO, size=integer)
    pointer = made.ptr(made.record(Kind.CONST, size=made.char()))
    ids = {
        "int": integer,
        "int[2][3]": rows,
        "int (*)[2][3]": made.ptr(rows),
        "int (*)()": made.ptr(function),
        "char *": made.record(Kind.VOLATILE, size=pointer),
        "char *[4]": made.array(pointer, 4),
        "void *": made.ptr(),
        "struct later": declared,
        "union later": union,
        "struct": made.struct("", 0, []),
        "number": made.typedef("number", integer),
        "float": made.record(Kind.FLOAT, "float", 4),
        "void": 0,
    }
    btf = Btf(made.raw())
    assert {name: btf.describe(type_id) for name, type_id in ids.items()} == {
        name: name for name in ids
    }
    assert types.describe(_found(types, "colour")) == "enum colour"


def test_find(types: Btf) -> None:
    assert types.find("pair", Kind.UNION) is None
    assert types.find("pai") is None
    assert types.find("pair\0") is None
    assert types.find("\ud800") is None
    assert types.find("no such type") is None
    assert types.find("types") == types.find("types", Kind.FUNC)
    assert types.structs() == ["event", "key", "pair", "value"]


def test_resolve() -> None:
    made = Types()
    integer = made.integer("int", 4)
    typedef = made.typedef("number", made.record(Kind.TYPE_TAG, "user", integer))
    const = made.record(Kind.CONST, size=made.record(Kind.RESTRICT, size=typedef))
    chain = integer
    for _ in range(31):
        chain = made.record(Kind.CONST, size=chain)
    too_long = made.record(Kind.CONST, size=chain)
    circular = made.count + 1
    made.typedef("itself", circular)
    nowhere = made.typedef("nowhere", 1000)
    btf = Btf(made.raw())
    assert btf.resolve(const) == integer
    assert btf.resolve(chain) == integer
    assert btf.resolve(0) == 0
    with pytest.raises(BtfError, match="more than 32 typedefs"):
        btf.resolve(too_long)
    with pytest.raises(BtfError, match="or is its own"):
        btf.resolve(circular)
    with pytest.raises(BtfError, match="no type 1000"):
        btf.resolve(nowhere)
    pointer = Types()
    pointer.ptr(1)
    with pytest.raises(BtfError, match="or is its own"):
        Btf(pointer.raw()).describe(1)


def test_variables() -> None:
    made = Types()
    integer = made.integer("int", 4)
    first, second = made.var("first", integer), made.var("second", integer)
    made.section(".data", 12, [(first, 0, 4), (second, 8, 4)])
    made.section(".beyond", 12, [(first, 0, 4), (second, 9, 4)])
    made.section(".wrong", 12, [(integer, 0, 4)])
    made.section(".wraps", 12, [(first, 0xFFFFFFFF, 4)])
    btf = Btf(made.raw())
    assert btf.variables(".data") == [
        Variable("first", integer, 0, 4),
        Variable("second", integer, 8, 4),
    ]
    with pytest.raises(BtfError, match=r"there is no section '\.bss'"):
        btf.variables(".bss")
    for name in (".beyond", ".wraps"):
        with pytest.raises(BtfError, match="lies beyond the end of section"):
            btf.variables(name)
    with pytest.raises(BtfError, match="is a INT where VAR belongs"):
        btf.variables(".wrong")


def test_globals_that_tell_of_records(types: Btf) -> None:
    """Other variables are of structs, too, maps among them, but tell of no records."""
    assert types.globals_pointing_to_structs() == [("event_type", "event")]
    made = Types()
    event = made.struct("event", 0, [])
    const = made.record(Kind.CONST, size=event)
    made.var("unused", made.record(Kind.CONST, size=made.ptr(const)))
    made.var("number", made.integer("int", 4))
    made.var("twice", made.ptr(made.ptr(event)))
    made.var("nameless", made.ptr(made.struct("", 0, [])))
    made.var("itself", event)
    assert Btf(made.raw()).globals_pointing_to_structs() == [("unused", "event")]


def test_every_kind_is_passed() -> None:
    """What stands behind each record is known, so the record after it is found."""
    made = Types()
    made.integer("int", 4)
    made.ptr()
    made.array(1, 2)
    made.struct("s", 8, [("a", 1, 0), ("b", 1, 32)])
    made.struct("u", 4, [("a", 1, 0)], Kind.UNION)
    made.enum("e", 4, {"A": 1, "B": 2})
    made.record(Kind.FWD, "f")
    made.typedef("t", 1)
    made.record(Kind.VOLATILE, size=1)
    made.record(Kind.CONST, size=1)
    made.record(Kind.RESTRICT, size=1)
    made.record(Kind.FUNC, "function", 13, vlen=2)
    made.record(Kind.FUNC_PROTO, words=[0, 1, 0, 1], vlen=2)
    made.var("v", 1)
    made.section(".data", 8, [(14, 0, 4), (14, 4, 4)])
    made.record(Kind.FLOAT, "float", 4)
    made.record(Kind.DECL_TAG, "tag", 4, [-1])
    made.record(Kind.TYPE_TAG, "tag", 1)
    made.enum64("e64", {"A": 1 << 40, "B": 2})
    made.integer("last", 1)
    btf = Btf(made.raw())
    assert [btf.kind(each) for each in range(20)] == list(Kind)
    assert btf.name(20) == "last"


def _broken() -> dict[str, bytes]:
    made = Types()
    made.integer("int", 4)
    whole = made.raw()
    unknown = Types()
    unknown.record(20)
    void = Types()
    void.record(0)
    many = Types()
    many.record(Kind.STRUCT, vlen=65535)
    big_endian = struct.pack(">HBB", 0xEB9F, 1, 0) + whole[4:]
    return {
        "shorter than its header": b"",
        "shorter than its header, by a byte": whole[:23],
        "does not begin as BTF": big_endian,
        "version 2": made.raw(version=2),
        "no possible length": made.raw(length=23),
        "no possible length, of 4 GiB": made.raw(length=0xFFFFFFFF),
        "beyond its end": whole[:-1],
        "beyond its end: types": made.raw(types_at=0xFFFFFFF0),
        "beyond its end: names": made.raw(names=0xFFFFFFFF),
        "types are cut off": made.raw(types=15, names_at=16),
        "begin and end with a NUL": header(16, 3) + bytes(made.types) + b"\0in",
        "begin and end with a NUL: at all": header(16, 0) + bytes(made.types),
        "type 1 is cut off": header(8, 1) + bytes(8) + b"\0",
        "kind 20": unknown.raw(),
        "kind 0": void.raw(),
        "type 1 is cut off: 65535 members": many.raw(),
        "bytes; ": bytes(MAX_BYTES + 1),
    }


@pytest.mark.parametrize("words", _broken())
def test_broken(words: str) -> None:
    with pytest.raises(BtfError, match=words.split(":")[0].split(",")[0]):
        Btf(_broken()[words])


def test_a_header_that_is_longer() -> None:
    """As a newer form of BTF has it: what is between the header that is known and the types."""
    made = Types()
    made.integer("int", 4)
    raw = made.raw(length=32)
    assert Btf(raw[:24] + bytes(8) + raw[24:]).name(1) == "int"


def test_names_that_are_none() -> None:
    made = Types()
    made.record(Kind.STRUCT, 5000)
    made.record(Kind.STRUCT, made.name(b"\xff"))
    made.record(Kind.STRUCT, made.name("line\nbreak"))
    made.record(Kind.STRUCT, made.name("x" * 513))
    long = made.record(Kind.STRUCT, made.name("x" * 512))
    made.record(Kind.STRUCT, 0xFFFFFFFF)
    made.struct("s", 0, [("", 0, 0)])
    at = len(made.types) - 12
    made.types[at : at + 4] = struct.pack("<I", 5000)
    btf = Btf(made.raw())
    for type_id, words in {
        1: "no name",
        2: "characters",
        3: "characters",
        4: "at most 512",
    }.items():
        with pytest.raises(BtfError, match=words):
            btf.name(type_id)
    assert btf.name(long) == "x" * 512
    with pytest.raises(BtfError, match="no name"):
        btf.name(6)
    with pytest.raises(BtfError, match="no name"):
        list(btf.members(7))
    with pytest.raises(BtfError):
        btf.structs()


@pytest.mark.parametrize("type_id", [-1, 2, 1 << 40])
def test_types_that_are_not_there(type_id: int) -> None:
    made = Types()
    made.integer("int", 4)
    btf = Btf(made.raw())
    for ask in (btf.kind, btf.name, btf.size, btf.target, btf.resolve, btf.describe):
        with pytest.raises(BtfError, match="there is no type"):
            ask(type_id)


def test_nothing_in_it() -> None:
    btf = Btf(Types().raw())
    assert len(btf) == 0
    assert btf.structs() == []
    assert btf.globals_pointing_to_structs() == []
    assert btf.find("int") is None
