"""Reads what the kernel tells of its functions: kallsyms, tracefs, and the list of modules."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


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


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return None


def read_symbol_files() -> SymbolFiles:
    """Read kallsyms and tracefs's list of traceable functions. Takes 0.1 to 1 second."""
    kallsyms = _read("/proc/kallsyms") or b""
    blacklist = _read("/sys/kernel/debug/kprobes/blacklist") or b""
    for root in _TRACEFS:
        if functions := _read(f"{root}/available_filter_functions_addrs"):
            return SymbolFiles(kallsyms, functions, True, blacklist)
    for root in _TRACEFS:
        if functions := _read(f"{root}/available_filter_functions"):
            return SymbolFiles(kallsyms, functions, False, blacklist)
    return SymbolFiles(kallsyms, None, False, blacklist)


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
    text = _read("/proc/modules") or b""
    lines = (line.split() for line in text.splitlines())
    return tuple(b" ".join((*parts[:2], *parts[5:6])) for parts in lines)
