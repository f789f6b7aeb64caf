"""Field types that the models of requests and answers share."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)

_U64 = 1 << 64


class Model(BaseModel):
    """Base of request bodies: unknown fields are refused, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Answer(BaseModel):
    """Base of answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _u64(value: Any) -> int:
    if isinstance(value, str):
        text = value.lower()
        digits = text[2:] if text.startswith("0x") else text
        if not digits.isascii() or not digits.isalnum() or len(digits) > 20:
            raise ValueError("must be an integer in decimal or, behind 0x, in hexadecimal")
        try:
            value = int(digits, 16 if digits is not text else 10)
        except ValueError:
            raise ValueError(
                "must be an integer in decimal or, behind 0x, in hexadecimal"
            ) from None
    if type(value) is not int:
        raise ValueError("must be an integer, or a string with one")
    if not 0 <= value < _U64:
        raise ValueError("must be from 0 to 2^64 - 1")
    return value


#: A 64-bit value: a JSON integer, or a string in decimal or with 0x in hexadecimal.
U64 = Annotated[
    int,
    BeforeValidator(_u64),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": _U64 - 1},
                {"type": "string", "pattern": "^(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})$"},
            ],
            "description": "A 64-bit value; as a string it keeps its precision everywhere.",
        }
    ),
]


def _base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be a string in base64")
    try:
        # Line breaks are what base64(1) puts in unless told not to.
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64 (RFC 4648, with padding)") from None


def _number_or_bytes(value: Any) -> int | bytes:
    if isinstance(value, str):
        return _base64(value)
    if type(value) is not int:
        raise ValueError("must be an integer, or a string in base64")
    if not -(1 << 63) <= value < _U64:
        raise ValueError("must be from -2^63 to 2^64 - 1")
    return value


#: A number, or bytes as base64.
NumberOrBytes = Annotated[
    int | bytes,
    PlainValidator(_number_or_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": -(1 << 63), "maximum": _U64 - 1},
                {"type": "string", "contentEncoding": "base64"},
            ],
            "description": "A number for a scalar; base64 of its bytes for anything.",
        }
    ),
]

#: Bytes as base64, line breaks allowed.
Base64 = Annotated[
    bytes,
    BeforeValidator(_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]

Labels = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=64)],
        Annotated[str, Field(max_length=256)],
    ],
    Field(max_length=64, description="Words of the client's own; kpmd only keeps them."),
]

Address = Annotated[str, Field(pattern="^0x[0-9a-f]{16}$", examples=["0xffffffff81000000"])]
Decimal = Annotated[str, Field(pattern="^[0-9]{1,20}$", examples=["42"])]
Hex = Annotated[str, Field(pattern="^([0-9a-f]{2})*$", description="Bytes as they lie in memory.")]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Cursor = Annotated[
    str | None, Field(description="Give it as `after` for the next page; null on the last.")
]


def address(value: int) -> str:
    """An address as the API writes it."""
    return f"0x{value:016x}"
