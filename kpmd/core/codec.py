"""Between the bytes of a type that BTF tells of and JSON, both ways."""

from __future__ import annotations

import json
from typing import Any

from kpmd.core.btf import Btf, BtfError
from kpmd.core.codec_nodes import Loc, Node
from kpmd.core.codec_plan import Planner
from kpmd.core.codec_rows import Around, Flat, Rows


class Codec:
    """Decodes and encodes values of one type. May be used by several threads."""

    def __init__(self, name: str, node: Node) -> None:
        #: The type as C writes it, or the name of a section.
        self.name = name
        #: Bytes of a value; of one with a flexible array at its end, without that.
        self.size = node.size
        self._node = node
        flat = Flat()
        node.flatten(flat, 0, last=True)
        self._rows = Rows(flat)
        #: Whether there is a flexible array at the end.
        self.flexible = self._rows.flexible

    def longest(self, length: int) -> int:
        """Characters of the JSON text of a value in so many bytes at the most."""
        return self._rows.longest(max(0, length - self.size))

    def decode(self, raw: bytes | memoryview) -> Any:
        """A value, as JSON has it. What is behind it is left alone, or fills the flexible array.

        Raises BtfError where the bytes are too few.
        """
        end = len(raw) if self.flexible else min(len(raw), self.size)
        return json.loads(self.rows(raw[:end], 0, end)[0])

    def encode(self, value: object, loc: Loc) -> bytes:
        """The bytes of a value; members left out are zero. Raises Invalid, for the place in it."""
        buffer = bytearray(self.size)
        self._node.write(buffer, 0, value, loc, last=True)
        return bytes(buffer)

    def rows(
        self,
        rows: bytes | memoryview,
        before: int,
        stride: int,
        length: int | None = None,
        around: Around | None = None,
    ) -> list[str]:
        """The JSON texts of values of which one stands ``before`` bytes into each ``stride`` bytes.

        A flexible array fills the value up to ``length`` bytes, or to the end of the row. Bytes
        behind the last whole row are left alone. ``around``: what stands around each text, which
        saves putting it there afterwards. Raises BtfError where a value has no room.
        """
        length = length if length is not None and self.flexible else stride - before
        if not 0 <= before <= before + self.size <= before + length <= stride:
            raise BtfError(f"{self.name} has {self.size} bytes; these are {length}")
        whole = len(rows) - len(rows) % stride
        return self._rows.texts(rows[:whole], before, stride, before + length, around)


def compile_type(btf: Btf, type_id: int) -> Codec:
    """The codec of a type. Raises BtfError where it has no size, or is too deep or too large."""
    return Codec(btf.describe(type_id), Planner(btf).type(type_id))


def compile_section(btf: Btf, name: str) -> Codec:
    """The codec of a section: an object with a member for each variable. Raises BtfError."""
    return Codec(name, Planner(btf).section(name))
