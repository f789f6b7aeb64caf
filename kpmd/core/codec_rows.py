"""The JSON texts of many values at once: column by column, and one template for all of them.

No line of Python runs for a value but where a column has a reader of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple

from kpmd.core.btf import BtfError

#: Characters of the JSON text of a value at the most; and those of names among them.
_MOST_TEXT, _MOST_NAMES = 8 << 20, 1 << 20

#: Characters of an integer at the most, and of each byte of a text.
NUMBER_CHARACTERS, TEXT_CHARACTERS = 42, 6

#: Characters around what goes to the end of a row: quotes or brackets.
_AROUND_REST = 2

#: Shapes of rows that are remembered, and the columns in all of them at the most.
_MOST_SHAPES, _MOST_COLUMNS = 64, 4096


class Column(NamedTuple):
    """Where a value stands, as which code of ``struct``, and what makes it fit the template."""

    offset: int
    #: None: it goes to the end of the row.
    size: int | None
    code: str
    read: Callable[[Any], object] | None
    #: Characters of its text at the most; of one to the end of the row, for each byte of it.
    most: int = NUMBER_CHARACTERS


@dataclass
class Flat:
    """The JSON text of a type as a template for ``%``, and the columns that fill it, in order."""

    columns: list[Column] = field(default_factory=list)
    _pieces: list[str] = field(default_factory=list, init=False)
    _names: int = field(default=0, init=False)
    #: Characters of the JSON text at the most, without what goes to the end of the row.
    longest: int = field(default=0, init=False)

    def text(self, text: str) -> None:
        """Add text as it is."""
        self._add(text.replace("%", "%%"))

    def column(self, column: Column, template: str) -> None:
        """Add a column, and how it stands in the text."""
        self._add(template, 0 if column.size is None else column.most)
        self.columns.append(column)

    def _add(self, text: str, more: int = 0) -> None:
        self._names += len(text)
        self.longest += len(text) + more
        if self._names > _MOST_NAMES:
            raise BtfError(f"its names make a JSON text of more than {_MOST_NAMES} characters")
        if self.longest > _MOST_TEXT:
            raise BtfError(f"a value may make a JSON text of more than {_MOST_TEXT} characters")
        self._pieces.append(text)

    def template(self) -> str:
        """The whole template."""
        return "".join(self._pieces)


class Around(NamedTuple):
    """A template of lines that values stand in, and texts that stand before them, if any do."""

    before: str
    behind: str
    texts: Iterable[str] | None = None


class _Layer(NamedTuple):
    """Columns none of which overlap, and how a row is taken apart into them."""

    row: struct.Struct
    columns: list[int]


class Rows:
    """Reads rows of bytes in which values of one type stand. May be used by several threads."""

    def __init__(self, flat: Flat) -> None:
        self._template = flat.template()
        self._longest = flat.longest
        self._longest_by_byte = sum(each.most for each in flat.columns if each.size is None)
        self._columns = flat.columns
        self._readers = [
            (index, column.read)
            for index, column in enumerate(flat.columns)
            if column.read is not None
        ]
        self._most = min(_MOST_SHAPES, _MOST_COLUMNS // max(1, len(flat.columns)))
        self._shapes: dict[tuple[int, int, int], list[_Layer]] = {}

    @property
    def flexible(self) -> bool:
        """Whether a column goes to the end of the row."""
        return any(column.size is None for column in self._columns)

    def longest(self, behind: int) -> int:
        """Characters of a value's text at the most, of one with so many bytes to the row's end."""
        return self._longest + _AROUND_REST + behind * self._longest_by_byte

    def texts(
        self,
        rows: bytes | memoryview,
        before: int,
        stride: int,
        end: int,
        around: Around | None = None,
    ) -> list[str]:
        """The JSON texts of values that stand from ``before`` to ``end`` in each ``stride`` bytes.

        There must be room for the value, and nothing behind the last row. ``around``: what stands
        around each of them.
        """
        if not rows:
            return []
        template, texts = self._template, None
        if around is not None:
            template, texts = around.before + template + around.behind, around.texts
        layers = self._layers(before, stride, end)
        # Also where there is no column at all: each row has its text.
        if len(layers) == 1 and not self._readers and texts is None:
            return list(map(template.__mod__, layers[0].row.iter_unpack(rows)))
        columns: list[Iterable[object]] = [()] * len(self._columns)
        for layer in layers:
            found = zip(*layer.row.iter_unpack(rows), strict=True)
            for index, column in zip(layer.columns, found, strict=True):
                columns[index] = column
        for index, read in self._readers:
            columns[index] = map(read, columns[index])
        if texts is not None:
            columns.insert(0, texts)
        return list(map(template.__mod__, zip(*columns, strict=True)))

    def _layers(self, before: int, stride: int, end: int) -> list[_Layer]:
        """In how many passes rows are taken apart: one, and more where columns overlap (unions)."""
        shape = before, stride, end
        found = self._shapes.get(shape)
        if found is None:
            if len(self._shapes) >= self._most:
                self._shapes.clear()
            found = self._shapes[shape] = list(self._made(before, stride, end))
        return found

    def _made(self, before: int, stride: int, end: int) -> Iterable[_Layer]:
        formats: list[list[str]] = [["<"]]
        held: list[list[int]] = [[]]
        # Up to where each layer is full, the emptiest one first.
        full = [(0, 0)]
        for index in sorted(range(len(self._columns)), key=lambda each: self._columns[each].offset):
            column = self._columns[index]
            at = before + column.offset
            size = end - at if column.size is None else column.size
            if full[0][0] <= at:
                filled, layer = heappop(full)
            else:
                filled, layer = 0, len(formats)
                formats.append(["<"])
                held.append([])
            if at > filled:
                formats[layer].append(f"{at - filled}x")
            formats[layer].append(column.code if column.size is not None else f"{size}s")
            held[layer].append(index)
            heappush(full, (at + size, layer))
        for filled, layer in full:
            row = struct.Struct("".join([*formats[layer], f"{stride - filled}x"]))
            yield _Layer(row, held[layer])
