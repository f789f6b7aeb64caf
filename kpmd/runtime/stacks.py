"""The kernel's functions by address, kept fresh."""

from __future__ import annotations

import threading

from kpmd.core.stacks import TextSymbols
from kpmd.runtime.kernel import Kernel


class StackSymbols:
    """Reads all functions when a stack trace first needs them, and anew when modules came or went.

    They take some 4 MB. Blocks: for the pool only.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._lock = threading.Lock()
        self._signature: tuple[bytes, ...] | None = None
        self._symbols = TextSymbols(b"")

    def current(self) -> TextSymbols:
        """The functions as of now."""
        with self._lock:
            # Taken before: what changes while they are read is read again next time.
            signature = self._kernel.modules_signature()
            if signature != self._signature:
                self._symbols = TextSymbols(self._kernel.symbol_files().kallsyms)
                self._signature = signature
                self._kernel.release_memory()
            return self._symbols
