"""The kernel's lists of functions that only root may open: tracefs's, and debugfs's blacklist.

Whoever has them open may read them, as often as wanted, and after modules were loaded, too: the
kernel checks when they are opened. So a daemon that is not root can be given them open
(``kpmd.runtime.handover``). May import: nothing of kpmd.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Mapping

#: From kernel 6.5 on: an address before each name.
FUNCTIONS_WITH_ADDRESSES = "available_filter_functions_addrs"
FUNCTIONS = "available_filter_functions"
#: Functions that must not be probed.
BLACKLIST = "kprobes-blacklist"

#: Where each lies: the first that is there.
PATHS = {
    name: tuple(f"/sys/kernel/{folder}/{name}" for folder in ("tracing", "debug/tracing"))
    for name in (FUNCTIONS_WITH_ADDRESSES, FUNCTIONS)
} | {BLACKLIST: ("/sys/kernel/debug/kprobes/blacklist",)}

_CHUNK = 1 << 16


class Files:
    """Reads the files: by the FD where one was given, else by their paths. Thread-safe."""

    def __init__(self, opened: Mapping[str, int] | None = None) -> None:
        """``opened``: FDs by the names of ``PATHS``. They stay the caller's."""
        self._opened = dict(opened or {})
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes | None:
        """All of it as of now; None where it cannot be read."""
        try:
            fd = self._opened.get(name)
            if fd is not None:
                return self._read_all(fd)
            with open_first(name) as file:
                return file.readall()
        except OSError:
            return None

    def lists_functions(self) -> bool:
        """Whether there is a list of functions that can be read.

        By opening it: the kernel's lockdown refuses what access(2) grants.
        """
        for name in (FUNCTIONS_WITH_ADDRESSES, FUNCTIONS):
            if name in self._opened:
                return True
            with contextlib.suppress(OSError), open_first(name):
                return True
        return False

    def _read_all(self, fd: int) -> bytes:
        # At offsets of our own, as the FD's is shared by all who have it. One at a time: for each
        # read that does not go on where the last one ended, the kernel starts from the beginning.
        parts = bytearray()
        with self._lock:
            while part := os.pread(fd, _CHUNK, len(parts)):
                parts += part
        return bytes(parts)


def open_first(name: str) -> io.FileIO:
    """Open the file; raises the last path's OSError where there is none that can be opened."""
    *others, last = PATHS[name]
    for path in others:
        try:
            return open(path, "rb", buffering=0)
        except OSError:
            continue
    return open(last, "rb", buffering=0)
