"""Buffers for the batch commands of maps, and what comes back in them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from kpmd.bpf.maps import Chunk, Layout


def buffer(size: int) -> memoryview:
    """Zeros to be written over. Unlike a bytearray it never moves: it takes its own size only."""
    return memoryview(bytearray(size))


def address(of: memoryview | None) -> int:
    """Where a buffer lies, for as long as it does; 0 for one without bytes, or none."""
    return ctypes.addressof(ctypes.c_char.from_buffer(of)) if of else 0


@dataclass
class Batch:
    """What a batch command gave: ``count`` entries and the kernel's cursor, and its errno."""

    keys: memoryview
    values: memoryview
    cursor: memoryview
    count: int = 0
    error: int = 0

    def bucket(self) -> int:
        """The cursor of a hash."""
        return int.from_bytes(self.cursor[:4], "little")

    def chunk(self, layout: Layout, first: int, last: int, following: str | None) -> Chunk:
        """The entries from ``first`` to before ``last``."""
        key, value = layout.key_size, layout.values
        return Chunk(
            self.keys[first * key : last * key],
            self.values[first * value : last * value],
            last - first,
            following,
        )


def joined(parts: Sequence[bytes], size: int) -> memoryview:
    """Side by side in a buffer. Raises ValueError where one has another size."""
    if any(len(part) != size for part in parts):
        raise ValueError(f"each must have {size} bytes")
    return memoryview(bytearray(b"".join(parts)))
