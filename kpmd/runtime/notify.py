"""Messages to the service manager, with file descriptors if need be (sd_notify(3))."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
from collections.abc import MutableMapping, Sequence

#: A service manager that takes longer is stuck.
_PATIENCE = 30.0


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

    def send(self, *lines: str, fds: Sequence[int] = (), wait: bool = True) -> None:
        """Send ``lines`` as one message. Blocks while the manager's queue is full; raises OSError.

        Without ``wait``, that is BlockingIOError.

        When it returns, the message and ``fds`` are in the manager's queue: they get there even
        where this process is killed on the next instruction.
        """
        if not self._address:
            return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            flags = 0 if wait else socket.MSG_DONTWAIT
            sock.sendmsg(["\n".join(lines).encode()], ancillary, flags, self._address)

    def barrier(self) -> None:
        """Wait until the manager has taken what was sent. Raises OSError, where it never does."""
        if not self._address:
            return
        ours, theirs = os.pipe()
        try:
            try:
                self.send("BARRIER=1", fds=[theirs])
            finally:
                os.close(theirs)
            poller = select.poll()
            poller.register(ours, 0)  # hung up, once the manager has closed its copy
            if not poller.poll(_PATIENCE * 1000):
                raise TimeoutError(errno.ETIMEDOUT, "the service manager does not answer")
        finally:
            os.close(ours)
