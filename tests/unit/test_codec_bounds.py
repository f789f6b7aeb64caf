"""Types that are too much, too deep, circular, or that no compiler writes: BtfError says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kpmd.core.btf import Kind
from tests.unit.btf import Types, made, one, refused


def _nested(types: Types, depth: int) -> int:
    inner = types.char()
    for _ in range(depth):
        inner = types.struct("s", 1, [("in", inner, 0)])
    return inner


def test_depth() -> None:
    assert made(lambda types: _nested(types, 32)).size == 1
    refused(lambda types: _nested(types, 33), "nested more than 32 deep")

    def arrays(types: Types) -> int:
        inner = types.char()
        for _ in range(100):
            inner = types.array(inner, 1)
        return inner

    refused(arrays, "behind more than 32 others|nested more than 32 deep")


def test_circles() -> None:
    refused(lambda types: types.struct("s", 8, [("in", 1, 0)]), "struct s contains itself")
    refused(lambda types: types.array(1, 1), "or is its own|contains itself")
    refused(lambda types: types.typedef("t", 1), "or is its own")

    def three(types: Types) -> int:
        types.struct("a", 8, [("b", 2, 0)])
        types.struct("b", 8, [("c", 3, 0)])
        return types.array(1, 1)

    refused(three, "contains itself")
    # A pointer is no circle.
    listed = made(lambda types: types.struct("list", 8, [("next", types.ptr(2), 0)]))
    assert one(listed, bytes(8)) == {"next": "0x0000000000000000"}


def test_too_much() -> None:
    def array(number: int, size: int = 4) -> Callable[[Types], int]:
        return lambda types: types.array(types.integer("u32", size), number)

    def doubling(types: Types) -> int:
        inner = types.integer("u8", 1)
        for _ in range(31):
            inner = types.struct("s", 1, [("a", inner, 0), ("b", inner, 0)])
        return inner

    def nothing(types: Types) -> int:
        return types.struct("s", 4, [("a", types.array(types.struct("e", 0, []), 2**32 - 1), 0)])

    def wide(types: Types) -> int:
        return types.struct("s", 1, ((f"m{each}", 1, 0) for each in range(65535)))

    def named(types: Types) -> int:
        inner = types.integer("u8", 1)
        long = '"' * 500
        for _ in range(30):
            inner = types.struct("s", 1, [(long, inner, 0)])
        return types.array(inner, 4000)

    def enums(types: Types) -> int:
        each = {f"e{number}": number for number in range(3000)}
        members = [("a", types.enum("a", 4, each), 0), ("b", types.enum("b", 4, each), 0)]
        return types.struct("s", 4, members)

    assert len(made(array(4096)).decode(bytes(16384))) == 4096
    refused(array(4097), r"u32\[4097\] has more than 4096 values")
    refused(array(2**32 - 1), "more than 4096 values")
    refused(lambda types: types.array(types.char(), 2**32 - 1), "has 4294967295 bytes; 1048576")
    refused(doubling, "more than 4096 values")
    refused(nothing, "more than 4096 values")
    refused(
        lambda types: (types.integer("u8", 1), wide(types))[1],
        "struct s has more than 4096 values",
    )
    refused(named, "names make a JSON text of more than 1048576 characters")
    refused(enums, "more than 4096 names")
    refused(lambda types: types.struct("s", (1 << 20) + 1, []), "1048576 are the most")
    assert made(lambda types: types.array(types.char(), 1 << 20)).decode(bytes(1 << 20)) == ""


def test_no_size() -> None:
    for make in (
        lambda types: types.array(types.integer("u8", 1), 0),
        lambda types: types.struct("s", 0, []),
        lambda types: types.struct("s", 0, [("rest", types.array(types.char(), 0), 0)]),
    ):
        refused(make, "has no size")


def test_what_has_no_value() -> None:
    for make in (
        lambda types: 0,
        lambda types: types.record(Kind.CONST),
        lambda types: types.record(Kind.FUNC, "f"),
        lambda types: types.record(Kind.FUNC_PROTO),
        lambda types: types.var("v", 0),
        lambda types: types.section(".data", 4, []),
        lambda types: types.record(Kind.DECL_TAG, "tag", 0, [0]),
    ):
        refused(make, "no value that could be decoded")
    refused(lambda types: types.record(Kind.FWD, "later"), "struct later is declared")
    refused(lambda types: 5, "there is no type 5")


def test_what_no_compiler_writes() -> None:
    def member(*member: Any, size: int = 4, flag: bool = False) -> Callable[[Types], int]:
        def make(types: Types) -> int:
            types.integer("u32", 4)
            types.struct("empty", 4, [])
            return types.struct("s", size, [member], flag=flag)

        return make

    refused(member("a", 1, 8, size=4), "smaller than its member 'a' needs")
    refused(member("a", 1, 0xFFFFFFF8), "smaller than its member 'a' needs|only a number")
    refused(member("a", 2, 4, size=8), "only a number can")
    refused(member("a", 2, 0, 3, flag=True), "only a number can")
    refused(member("a", 1, 0, 33, flag=True), "bitfield of 33 bits")
    refused(member("a", 1, 4, 32, flag=True), "smaller than its member 'a' needs")
    for bits, offset, size in ((0, 0, 4), (33, 0, 4), (8, 28, 4), (24, 0, 3), (8, 0, 0)):
        refused(
            partial(Types.integer, name="int", size=size, bits=bits, offset=offset),
            f"has {bits} bits from {offset} on in {size} bytes",
        )
    refused(lambda types: types.enum("e", 3, {}), "3 bytes, which no enum has")

    def twice(types: Types) -> int:
        u32 = types.integer("u32", 4)
        inner = types.struct("", 4, [("a", u32, 0)])
        return types.struct("s", 8, [("a", u32, 0), ("", inner, 32)])

    refused(twice, "struct s has two members 'a'")


def test_the_longest_text_is_known_before_it_is_made() -> None:
    """So that nobody makes a thousand texts of megabytes out of a few bytes."""

    def make(types: Types) -> int:
        number = types.integer("u64", 8)
        many = types.enum("e", 4, {"A": 0, "B" * 500: 1})
        members = [
            ("n", number, 0),
            ("text", types.array(types.char(), 16), 64),
            ("e", many, 192),
            ("rest", types.array(many, 0), 224),
        ]
        return types.struct("s", 28, members)

    codec = made(make)
    full = b"\xff" * 8 + b"\1" * 16 + (1).to_bytes(4, "little") * 9
    for length in (28, 32, 60):
        texts = codec.rows(full[:length], 0, length)
        assert len(texts[0]) <= codec.longest(length) < 2 * len(texts[0]) + 300


def test_a_union_that_tells_the_same_bytes_too_often() -> None:
    """What has few bytes may have very much to be told of them."""

    def make(types: Types) -> int:
        text = types.array(types.char(), 1 << 16)
        return types.struct(
            "u", 1 << 16, [(f"m{number}", text, 0) for number in range(100)], Kind.UNION
        )

    refused(make, "JSON text of more than 8388608 characters")
