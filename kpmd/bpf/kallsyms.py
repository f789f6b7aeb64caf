"""Reads what the kernel tells of its functions: kallsyms, tracefs, and the list of modules."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from kpmd.bpf import tracefs


@dataclass(frozen=True)
class SymbolFiles:
    """The raw files, as the kernel wrote them.

    ``functions`` is ``available_filter_functions_addrs`` (``functions_have_addresses``; kernel 6.5
    and newer), else ``available_filter_functions``, else None where tracefs cannot be read.
    """

    kallsyms: bytes
    functions: bytes | None
    functions_have_addresses: bool
    #: ``kprobes/blacklist`` of debugfs: functions that must not be probed. Empty where it cannot be
    #: read.
    blacklist: bytes = b""


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


def read_symbol_files(files: tracefs.Files) -> SymbolFiles:
    """Read kallsyms and tracefs's list of traceable functions. Takes 0.1 to 1 second."""
    kallsyms = _read("/proc/kallsyms")
    blacklist = files.read(tracefs.BLACKLIST) or b""
    if functions := files.read(tracefs.FUNCTIONS_WITH_ADDRESSES):
        return SymbolFiles(kallsyms, functions, True, blacklist)
    return SymbolFiles(kallsyms, files.read(tracefs.FUNCTIONS) or None, False, blacklist)


def release_memory() -> None:
    """Give freed memory back to the kernel (malloc_trim(3)).

    The files above are a hundred times as long as what is kept of them, and glibc would keep twice
    as much as the index takes. Does nothing with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def modules_signature() -> tuple[bytes, ...]:
    """Changes whenever a module was loaded or unloaded: name, size and address of each.

    Reference counts, which change all the time, are left out.
    """
    text = _read("/proc/modules")
    lines = (line.split() for line in text.splitlines())
    return tuple(b" ".join((*parts[:2], *parts[5:6])) for parts in lines)
