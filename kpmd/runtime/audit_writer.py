"""Writes entries of the audit trail to one destination, in a thread of its own.

A destination that is slow, full or gone holds up neither the event loop nor the other destination:
its entries wait, as many as there is room for, and what comes on top is lost, counted and told.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kpmd.log import Log
from kpmd.runtime.audit_record import Entry, journal_fields, line
from kpmd.runtime.journald import Journald

log = Log("kpmd.audit")

#: Entries that wait at the most, and how many of refusals: who is refused all the time cannot push
#: out what others have done.
ROOM = 1024
ROOM_FOR_REFUSED = ROOM // 2

#: Seconds until what failed is tried again.
RETRY = 1.0

#: Seconds between two warnings of one destination.
WARN_EVERY = 60.0


class Destination(Protocol):
    """Where entries go. Used by one thread; all its methods may block, and raise OSError.

    ``name`` is for people. ``is_log``: what is wrong with it cannot be told in the log.
    """

    name: str
    is_log: bool

    def write(self, entry: Entry) -> None:
        """Write the whole entry, or raise OSError."""

    def reopen(self) -> None:
        """Let go of what is open: the next entry opens it anew, by its name."""

    def close(self) -> None:
        """Let go for good."""


class ToJournal:
    """The journal, with fields."""

    name = "the journal"
    is_log = False

    def __init__(self, journald: Journald) -> None:
        self._journald = journald

    def write(self, entry: Entry) -> None:
        """Send it; waits a second for room in journald's queue."""
        self._journald.send(journal_fields(entry))

    def reopen(self) -> None:
        """Nothing to do: each entry goes to the socket that is there then."""

    def close(self) -> None:
        """Close our socket."""
        self._journald.close()


class Lines:
    """Lines of JSON, each by one write(2); to standard error where ``path`` is None."""

    def __init__(self, path: Path | None) -> None:
        self.name = "standard error" if path is None else str(path)
        self.is_log = path is None
        self._path = path
        self._fd: int | None = None
        self._torn = False

    def write(self, entry: Entry) -> None:
        """Append a line. One that gets there in part is ended by the next, and raises OSError."""
        if self._path is not None and self._fd is None:
            self._fd = _open(self._path)
            self._torn = _is_torn(self._fd)
        data = b"\n" * self._torn + line(entry)
        written = os.write(_STDERR if self._fd is None else self._fd, data)
        if written:
            self._torn = data[written - 1] != ord("\n")
        if written < len(data):
            raise OSError(errno.ENOSPC, "There was room for a part of a record only")

    def reopen(self) -> None:
        """Close the file; not standard error."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close the file; not standard error."""
        self.reopen()


_STDERR = 2


def _open(path: Path) -> int:
    # The mode of a file that is there already is its owner's matter.
    flags = os.O_RDWR | os.O_APPEND | os.O_NOCTTY
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(fd, 0o640)  # whatever the umask
        return fd


def _is_torn(fd: int) -> bool:
    """Whether a file ends within a line: a daemon may have been killed in the middle of it."""
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


class Writer:
    """The thread of a destination, and what waits for it. ``note`` makes the entry of a loss.

    ``lost``: entries that got nowhere. ``failing``: what is wrong now, or None.
    """

    def __init__(self, destination: Destination, note: Callable[[int], Entry]) -> None:
        self.lost = 0
        self.failing: str | None = None
        self._destination = destination
        self._note = note
        self._waiting: deque[Entry] = deque()
        self._untold = 0
        self._reopening = False
        self._closing = False
        self._warned_at = -WARN_EVERY
        self._changed = threading.Condition()
        # Not waited for at the exit of the process: a write to a disk that hangs may never return.
        self._thread = threading.Thread(
            target=self._run, name=f"kpmd-audit {destination.name}", daemon=True
        )
        self._thread.start()

    def put(self, entry: Entry, *, refused: bool) -> None:
        """Have it written. Never waits."""
        with self._changed:
            if not self._closing and len(self._waiting) < (ROOM_FOR_REFUSED if refused else ROOM):
                self._tell_loss()
                self._waiting.append(entry)
                self._changed.notify()
                return
            self._lose(entry)
        if self.failing is None:
            self._warn("they come faster than they can be written")

    def reopen(self) -> None:
        """Use what has the destination's name now."""
        with self._changed:
            self._reopening = True
            self._changed.notify()

    def close(self, deadline: float) -> None:
        """Write what waits, until that time of ``time.monotonic``. Blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._lose(*self._waiting)
            self._waiting.clear()
        if self._untold:
            self._warned_at = -WARN_EVERY
            self._warn(self.failing or "there was no time left to write them")

    def _lose(self, *entries: Entry) -> None:
        for entry in entries:
            if entry["audit"] == "lost":  # what it would have told is still to be told
                self._untold += entry["what"]["records"]
            else:
                self.lost += 1
                self._untold += 1

    def _tell_loss(self) -> None:
        if self._untold:
            self._waiting.append(self._note(self._untold))
            self._untold = 0

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self._destination.write(entry)
            except OSError as error:
                self._failed(entry, error)
            except Exception as error:
                log.error("bug", error)
                self._done(entry, lost=True)
            else:
                self._done(entry, lost=False)
        self._let_go(self._destination.close)

    def _next(self) -> Entry | None:
        """The entry to write; it stays the first until it is written. None: that was all."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._reopening or self._closing)
                reopening, self._reopening = self._reopening, False
                if not reopening:
                    return self._waiting[0] if self._waiting else None
            self._let_go(self._destination.reopen)

    def _let_go(self, close: Callable[[], None]) -> None:
        try:
            close()
        except OSError as error:
            self._warn(f"{self._destination.name}: {error.strerror}")

    def _done(self, entry: Entry, *, lost: bool) -> None:
        with self._changed:
            if not self._waiting or self._waiting[0] is not entry:
                return  # given up by ``close``
            self._waiting.popleft()
            if lost:
                self._lose(entry)
                return
            self.failing = None
            if not self._waiting:
                self._tell_loss()

    def _failed(self, entry: Entry, error: OSError) -> None:
        """Try again in a while; but not at the end, nor an entry that can never be written."""
        reason = f"{self._destination.name}: {error.strerror}"
        first, self.failing = self.failing is None, reason
        if first:
            self._warn(reason)
        if error.errno == errno.EMSGSIZE:
            self._done(entry, lost=True)
            return
        with self._changed:
            if self._closing:
                self._lose(*self._waiting)
                self._waiting.clear()
            else:
                self._changed.wait_for(lambda: self._reopening or self._closing, RETRY)

    def _warn(self, reason: str) -> None:
        now = time.monotonic()
        if not self._destination.is_log and now - self._warned_at >= WARN_EVERY:
            self._warned_at = now
            log.warning("audit records cannot be written", reason=reason, lost=self.lost)
