"""Messages to the service manager, with file descriptors if need be (sd_notify(3))."""

from __future__ import annotations

import array
import socket
from collections.abc import MutableMapping, Sequence


class Notifier:
    """Sends to the socket that ``NOTIFY_SOCKET`` names; without one it does nothing."""

    def __init__(self, address: str | None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """As the service manager set it up. Takes the variable away, so that no child uses it."""
        return cls(environ.pop("NOTIFY_SOCKET", None))

    def __bool__(self) -> bool:
        return bool(self._address)

    def send(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Send ``lines`` as one message. Blocks while the manager's queue is full; raises OSError.

        When it returns, the message and ``fds`` are in the manager's queue: they get there even
        where this process is killed on the next instruction.
        """
        if not self._address:
            return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendmsg(["\n".join(lines).encode()], ancillary, 0, self._address)
