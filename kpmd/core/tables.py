"""From the raw text of kallsyms and tracefs to columns, with as little Python a line as can be.

Both files are long (154,686 and 40,339 lines on 6.12), and are read again whenever a module comes
or goes. They begin with the kernel's own symbols, whose lines all have the same number of words, so
that the words of one column are every n-th; behind them come those of modules, with a word more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, compress

#: Types of functions in kallsyms (nm(1)).
_TEXT = frozenset((b"t", b"T", b"w", b"W"))

#: Bytes that are split at once: few enough for the words to fit into memory that is used again.
_PIECE = 1 << 19


@dataclass(frozen=True)
class Table:
    """Columns: names, addresses (0: not told), and for each the number of its module.

    ``pieces`` are the names, in pieces of many lines: a string for each of 150,000 symbols would
    take 10 MB, and leave holes behind. ``modules[0]`` is the empty name, for the kernel itself.
    """

    pieces: list[str]
    addresses: array[int]
    module_of: array[int]
    modules: list[str]

    def names(self) -> Iterator[str]:
        """The names, one by one."""
        return chain.from_iterable(piece.split("\n") for piece in self.pieces)

    def text(self) -> str:
        """All names, a line break between two."""
        return "\n".join(self.pieces)


def kallsyms_table(text: bytes) -> Table:
    """The functions of kallsyms (``ADDRESS TYPE NAME``, ``[MODULE]`` behind a tab)."""
    own, rest = _divide(text, b"\t[")
    columns = _Columns()
    for piece in _pieces(own):
        words = piece.split()
        if len(words) != 3 * piece.count(b"\n"):
            rest = piece + rest  # lines of another form: one by one
            continue
        taken = list(map(_TEXT.__contains__, words[1::3]))
        columns.add(list(compress(words[0::3], taken)), list(compress(words[2::3], taken)))
    for piece in _pieces(rest):
        for line in piece.splitlines():
            words = line.split()
            if len(words) >= 3 and words[1] in _TEXT:
                columns.add_one(words[0], words[2], words[3] if len(words) > 3 else b"")
    return columns.table()


def tracefs_table(text: bytes, with_addresses: bool) -> Table:
    """``available_filter_functions``, with or without addresses (``[ADDRESS] NAME [MODULE]``)."""
    own, rest = _divide(text, b" [")
    width = 2 if with_addresses else 1
    columns = _Columns()
    for piece in _pieces(own):
        words = piece.split()
        columns.add(words[0::2] if with_addresses else None, words[width - 1 :: width])
    for piece in _pieces(rest):
        for line in piece.splitlines():
            words = line.split()
            if len(words) >= width:
                address = words[0] if with_addresses else b"0"
                columns.add_one(
                    address, words[width - 1], words[width] if len(words) > width else b""
                )
    return columns.table()


def _divide(text: bytes, mark: bytes) -> tuple[bytes, bytes]:
    """The lines before the first that has a module, and the others."""
    found = text.find(mark)
    cut = len(text) if found < 0 else text.rfind(b"\n", 0, found) + 1
    return text[:cut], text[cut:]


def _pieces(text: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + _PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


class _Columns:
    """A table in the making."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._last: list[str] = []
        self._addresses = array("Q")
        self._module_of = array("H")
        self._modules: dict[str, int] = {"": 0}

    def add(self, addresses: list[bytes] | None, names: list[bytes]) -> None:
        """Lines of the kernel itself."""
        if not names:
            return
        self._pieces.append(b"\n".join(names).decode())
        if addresses is None:
            self._addresses.frombytes(bytes(8 * len(names)))
        else:
            self._addresses.extend(_numbers(addresses))
        self._module_of.frombytes(bytes(2 * len(names)))

    def add_one(self, address: bytes, name: bytes, module: bytes) -> None:
        """A line that may be of a module; its name is still in brackets."""
        plain = module.strip(b"[]").decode()
        self._last.append(name.decode())
        self._addresses.append(int(address, 16))
        self._module_of.append(self._modules.setdefault(plain, len(self._modules)))

    def table(self) -> Table:
        """What was added."""
        if self._last:
            self._pieces.append("\n".join(self._last))
            self._last.clear()
        return Table(self._pieces, self._addresses, self._module_of, list(self._modules))


def _numbers(words: list[bytes]) -> array[int]:
    """Hexadecimal words of 16 digits as numbers, all at once."""
    joined = b"".join(words)
    if len(joined) != 16 * len(words):
        return array("Q", [int(word, 16) for word in words])
    numbers = array("Q")
    numbers.frombytes(bytes.fromhex(joined.decode()))
    numbers.byteswap()  # the text is big-endian; kpmd's machines are little-endian
    return numbers
