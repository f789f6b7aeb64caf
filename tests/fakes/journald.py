"""journald as far as its native protocol goes: a datagram socket, and a parser of entries."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

Fields = list[tuple[str, str]]


def parse(data: bytes) -> Fields:
    """The fields of one entry, in both forms that the protocol has."""
    fields = []
    while data:
        head, _, rest = data.partition(b"\n")
        assert head, "an empty line: here another entry would begin"
        name, equals, value = head.partition(b"=")
        if equals:
            data = rest
        else:
            (length,) = struct.unpack("<Q", rest[:8])
            value, end, data = (
                rest[8 : 8 + length],
                rest[8 + length : 9 + length],
                rest[9 + length :],
            )
            assert end == b"\n"
        fields.append((name.decode("ascii"), value.decode()))
    return fields


class Journald:
    """Listens at ``address``; what was sent waits until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "journal")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.address)
        self._sock.settimeout(10)

    def entry(self) -> Fields:
        """The next entry; waits for it."""
        return parse(self._sock.recv(1 << 20))

    def end(self) -> None:
        """Be gone, with the socket."""
        self._sock.close()
        Path(self.address).unlink(missing_ok=True)
