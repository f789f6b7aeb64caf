"""The service manager's FD store: what is in it outlives this process.

A record's file descriptors and its state are kept as a *bundle*: one message in the queue of a
socket, which is all that the manager gets to hold. The manager's own copy of a link would go on
keeping it attached after we closed ours, until the manager found the time (since systemd 254 it
closes in a process of its own, and tells nobody): nobody could say when the link is detached. Out
of a queue that both hold, we take it ourselves.
"""

from __future__ import annotations

import array
import errno
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kpmd.bpf.fd import Closed, OwnedFd
from kpmd.log import Log
from kpmd.runtime.notify import Notifier

log = Log("kpmd.fdstore")

#: FDs in one message at the most (SCM_MAX_FD in the kernel's include/net/scm.h is 253).
_MOST_FDS = 250

#: Where the state's changing part ends: within one page, so that no kill can leave half of it.
_HEAD = 256

#: Where in its bundle a message's FDs begin, and how many the bundle has.
_PLACE = re.compile(rb"(\d{1,6}) (\d{1,6})\Z")


class Full(Exception):
    """The store holds as much as the manager takes: so many."""


def capacity(environ: MutableMapping[str, str]) -> int:
    """How many file descriptors the manager stores for this service; 0 where it stores none.

    systemd tells it from version 254 on (``FDSTORE``); ``KPMD_FDSTORE`` is the unit file's own
    word, for older ones.
    """
    told = environ.pop("FDSTORE", ""), environ.pop("KPMD_FDSTORE", "")
    return next((int(each) for each in told if each.isdecimal()), 0)


class FdStore:
    """The manager's store, as far as this process knows it. Its methods may be called anywhere."""

    def __init__(self, notifier: Notifier, capacity: int) -> None:
        self._notifier = notifier
        self.capacity = capacity if notifier else 0
        self._used = 0
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.capacity > 0

    @property
    def used(self) -> int:
        """How many file descriptors are in the store."""
        return self._used

    def add(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Have the manager hold ``sockets`` under ``name``. Raises Full, OSError."""
        self._reserve(len(sockets))
        try:
            # FDPOLL=0: the manager would drop what is hung up, as these sockets are.
            self._notifier.send(
                "FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[each.fileno() for each in sockets]
            )
        except BaseException:
            self._reserve(-len(sockets))
            raise

    def _reserve(self, count: int) -> None:
        with self._lock:
            if count > 0 and self._used + count > self.capacity:
                raise Full(self.capacity)
            self._used += count

    def remove(self, name: str, count: int) -> None:
        """Have the manager close the ``count`` sockets of that name. Never fails."""
        try:
            self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}")
        except OSError as error:
            # What is left behind is an empty socket; the next start removes it.
            log.warning("the FD store keeps an empty entry", name=name, error=str(error))
            return
        self._reserve(-count)

    def adopt(self, passed: Iterable[tuple[str, int]]) -> list[Adopted]:
        """What an earlier process left here: takes the FDs over. Never fails."""
        by_name: dict[str, list[int]] = {}
        for name, fd in passed:
            by_name.setdefault(name, []).append(fd)
        found = []
        for name, fds in by_name.items():
            self._used += len(fds)
            found.append(_open(self, name, fds))
        return found


class Bundle:
    """A record's file descriptors and state in the store; thread-safe."""

    def __init__(
        self,
        store: FdStore,
        name: str,
        sockets: Sequence[socket.socket] = (),
        state: OwnedFd | None = None,
        places: int = 0,
    ) -> None:
        """``sockets``, ``state``, and ``places`` taken: those of one that is stored already."""
        self.name = name
        self._store = store
        self._sockets = list(sockets)
        self._state = state
        self._places = places
        self._dropped = False
        self._lock = threading.Lock()

    def put(self, head: Mapping[str, Any], body: bytes, fds: Sequence[OwnedFd]) -> None:
        """Store it: ``head`` can be changed later. Does nothing when it is stored, or dropped.

        Raises Full, and OSError where the kernel or the manager refuses.
        """
        with self._lock:
            if self._dropped or self._places or not self._store:
                return
            sockets: list[socket.socket] = []
            state = OwnedFd(os.memfd_create("kpmd-state", os.MFD_CLOEXEC), f"state of {self.name}")
            try:
                _write(state, _padded(head) + body)
                everything = [state, *fds]
                for start in range(0, len(everything), _MOST_FDS):
                    part = everything[start : start + _MOST_FDS]
                    sockets.append(_with_message(start, len(everything), part))
                self._store.add(self.name, sockets)
            except BaseException as error:
                for each in sockets:
                    each.close()
                state.close()
                if isinstance(error, Closed):
                    return  # it is being closed right now
                raise
            self._sockets, self._state, self._places = sockets, state, len(sockets)

    def update(self, head: Callable[[], Mapping[str, Any]]) -> None:
        """Change the state's head, in one write. Does nothing where there is no state."""
        with self._lock:
            if self._state is not None and not self._dropped:
                os.pwrite(self._state.fileno(), _padded(head()), 0)

    def drop(self) -> None:
        """Take everything out of the store. May be called twice; never fails."""
        with self._lock:
            if self._dropped:
                return
            self._dropped = True
            if self._state is not None:
                self._state.close()
            for each in self._sockets:
                _drain(each)
            if self._places:
                self._store.remove(self.name, self._places)
            for each in self._sockets:
                each.close()


@dataclass
class Adopted:
    """A bundle of an earlier process. ``head`` is None where the state cannot be read.

    ``whole``: as many file descriptors are here as it was to have. ``legible``: it could be looked
    into at all; the process may have too few file descriptors for that. Then nothing is said of it.
    """

    bundle: Bundle
    head: dict[str, Any] | None
    body: bytes
    fds: list[OwnedFd]
    whole: bool = True
    legible: bool = True

    @property
    def name(self) -> str:
        """The name under which it is stored."""
        return self.bundle.name

    @property
    def empty(self) -> bool:
        """It was taken out, and its removal did not get through."""
        return self.legible and self.head is None and not self.fds

    def close(self) -> None:
        """Drop it and close everything."""
        self.bundle.drop()
        for each in self.fds:
            each.close()


def _padded(head: Mapping[str, Any]) -> bytes:
    text = json.dumps(head).encode()
    if len(text) >= _HEAD:
        raise ValueError("the head of a state is too long")
    return text.ljust(_HEAD - 1) + b"\n"


def _write(fd: OwnedFd, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd.fileno(), view) :]


