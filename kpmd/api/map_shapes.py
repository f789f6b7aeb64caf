"""The shapes of requests and answers about what is in maps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kpmd.api.bodies import PageQuery
from kpmd.api.fields import Answer, Cursor, Hex, Model

#: Entries that one request may write or delete.
MAX_ENTRIES = 4096

HexText = Annotated[str, Field(description="Bytes as they lie in memory, in hex.")]
Key = Annotated[
    str,
    Field(
        description="The key's bytes in hex; or `json:` and the key in JSON, as `decoded` has it.",
        examples=["2a000000", "json:42"],
    ),
]
Value = Annotated[
    HexText | list[HexText] | None,
    Field(description="In hex. Per-CPU maps take one for all CPUs, or a list with one for each."),
]
Decoded = Annotated[
    Any,
    Field(
        description="In place of `value`: JSON as it is decoded. Per-CPU maps take a list with one "
        "for each CPU, or anything but a list for all of them."
    ),
]
Mode = Annotated[
    Literal["any", "create", "replace"],
    Field(
        description="`create`: `conflict` where there is such an entry; `replace`: `not-found` "
        "where there is none."
    ),
]


class ValueBody(Model):
    """A value: exactly one of `value` and `decoded`."""

    value: Value = None
    decoded: Decoded = None


class EntryBody(ValueBody):
    """The value of an entry."""

    mode: Mode = "any"


class PushBody(ValueBody):
    """A value to push."""

    overwrite: Annotated[
        bool, Field(description="Where there is no room: in place of the oldest value.")
    ] = False


class GlobalBody(Model):
    """A variable's value: exactly one of `value` and `decoded`."""

    value: HexText | None = None
    decoded: Annotated[Any, Field(description="In JSON, as it is decoded.")] = None


class ItemBody(ValueBody):
    """An entry to write."""

    key: Key


class EntriesBody(Model):
    """Entries to write, in their order; the first that fails ends it."""

    items: Annotated[list[ItemBody], Field(min_length=1, max_length=MAX_ENTRIES)]
    mode: Mode = "any"


class KeysBody(Model):
    """Which entries to delete."""

    keys: Annotated[list[Key] | None, Field(max_length=MAX_ENTRIES)] = None


# Queries


_DECODE = Field(strict=False, description="`false` leaves out `decoded`.")


class DecodeQuery(Model):
    """How to show it."""

    decode: Annotated[bool, _DECODE] = True


class EntriesQuery(PageQuery):
    """Which part of the entries, and how to show them."""

    decode: Annotated[bool, _DECODE] = True


class DeleteQuery(Model):
    """`all` deletes all entries."""

    all: Annotated[bool, Field(strict=False)] = False


# Answers


class DecodedAnswer(Answer):
    """What the object's BTF makes of an entry; what it does not tell of is left out.

    A value of a per-CPU map is a list with one for each possible CPU. A stack trace's value is
    `{"frames": [{"address", "symbol", "offset", "module"}, …]}`, the innermost first.
    """

    key: Any = None
    value: Any = None


class EntryAnswer(Answer):
    """A map's entry. Per-CPU maps have a list of values, one for each possible CPU."""

    key: Hex
    value: Hex | list[Hex]
    decoded: DecodedAnswer = DecodedAnswer()


class EntriesPage(Answer):
    """A page of a map's entries, in the kernel's order. It may have fewer than asked for."""

    items: list[EntryAnswer]
    next: Cursor


class ValueAnswer(Answer):
    """A value of a queue or stack."""

    value: Hex
    decoded: Any = None


class WrittenAnswer(Answer):
    """How many entries were written."""

    written: int


class DeletedAnswer(Answer):
    """How many entries were deleted; and how many of the keys there were none of."""

    deleted: int
    missing: int


class GlobalAnswer(Answer):
    """A global variable. `decoded` is left out where its type cannot be decoded."""

    name: str
    section: Annotated[str, Field(examples=[".data", ".bss", ".rodata"])]
    map: Annotated[str, Field(description="The map that has the section.")]
    type: Annotated[str | None, Field(description="As C writes it.")]
    size: int
    writable: bool
    value: Hex
    decoded: Any = None


class GlobalsPage(Answer):
    """A page of global variables, by section and place."""

    items: list[GlobalAnswer]
    next: Cursor
