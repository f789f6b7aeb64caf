"""Reads what the kernel tells of its functions: kallsyms, tracefs, and the list of modules."""

from __future__ import annotations

import os
from dataclasses import dataclass

_TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class SymbolFiles:
    """The raw files, as the kernel wrote them.

    ``functions`` is ``available_filter_functions_addrs`` (``functions_have_addresses``; kernel 6.5
    and newer), else ``available_filter_functions``, else None where tracefs cannot be read.
    """

    kallsyms: bytes
    functions: bytes | None
    functions_have_addresses: bool


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        parts = []
        while part := os.read(fd, _CHUNK):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return None
    finally:
        os.close(fd)


def read_symbol_files() -> SymbolFiles:
    """Read kallsyms and tracefs's list of traceable functions. Takes 0.1 to 1 second."""
    kallsyms = _read("/proc/kallsyms") or b""
    for root in _TRACEFS:
        if functions := _read(f"{root}/available_filter_functions_addrs"):
            return SymbolFiles(kallsyms, functions, True)
    for root in _TRACEFS:
        if functions := _read(f"{root}/available_filter_functions"):
            return SymbolFiles(kallsyms, functions, False)
    return SymbolFiles(kallsyms, None, False)


def modules_signature() -> tuple[bytes, ...]:
    """Changes whenever a module was loaded or unloaded: name, size and address of each.

    Reference counts, which change all the time, are left out.
    """
    text = _read("/proc/modules") or b""
    lines = (line.split() for line in text.splitlines())
    return tuple(b" ".join((*parts[:2], *parts[5:6])) for parts in lines)
