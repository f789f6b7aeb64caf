"""The journal's native protocol: one datagram is one entry, with fields.

Facts: systemd.io/JOURNAL_NATIVE_PROTOCOL. Without a library: systemd-python and cysystemd bring
libsystemd along, and logging-journald makes field names of the keys of nested data; it would do for
us no more than ``encode``, since what is put on record is flat and too small for a memfd.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Mapping

#: Where journald listens.
SOCKET = "/run/systemd/journal/socket"

#: Microseconds that an entry waits for room in journald's queue.
PATIENCE_US = 1_000_000

_LENGTH = struct.Struct("<Q")


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """One entry. A name may come more than once; names are the caller's own, values anybody's.

    All values have the form with a length, which the protocol demands only for those with newlines:
    nothing in a value can be taken for its end.
    """
    parts: list[bytes] = []
    for name, value in fields:
        data = value.encode()
        parts += (name.encode("ascii"), b"\n", _LENGTH.pack(len(data)), data, b"\n")
    return b"".join(parts)


def is_standard_error(environ: Mapping[str, str], fd: int = 2) -> bool:
    """Whether ``fd`` goes to the journal, as JOURNAL_STREAM tells of it (systemd.exec(5))."""
    status = os.fstat(fd)
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Journald:
    """Sends entries, by the path each time: a journald that is started anew has a new socket."""

    def __init__(self, address: str = SOCKET) -> None:
        self._address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Not settimeout: it polls, and poll(2) does not know the queue of a socket that this one
        # is not connected to, so that it would spin.
        patience = struct.pack("@ll", *divmod(PATIENCE_US, 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)

    def send(self, fields: Iterable[tuple[str, str]]) -> None:
        """Send one entry. Waits for room in journald's queue, a second at most; raises OSError."""
        try:
            self._sock.sendto(encode(fields), self._address)
        except BlockingIOError:
            raise TimeoutError(errno.ETIMEDOUT, "journald takes no more entries") from None

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