def _with_message(start: int, total: int, fds: Sequence[OwnedFd]) -> socket.socket:
    """A socket with one message in its queue: where in the bundle it begins, and the FDs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs, ExitStack() as borrowed:
            numbers = [borrowed.enter_context(fd.borrow()) for fd in fds]
            socket.send_fds(theirs, [f"{start} {total}".encode()], numbers)
    except BaseException:
        ours.close()
        raise
    return ours


def _receive(sock: socket.socket, flags: int) -> tuple[bytes, list[int], bool]:
    """The next message, its FDs, and whether there was room for all of them."""
    fds = array.array("i")
    room = socket.CMSG_SPACE((_MOST_FDS + 1) * fds.itemsize)
    data, ancillary, told, _ = sock.recvmsg(
        64, room, flags | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds), not told & socket.MSG_CTRUNC


def _drain(sock: socket.socket) -> None:
    try:
        while True:
            # What there is no room for, the kernel closes: it is taken out all the same.
            data, fds, _ = _receive(sock, 0)
            for fd in fds:
                os.close(fd)
            if not data:
                return
    except BlockingIOError:
        return
    except OSError as error:
        # Out of file descriptors, say. Shutting it down does not empty it: the manager will.
        log.warning("the FD store's entry is left to the manager", error=str(error))


def _open(store: FdStore, name: str, passed: Sequence[int]) -> Adopted:
    sockets: list[socket.socket] = []
    bare: list[OwnedFd] = []
    parts: dict[int, list[OwnedFd]] = {}
    total = 0
    legible = True
    for fd in passed:
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            if error.errno != errno.ENOTSOCK:
                log.error("the FD store's entry cannot be opened", error, name=name)
            bare.append(OwnedFd(fd, f"stored {name}"))
            continue
        sock.set_inheritable(False)
        sockets.append(sock)
        try:
            data, fds, all_of_it = _receive(sock, socket.MSG_PEEK)
        except BlockingIOError:
            continue  # there is nothing in it
        except OSError as error:
            log.error("the FD store's entry cannot be read", error, name=name)
            legible = False
            continue
        legible &= all_of_it
        owned = [OwnedFd(each, f"stored {name}") for each in fds]
        found = _PLACE.match(data)
        if found:
            start, total = int(found[1]), int(found[2])
            parts[start] = owned
        else:
            # Nothing at all: it was taken out. Anything else: nobody here wrote it.
            bare += owned
    fds_ = [fd for _, part in sorted(parts.items()) for fd in part]
    bundle = Bundle(store, name, sockets, None, len(passed))
    if not legible:
        for each in (*fds_, *bare):
            each.close()
        return Adopted(bundle, None, b"", [], legible=False)
    if len(fds_) < total:
        return Adopted(bundle, None, b"", fds_, whole=False)
    state = None if bare or not fds_ else _read(name, fds_[0])
    if state is None:
        return Adopted(bundle, None, b"", fds_ + bare)
    return Adopted(Bundle(store, name, sockets, fds_[0], len(passed)), *state, fds_[1:])


def _read(name: str, state: OwnedFd) -> tuple[dict[str, Any], bytes] | None:
    """Head and body of a state; None where it cannot be read."""
    try:
        raw = os.pread(state.fileno(), os.fstat(state.fileno()).st_size, 0)
        head = json.loads(raw[:_HEAD])
        if not isinstance(head, dict):
            raise ValueError("its head is no object")
    except (OSError, ValueError) as error:
        log.error("the state cannot be read", error, name=name)
        return None
    return head, raw[_HEAD:]
