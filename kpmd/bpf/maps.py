"""What maps are made of: how much memory they take, and how their entries lie in it."""

from __future__ import annotations

from dataclasses import dataclass

from kpmd.bpf.abi import OUTER_TYPES, PERCPU_TYPES
from kpmd.bpf.objects import MapDetails

_POSSIBLE = "/sys/devices/system/cpu/possible"

# include/uapi/linux/bpf.h: the map types that need another formula for their memory.
_ARRAY, _ARENA, _PAGE = 2, 33, 4096
_RINGBUFS = frozenset({27, 31})
#: What an entry of a hash costs beside its key and value, generously.
_ENTRY_COST = 64


def possible_cpus(text: str | None = None) -> int:
    """How many CPUs the kernel keeps room for: the width of per-CPU values.

    ``text`` is in the form of ``/sys/devices/system/cpu/possible`` (``0-3,8``), which is read when
    it is left out.
    """
    if text is None:
        with open(_POSSIBLE, encoding="utf-8") as file:
            text = file.read()
    total = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def memory_of(type_number: int, key_size: int, value_size: int, max_entries: int, cpus: int) -> int:
    """About what a map takes of the kernel's memory when it is full, in bytes."""
    if type_number in _RINGBUFS:
        return max_entries
    if type_number == _ARENA:
        return max_entries * _PAGE
    value = -(-value_size // 8) * 8 * (cpus if type_number in PERCPU_TYPES else 1)
    return max_entries * (key_size + value + (0 if type_number == _ARRAY else _ENTRY_COST))


@dataclass(frozen=True)
class Layout:
    """How an entry of a map lies in the buffers of bpf(2).

    The values of a per-CPU map are ``copies``, one for each possible CPU; each has ``stride`` bytes
    of room, of which the first ``value_size`` count.
    """

    key_size: int
    value_size: int
    stride: int
    copies: int
    percpu: bool

    @classmethod
    def of(cls, details: MapDetails, cpus: int) -> Layout:
        """The layout of a map on a machine with so many possible CPUs."""
        size = 4 if details.type_number in OUTER_TYPES else details.value_size
        if details.percpu:
            # The kernel rounds each CPU's value up to 8 bytes.
            return cls(details.key_size, size, (size + 7) & ~7, cpus, True)
        return cls(details.key_size, size, size, 1, False)

    @property
    def values(self) -> int:
        """Bytes of all copies of an entry's value."""
        return self.stride * self.copies

    def split(self, raw: bytes) -> list[bytes]:
        """The copies of one entry's value, without what fills them up."""
        return [
            raw[start : start + self.value_size] for start in range(0, self.values, self.stride)
        ]

    def join(self, copies: list[bytes]) -> bytes:
        """The copies of one entry's value as the kernel takes them."""
        return b"".join(copy.ljust(self.stride, b"\0") for copy in copies)


@dataclass(frozen=True)
class Chunk:
    """Some entries: their keys, and their values, one behind the other as in ``Layout``.

    ``next`` is the cursor of what comes behind them; None: nothing does.
    """

    keys: memoryview
    values: memoryview
    count: int
    next: str | None
