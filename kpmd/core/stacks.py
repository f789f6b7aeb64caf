"""Stack traces as a map of that type keeps them, and the functions that their addresses are in."""

from __future__ import annotations

import json
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate, takewhile

from kpmd.core.tables import kallsyms_table

#: How far behind a function's start an address can lie that is still in it. What lies between the
#: last function of a module and the next one is in none.
_MOST_OFFSET = 256 << 10

# enum bpf_stack_build_id_status, and struct bpf_stack_build_id: status, build id, offset or address
_EMPTY, _VALID = 0, 1
_BUILD_ID = struct.Struct("<i20sQ")


#: Characters of a frame's text, generously: names may be longer, but not those of all frames.
_FRAME = 128


class TextSymbols:
    """All functions of the kernel and of its modules, traceable or not, by address."""

    def __init__(self, kallsyms: bytes) -> None:
        """``kallsyms``: the raw file; where it hides addresses, nothing is found."""
        table = kallsyms_table(kallsyms)
        addresses = table.addresses
        order: Iterable[int] = sorted(range(len(addresses)), key=addresses.__getitem__)
        self._order = array("I", order)
        self._addresses = array("Q", map(addresses.__getitem__, self._order))
        self._text = table.text()
        self._starts = array("I", accumulate((len(name) + 1 for name in table.names()), initial=0))
        self._modules = table.modules
        self._module_of = table.module_of

    def find(self, address: int) -> tuple[str, int, str | None] | None:
        """The function that an address is in, how far in it, and its module (None: the kernel)."""
        place = bisect_right(self._addresses, address) - 1
        if place < 0:
            return None
        start = self._addresses[place]
        if not start or address - start > _MOST_OFFSET:
            return None
        # Of several names the one that the kernel would tell: the first.
        position = self._order[bisect_left(self._addresses, start)]
        name = self._text[self._starts[position] : self._starts[position + 1] - 1]
        return name, address - start, self._modules[self._module_of[position]] or None


class StackCodec:
    """Decodes stack traces; as a ``Codec`` does, for as long as a page or a stream takes."""

    def __init__(self, build_ids: bool, symbols: Callable[[], TextSymbols] | None) -> None:
        """``build_ids``: user space's frames, told by file. ``symbols`` None: only addresses."""
        self._frames = self._by_build_id if build_ids else self._by_address
        self._find = symbols
        self._symbols: TextSymbols | None = None
        self._known: dict[int, str] = {}

    def longest(self, length: int) -> int:
        """About how many characters the text of a trace in so many bytes has at the most."""
        return 16 + length // 8 * _FRAME

    def rows(
        self, rows: bytes | memoryview, before: int, stride: int, length: int | None = None
    ) -> list[str]:
        """The JSON texts of traces of which one stands ``before`` bytes into each ``stride``."""
        end = stride if length is None else before + length
        return [
            f'{{"frames":[{",".join(self._frames(rows[at + before : at + end]))}]}}'
            for at in range(0, len(rows), stride)
        ]

    def _by_address(self, raw: bytes | memoryview) -> Iterable[str]:
        addresses = array("Q", bytes(raw[: len(raw) & ~7]))
        return map(self._frame, takewhile(bool, addresses))

    def _by_build_id(self, raw: bytes | memoryview) -> Iterable[str]:
        for status, build_id, place in _BUILD_ID.iter_unpack(raw[: len(raw) & ~31]):
            if status == _EMPTY:
                return
            if status == _VALID:
                yield (
                    f'{{"address":null,"symbol":null,"offset":{place},"module":null,'
                    f'"build_id":"{build_id.hex()}"}}'
                )
            else:
                yield self._frame(place)

    def _frame(self, address: int) -> str:
        text = self._known.get(address)
        if text is None:
            if self._find is not None and self._symbols is None:
                self._symbols = self._find()
            found = self._symbols.find(address) if self._symbols is not None else None
            name, offset, module = found or (None, None, None)
            text = self._known[address] = (
                f'{{"address":"0x{address:016x}","symbol":{json.dumps(name)},'
                f'"offset":{json.dumps(offset)},"module":{json.dumps(module)}}}'
            )
        return text
