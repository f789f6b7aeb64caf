"""What a codec does against what a model of the type does, for types at random."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kpmd.core.btf import Kind
from tests.fuzz.background import examples
from tests.unit.btf import Types, made


@dataclass
class Model:
    """A type: how to write it, what bytes of it mean, and what of that is given to be encoded."""

    size: int
    write: Callable[[Types], int]
    decode: Callable[[bytes], Any]
    give: Callable[[Any], Any] = lambda value: value
    names: tuple[str, ...] = ()
    record: bool = False


def _integer(size: int, signed: bool) -> Model:
    def decode(raw: bytes) -> Any:
        number = int.from_bytes(raw, "little", signed=signed)
        return str(number) if size > 4 else number

    return Model(size, lambda types: types.integer("int", size, signed), decode)


def _enum(signed: bool) -> Model:
    def decode(raw: bytes) -> Any:
        number = int.from_bytes(raw, "little", signed=signed)
        return {0: "ZERO", 3: "THREE"}.get(number, number)

    return Model(2, lambda types: types.enum("e", 2, {"ZERO": 0, "THREE": 3}, signed), decode)


def _float(size: int) -> Model:
    def decode(raw: bytes) -> Any:
        (number,) = struct.unpack("<f" if size == 4 else "<d", raw)
        return str(number) if number != number or number in (1e999, -1e999) else number

    return Model(size, lambda types: types.record(Kind.FLOAT, "float", size), decode)


def _text(size: int) -> Model:
    return Model(
        size,
        lambda types: types.array(types.char(), size),
        lambda raw: raw.partition(b"\0")[0].decode(errors="replace"),
        # What was no UTF-8 may have become longer than the array.
        lambda value: value.replace("\ufffd", "?"),
    )


def _array(element: Model, number: int) -> Model:
    def decode(raw: bytes) -> Any:
        size = element.size
        return [element.decode(raw[at * size : (at + 1) * size]) for at in range(number)]

    return Model(
        element.size * number,
        lambda types: types.array(element.write(types), number),
        decode,
        lambda value: [element.give(each) for each in value],
    )


SCALARS = st.sampled_from(
    [
        *(_integer(size, signed) for size in (1, 2, 4, 8, 16) for signed in (False, True)),
        *(_enum(signed) for signed in (False, True)),
        *(_float(size) for size in (4, 8)),
        *(_text(size) for size in (1, 3, 16)),
        Model(1, lambda types: types.boolean(), lambda raw: raw != b"\0"),
        Model(
            8,
            lambda types: types.ptr(),
            lambda raw: f"0x{int.from_bytes(raw, 'little'):016x}",
        ),
    ]
)


@st.composite
def _bits(draw: st.DrawFn, names: Iterator[int]) -> tuple[str, int, int, bool]:
    """A bitfield: its name, where in 64 bits, how many, and whether it is signed."""
    at = draw(st.integers(0, 63))
    name = f"m{next(names)}" if draw(st.booleans()) else ""
    return name, at, draw(st.integers(1, min(32, 64 - at))), draw(st.booleans())


def _bitfields(fields: list[tuple[str, int, int, bool]]) -> Model:
    """A struct of 8 bytes; its bitfields do not overlap."""

    def write(types: Types) -> int:
        kinds = {signed: types.integer("int", 4, signed) for signed in (False, True)}
        members = [(name, kinds[signed], at, bits) for name, at, bits, signed in fields]
        return types.struct("bits", 8, members, flag=True)

    def decode(raw: bytes) -> Any:
        found = {}
        for name, at, bits, signed in fields:
            number = int.from_bytes(raw, "little") >> at & (1 << bits) - 1
            if name:
                found[name] = number - (1 << bits if signed and number >> bits - 1 else 0)
        return found

    names = tuple(name for name, *_ in fields if name)
    return Model(8, write, decode, names=names, record=True)


def _record(parts: list[tuple[str, Model]], kind: Kind, gap: int) -> Model:
    offsets = []
    size = 0
    for _, model in parts:
        at = 0 if kind == Kind.UNION else size
        offsets.append(at)
        size = max(size, at + model.size + gap)

    def write(types: Types) -> int:
        members = [
            (name, model.write(types), at * 8)
            for (name, model), at in zip(parts, offsets, strict=True)
        ]
        return types.struct("s", size, members, kind)

    def decode(raw: bytes) -> Any:
        found: dict[str, Any] = {}
        for (name, model), at in zip(parts, offsets, strict=True):
            value = model.decode(raw[at : at + model.size])
            found |= {name: value} if name else value
        return found

    def give(value: Any) -> Any:
        given: dict[str, Any] = {}
        for name, model in parts[:1] if kind == Kind.UNION else parts:
            if name:
                given[name] = model.give(value[name])
            else:
                given |= model.give({each: value[each] for each in model.names})
        return given

    names = tuple(each for name, model in parts for each in ((name,) if name else model.names))
    return Model(size, write, decode, give, names, record=True)


@st.composite
def models(draw: st.DrawFn, depth: int = 3, names: Iterator[int] | None = None) -> Model:
    names = count() if names is None else names
    what = draw(st.sampled_from("sssabru" if depth else "s"))
    if what == "s":
        return draw(SCALARS)
    if what == "a":
        return _array(draw(models(depth=depth - 1, names=names)), draw(st.integers(1, 3)))
    if what == "b":
        taken = 0
        fields = []
        for field in draw(st.lists(_bits(names), max_size=4)):
            mask = ((1 << field[2]) - 1) << field[1]
            if not taken & mask:
                taken |= mask
                fields.append(field)
        return _bitfields(fields)
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        model = draw(models(depth=depth - 1, names=names))
        bare = model.record and draw(st.booleans())
        parts.append(("" if bare else f"m{next(names)}", model))
    return _record(parts, Kind.UNION if what == "u" else Kind.STRUCT, draw(st.integers(0, 3)))


@examples(150)
@given(models(), st.data())
def test_any_type(model: Model, data: st.DataObject) -> None:
    codec = made(model.write)
    assert codec.size == model.size
    before, after = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    stride = before + codec.size + after
    # Half of the bytes as they come, half made of few: NULs, text, small numbers.
    few = st.lists(st.sampled_from(b"\0\0\1\3A\x7f\x80\xff"), min_size=stride, max_size=stride)
    row = st.binary(min_size=stride, max_size=stride) | few.map(bytes)
    rows = data.draw(st.lists(row, max_size=3))
    values = [each[before : before + codec.size] for each in rows]
    expected = [model.decode(each) for each in values]
    assert [json.loads(text) for text in codec.rows(b"".join(rows), before, stride)] == expected
    assert [codec.decode(each) for each in values] == expected
    for each in expected:
        given_ = model.give(each)
        assert model.give(codec.decode(codec.encode(given_, []))) == given_
