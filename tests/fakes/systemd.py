"""A service manager as far as sd_notify(3) goes: one notify socket, and an FD store behind it."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What a message may carry; systemd takes as many.
_ROOM = socket.CMSG_SPACE(768 * array.array("i").itemsize)


@dataclass
class Entry:
    """A file descriptor in the store."""

    name: str
    fd: int
    poll: bool

    @property
    def hung_up(self) -> bool:
        """Whether its other end is gone, or it has an error."""
        poller = select.poll()
        poller.register(self.fd, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll(0))


def eventfd_number(fd: int) -> int | None:
    """Which object of the fake kernel an FD is of; None where it is of none."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            for line in file:
                if line.startswith("eventfd-count:"):
                    return int(line.split()[1], 16)
    except OSError:
        pass  # closed meanwhile, by another thread
    return None


class Manager:
    """systemd's side. As its: bounded, nobody is told when it drops or refuses an FD.

    It reads its socket whenever the event loop has time, and whenever it is asked something; but
    while it is ``busy`` it reads nothing, as the real one may be for a while.
    """

    def __init__(self, folder: Path, capacity: int = 512) -> None:
        self.capacity = capacity
        self.address = str(folder / "notify")
        self.store: list[Entry] = []
        #: Every message: its lines, and how many FDs came with it.
        self.told: list[tuple[list[str], int]] = []
        self.busy = False
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(self.address)
        self._reading: asyncio.AbstractEventLoop | None = None

    def listen(self) -> None:
        """Read in the running loop from now on, so that no sender waits for long."""
        self._reading = asyncio.get_running_loop()
        self._reading.add_reader(self._sock.fileno(), self.pump)

    def pump(self) -> None:
        """Take what has been sent, and drop what is hung up."""
        if self.busy:
            return
        while self._take():
            pass
        for entry in [each for each in self.store if each.poll and each.hung_up]:
            self._drop(entry)

    def _take(self) -> bool:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(1 << 16, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        lines = data.decode().split("\n")
        self.told.append((lines, len(fds)))
        fields = dict(line.split("=", 1) for line in lines if "=" in line)
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTOREREMOVE") == "1":
            for entry in [each for each in self.store if each.name == name]:
                self._drop(entry)
        elif fields.get("FDSTORE") == "1":
            for fd in fds:
                if len(self.store) < self.capacity:
                    self.store.append(Entry(name, fd, fields.get("FDPOLL") != "0"))
                else:
                    os.close(fd)
            return True
        for fd in fds:
            os.close(fd)
        return True

    def _drop(self, entry: Entry) -> None:
        self.store.remove(entry)
        os.close(entry.fd)

    def keep(self, name: str, fd: int) -> None:
        """Put an FD in, which the caller goes on owning, as somebody else may have."""
        self.store.append(Entry(name, os.dup(fd), poll=False))

    @property
    def names(self) -> list[str]:
        """The names of what is in the store, each once, in order."""
        self.pump()
        return sorted({each.name for each in self.store})

    def entries(self, name: str) -> list[int]:
        """The FDs of that name."""
        self.pump()
        return [each.fd for each in self.store if each.name == name]

    def forget(self, entry_fd: int) -> None:
        """Lose one FD, as where the store was full in the middle of a message."""
        self._drop(next(each for each in self.store if each.fd == entry_fd))

    def hide(self) -> None:
        """Be nowhere to be found, until ``show``."""
        os.rename(self.address, self.address + ".away")

    def show(self) -> None:
        """Be there again."""
        os.rename(self.address + ".away", self.address)

    def pass_on(self) -> list[tuple[str, int]]:
        """What the next process is started with: its own FDs, in an order nobody can rely on."""
        self.pump()
        return [(each.name, os.dup(each.fd)) for each in reversed(self.store)]

    def messages(self, name: str) -> Iterator[list[int]]:
        """What waits in the queues of the sockets of that name: copies, closed behind each."""
        for fd in self.entries(name):
            with socket.socket(fileno=os.dup(fd)) as sock:
                yield from _peeked(sock)

    def references(self) -> Counter[int]:
        """Objects of the fake kernel that the store keeps open, and how many FDs of each.

        Nothing is read for it: what a manager who is busy has in its hands counts as well.
        """
        found: Counter[int] = Counter()
        for entry in self.store:
            if (number := eventfd_number(entry.fd)) is not None:
                found[number] += 1
                continue
            if not stat.S_ISSOCK(os.fstat(entry.fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(entry.fd)) as sock:
                for fds in _peeked(sock):
                    found.update(number for fd in fds if (number := eventfd_number(fd)) is not None)
        return found

    def close(self) -> None:
        """As where the unit is stopped for good: everything in the store is closed."""
        self.busy = False
        if self._reading is not None and not self._reading.is_closed():
            self._reading.remove_reader(self._sock.fileno())
        self.pump()
        for entry in list(self.store):
            self._drop(entry)
        self._sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address)


def _peeked(sock: socket.socket) -> Iterator[list[int]]:
    """The FDs of the message in a queue, without taking it out; they are closed behind the use."""
    fds = array.array("i")
    try:
        _, ancillary, flags, _ = sock.recvmsg(
            1 << 10, _ROOM, socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except (BlockingIOError, OSError):
        return
    for _, _, content in ancillary:
        fds.frombytes(content)
    try:
        assert not flags & socket.MSG_CTRUNC
        if fds:
            yield list(fds)
    finally:
        for fd in fds:
            os.close(fd)
