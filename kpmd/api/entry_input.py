"""Keys and values of requests as bytes: given in hex, or in JSON and encoded through BTF."""

from __future__ import annotations

import binascii
from collections.abc import Sequence

from pydantic_core import from_json

from kpmd.api.map_shapes import GlobalBody, ValueBody
from kpmd.bpf.maps import Layout
from kpmd.core.btf import BtfError
from kpmd.core.codec import Codec
from kpmd.core.entries import Part, codec_of
from kpmd.core.model import Map
from kpmd.errors import Invalid

Loc = Sequence[str | int]

#: What stands before a key in JSON.
_JSON = "json:"


def key_bytes(each: Map, text: str, loc: Loc) -> bytes:
    """A key of a map, as a path or a body has it. Raises Invalid."""
    if not text.startswith(_JSON):
        return hex_bytes(text, each.key_size, f"a key of this map has {each.key_size}", loc)
    try:
        value = from_json(text.removeprefix(_JSON), allow_inf_nan=False)
    except ValueError as error:
        raise Invalid.at(loc, f"is not JSON behind {_JSON!r}: {error}") from None
    return encode(_codec(each, "key", loc), value, each.key_size, loc)


def hex_bytes(text: str, size: int, expected: str, loc: Loc) -> bytes:
    """Bytes in hex, of that size. Raises Invalid."""
    try:
        raw = binascii.unhexlify(text)
    except ValueError:
        raise Invalid.at(loc, "must be bytes in hex, two digits each") from None
    if len(raw) != size:
        raise Invalid.at(loc, f"has {len(raw)} bytes; {expected}")
    return raw


def encode(codec: Codec, value: object, size: int, loc: Loc) -> bytes:
    """A value in JSON as so many bytes. Raises Invalid."""
    raw = codec.encode(value, loc)
    if len(raw) > size:
        raise Invalid.at(loc, f"takes {len(raw)} bytes; there is room for {size}")
    return raw.ljust(size, b"\0")


def check_one(body: ValueBody | GlobalBody, loc: Loc = ()) -> None:
    """Raise Invalid unless a body has exactly one of ``value`` and ``decoded``."""
    given = body.model_fields_set & {"value", "decoded"}
    if len(given) != 1 or (body.value is None and "value" in given):
        raise Invalid.at([*loc, "value"], "give exactly one of `value`, in hex, and `decoded`")


def value_bytes(each: Map, layout: Layout, body: ValueBody, loc: Loc = ()) -> bytes:
    """The value of a request, as the kernel takes it: for all CPUs of a per-CPU map.

    Raises Invalid.
    """
    check_one(body, loc)
    given: object = body.decoded if body.value is None else body.value
    loc = [*loc, "decoded" if body.value is None else "value"]
    copies, several = [given], False
    if layout.percpu and isinstance(given, list):
        copies, several = given, True
        if len(copies) != layout.copies:
            raise Invalid.at(
                loc, f"has {len(copies)} values; this machine has {layout.copies} possible CPUs"
            )
    codec = _codec(each, "value", loc) if body.value is None else None
    made = [
        _one(layout, copy, codec, [*loc, number] if several else loc)
        for number, copy in enumerate(copies)
    ]
    return layout.join(made if several else made * layout.copies)


def _one(layout: Layout, given: object, codec: Codec | None, loc: Loc) -> bytes:
    if codec is not None:
        return encode(codec, given, layout.value_size, loc)
    if not isinstance(given, str):
        raise Invalid.at(loc, "must be bytes in hex; only per-CPU maps take a list")
    return hex_bytes(given, layout.value_size, f"a value has {layout.value_size}", loc)


def _codec(each: Map, part: Part, loc: Loc) -> Codec:
    try:
        return codec_of(each, part)
    except BtfError as error:
        raise Invalid.at(loc, f"cannot be encoded, give it in hex: {error}") from None
