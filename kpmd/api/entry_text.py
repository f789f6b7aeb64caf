"""Entries as JSON and as bytes, many at a time, without an object of Python's for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, Protocol

from kpmd.bpf.maps import Chunk, Layout
from kpmd.errors import TooLarge

#: Units in an entry from which on entries are joined one by one: else unit by unit, all at once.
_MOST_UNITS = 48

#: About how many bytes of JSON are made at once; and the most that values may decode to.
_USUAL_TEXT = 2 << 20
_MOST_TEXT = 8 << 20

#: Characters that may be made between two looks at how many there are.
_BLOCK = 1 << 20

_FORMATS: dict[int, Literal["Q", "I", "H", "B"]] = {8: "Q", 4: "I", 2: "H", 1: "B"}


class Rows(Protocol):
    """What makes JSON texts of many values; see ``kpmd.core.codec.Codec``."""

    def longest(self, length: int) -> int:
        """Characters of the text of so many bytes at the most."""

    def rows(
        self, rows: bytes | memoryview, before: int, stride: int, length: int | None = None
    ) -> list[str]:
        """The texts of values, one in each row."""


class EntryText:
    """Writes entries of one map. ``key`` and ``value`` decode them, where they can be."""

    def __init__(self, layout: Layout, key: Rows | None = None, value: Rows | None = None) -> None:
        self._layout = layout
        self._key = key
        self._value = value
        copies = '"value":["%s"]' if layout.percpu else '"value":"%s"'
        decoded_value = '"value":[%s]' if layout.percpu else '"value":%s'
        decoded = [*(['"key":%s'] if key else ()), *([decoded_value] if value else ())]
        parts = ['"key":"%s"', copies]
        if decoded:
            parts.append('"decoded":{' + ",".join(decoded) + "}")
        self._template = "{" + ",".join(parts) + "}"

    def limit(self, asked: int) -> int:
        """How many entries to write at once: types may have little in them and much to be told."""
        layout = self._layout
        longest = len(self._template) + 2 * layout.key_size + 3 * layout.values
        if self._key is not None:
            longest += self._key.longest(layout.key_size)
        if self._value is not None:
            longest += layout.copies * self._value.longest(layout.value_size)
        return max(1, min(asked, _USUAL_TEXT // longest))

    def texts(self, chunk: Chunk) -> list[str]:
        """A JSON object for each entry. Raises TooLarge where little decodes to very much."""
        layout = self._layout
        columns: list[Iterable[str]] = [
            _hex(chunk.keys, chunk.count, layout.key_size),
            self._copies(_hex(chunk.values, chunk.count * layout.copies, layout.value_size), '","'),
        ]
        if self._key is not None:
            columns.append(_decoded(self._key, chunk.keys, layout.key_size, layout.key_size))
        if self._value is not None:
            found = _decoded(self._value, chunk.values, layout.stride, layout.value_size)
            columns.append(self._copies(found, ","))
        return list(map(self._template.__mod__, zip(*columns, strict=True)))

    def value(self, raw: bytes) -> str:
        """One value, without a key."""
        found = self._value and self._value.rows(raw, 0, self._layout.stride)[0]
        return f'{{"value":"{raw.hex()}"' + (f',"decoded":{found}}}' if found else "}")

    def _copies(self, texts: Sequence[str], between: str) -> Iterable[str]:
        """Those of all CPUs together, for each entry."""
        if not self._layout.percpu:
            return texts
        return map(between.join, zip(*[iter(texts)] * self._layout.copies, strict=True))


def _hex(data: memoryview, count: int, size: int) -> list[str]:
    """The first ``size`` bytes of each of the rows in hex, all at once."""
    if not size or not count:
        return [""] * count
    stride = len(data) // count
    rows = data.hex(" ", stride).split(" ")
    return rows if size == stride else [row[: 2 * size] for row in rows]


def _decoded(codec: Rows, data: memoryview, stride: int, size: int) -> list[str]:
    """The values in each row as JSON. Raises TooLarge."""
    texts: list[str] = []
    length, step = 0, max(1, _BLOCK // codec.longest(size)) * stride
    for at in range(0, len(data), step):
        texts += codec.rows(data[at : at + step], 0, stride, size)
        length += sum(map(len, texts[at // stride :]))
        if length > _MOST_TEXT:
            raise TooLarge(
                f"these entries decode to more than {_MOST_TEXT} bytes: ask for fewer (limit), or "
                "for none to be decoded (decode=false)"
            )
    return texts


def octets(layout: Layout, chunk: Chunk) -> bytes:
    """The bytes of each entry: its key, and its value, those of all CPUs one after the other."""
    columns = [(chunk.keys, layout.key_size, 0, layout.key_size)]
    columns += [
        (chunk.values, layout.values, copy * layout.stride, layout.value_size)
        for copy in range(layout.copies)
    ]
    unit = math.gcd(8, *chain.from_iterable(column[1:] for column in columns))
    row = layout.key_size + layout.copies * layout.value_size
    if row // unit > _MOST_UNITS:
        pieces = [
            [bytes(data[at + before : at + before + size]) for at in range(0, len(data), stride)]
            for data, stride, before, size in columns
        ]
        return b"".join(chain.from_iterable(zip(*pieces, strict=True)))
    made = bytearray(chunk.count * row)
    into = memoryview(made).cast(_FORMATS[unit])
    place = 0
    for data, stride, before, size in columns:
        units = data.cast(_FORMATS[unit])
        for at in range(before // unit, (before + size) // unit):
            into[place :: row // unit] = units[at :: stride // unit]
            place += 1
    return bytes(made)
