"""BTF that was damaged: what is asked of it ends soon, in a value or in BtfError."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from kpmd.core.btf import Btf, BtfError, Kind
from kpmd.core.codec import Codec, compile_section, compile_type
from kpmd.errors import Invalid
from tests.fuzz.background import examples
from tests.unit.btf import objects, section

P = ParamSpec("P")
T = TypeVar("T")

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner)
)

#: Processor seconds that one call may take. The largest type there may be takes some 10 ms.
MOST = 0.25

WHOLE = [section(path, ".BTF") for path in objects()]

#: Numbers that a length, an offset or a type is likely to be wrong with.
ODD = st.sampled_from([0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0xFFFFFF, 0x80000000, 0xFFFFFFFF])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The BTF of an object with some words changed, records of it moved, or cut off."""
    raw = bytearray(draw(st.sampled_from(WHOLE)))
    words = len(raw) // 4
    types = struct.unpack_from("<I", raw, 12)[0] // 4
    for _ in range(draw(st.integers(1, 6))):
        at = 4 * draw(st.integers(6, 5 + types) | st.integers(0, words - 1))
        match draw(st.integers(0, 4)):
            case 0:
                raw[at : at + 4] = struct.pack("<I", draw(ODD | st.integers(0, 2**32 - 1)))
            case 1:
                raw[at : at + 4] = struct.pack("<I", draw(st.integers(0, 200)))
            case 2:
                # Another kind, or another number of members.
                raw[at + draw(st.integers(0, 3))] = draw(st.integers(0, 255))
            case 3:
                other = 4 * draw(st.integers(0, words - 1))
                raw[at : at + 12] = raw[other : other + 12]
            case _:
                (old,) = struct.unpack_from("<I", raw, at)
                new = (old + draw(st.integers(-3, 3))) & 0xFFFFFFFF
                raw[at : at + 4] = struct.pack("<I", new)
    return bytes(raw[: draw(st.just(len(raw)) | st.integers(0, len(raw)))])


def _soon(work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T | None:
    """What ``work`` gives; None where it ends in BtfError. It must end soon."""
    begun = time.thread_time()
    found, words = None, ""
    try:
        found = work(*args, **named)
    except BtfError as error:
        words = str(error)
    assert time.thread_time() - begun < MOST
    assert words.isprintable()
    assert len(words) < 2000
    return found


def _use(codec: Codec, data: bytes, value: object) -> None:
    raw = (data * (codec.size // len(data) + 1))[: codec.size]
    found = _soon(codec.decode, raw)
    texts = _soon(codec.rows, raw + raw, 0, codec.size)
    assert texts is not None
    assert [json.loads(text) for text in texts] == [found, found]
    for each in (found, value):
        try:
            encoded = codec.encode(each, ["value"])
        except Invalid:
            continue
        assert len(encoded) >= codec.size


def _params(btf: Btf, type_id: int) -> list[tuple[str, int]]:
    return list(btf.params(type_id))


@examples(150)
@given(damaged(), st.binary(min_size=1, max_size=64), VALUES)
def test_damaged(raw: bytes, data: bytes, value: object) -> None:
    btf = _soon(Btf, raw)
    if btf is None:
        return
    _soon(btf.structs)
    _soon(btf.globals_pointing_to_structs)
    for type_id in range(len(btf) + 2):
        _soon(btf.describe, type_id)
        _soon(_params, btf, type_id)
        codec = _soon(compile_type, btf, type_id)
        if codec is not None:
            _use(codec, data, value)
        if type_id <= len(btf) and btf.kind(type_id) == Kind.DATASEC:
            name = _soon(btf.name, type_id)
            whole = name and _soon(compile_section, btf, name)
            if whole:
                _use(whole, data, value)


@examples(100)
@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    _soon(Btf, raw)
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(raw), len(raw), 1)
    btf = _soon(Btf, header + raw + b"\0")
    if btf is None:
        return
    for type_id in range(len(btf) + 1):
        _soon(compile_type, btf, type_id)
