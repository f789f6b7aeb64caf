"""Reading maps, entry by entry."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

from kpmd.bpf.abi import KEYED_TYPES, PERCPU_TYPES, Cmd, MapElemAttr
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.objects import MapDetails
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import KernelError, NotSupported

#: An entry: its key, and its value (one for each possible CPU in per-CPU maps).
Entry = tuple[bytes, list[bytes]]

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


def _readable(details: MapDetails) -> None:
    if details.type_number not in KEYED_TYPES:
        raise NotSupported(
            f"a map of type {details.type} has no entries that can be read by key; "
            "hash, array, LRU, LPM trie and their per-CPU kinds have"
        )


class Reader:
    """Reads one map with buffers made once."""

    def __init__(self, fd: OwnedFd, details: MapDetails, cpus: int) -> None:
        _readable(details)
        self._fd = fd
        self._key = ctypes.create_string_buffer(details.key_size)
        self._next = ctypes.create_string_buffer(details.key_size)
        self._size = details.value_size
        self._percpu = details.percpu
        # The kernel rounds each CPU's value up to 8 bytes.
        self._stride = (details.value_size + 7) & ~7 if self._percpu else details.value_size
        self._count = cpus if self._percpu else 1
        self._value = ctypes.create_string_buffer(self._stride * self._count)

    def lookup(self, key: bytes) -> list[bytes] | None:
        """The value(s) of ``key``, or None where the map has no such entry."""
        self._key.raw = key
        attr = MapElemAttr(key=ctypes.addressof(self._key), value=ctypes.addressof(self._value))
        try:
            with self._fd.borrow() as attr.map_fd:
                bpf(Cmd.MAP_LOOKUP_ELEM, attr)
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise KernelError(
                f"the kernel did not read the entry: {error.strerror}", error.errno or 0
            ) from error
        raw = self._value.raw
        starts = range(0, self._stride * self._count, self._stride)
        return [raw[start : start + self._size] for start in starts]

    def next_key(self, key: bytes | None) -> bytes | None:
        """The key after ``key`` (None: the first), or None after the last.

        In a hash map a key that was deleted meanwhile is followed by the first one
        (kernel/bpf/hashtab.c).
        """
        attr = MapElemAttr(value=ctypes.addressof(self._next))
        if key is not None:
            self._key.raw = key
            attr.key = ctypes.addressof(self._key)
        try:
            with self._fd.borrow() as attr.map_fd:
                bpf(Cmd.MAP_GET_NEXT_KEY, attr)
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise KernelError(
                f"the kernel did not step through the map: {error.strerror}", error.errno or 0
            ) from error
        return self._next.raw

    def entries(self, after: bytes | None) -> Iterator[Entry]:
        """All entries behind the key ``after`` (None: from the first), in the kernel's order."""
        key = self.next_key(after)
        while key is not None:
            value = self.lookup(key)
            if value is not None:  # else it was deleted since next_key named it
                yield key, value
            key = self.next_key(key)


def memory_of(type_number: int, key_size: int, value_size: int, max_entries: int, cpus: int) -> int:
    """About what a map takes of the kernel's memory when it is full, in bytes."""
    if type_number in _RINGBUFS:
        return max_entries
    if type_number == _ARENA:
        return max_entries * _PAGE
    value = -(-value_size // 8) * 8 * (cpus if type_number in PERCPU_TYPES else 1)
    return max_entries * (key_size + value + (0 if type_number == _ARRAY else _ENTRY_COST))
