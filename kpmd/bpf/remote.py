"""The memory of another process: read and written in bounds, by an FD opened while it was trusted.

Imports nothing of kpmd.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any

_PAGE = 4096
_ADDRESSES = 1 << 63  # those above are the kernel's, and no offset in a file


class Memory:
    """``/proc/PID/mem``. Whoever holds it needs no further right, whatever becomes of the process.

    Opening takes what ptrace(2) takes (PTRACE_MODE_ATTACH_FSCREDS): the process is a child of this
    one, of its uid, with no capability more, and dumpable at this moment.
    """

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Give it back."""
        os.close(self._fd)

    def read(self, address: int, size: int) -> bytearray:
        """Exactly these bytes. Raises OSError (EFAULT) where some cannot be read."""
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            done += _some(os.preadv, self._fd, [view[done:]], address + done)
        return content

    def string(self, address: int, most: int) -> bytes:
        """The bytes up to a NUL. Raises OSError: EFAULT, or ENAMETOOLONG where none comes soon."""
        found = b""
        while len(found) <= most:
            # Not over the page's end: the next one may not be there.
            start = address + len(found)
            piece = bytes(self.read(start, min(_PAGE - start % _PAGE, most + 1 - len(found))))
            head, nul, _ = piece.partition(b"\0")
            found += head
            if nul:
                return found
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))

    def write(self, address: int, content: bytes) -> None:
        """Put bytes there. Raises OSError (EFAULT)."""
        done = 0
        while done < len(content):
            done += _some(os.pwrite, self._fd, content[done:], address + done)


def _some(call: Callable[[int, Any, int], int], fd: int, what: object, address: int) -> int:
    """How many bytes went; never 0."""
    if address < _ADDRESSES:
        with contextlib.suppress(OSError):
            if went := call(fd, what, address):
                return went
    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
