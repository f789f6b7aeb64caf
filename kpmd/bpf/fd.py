"""Who owns a file descriptor: exactly one ``OwnedFd``, and closing it twice is harmless."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

#: bpf(2) reads FD 0 as "absent", and 1 and 2 are where a stray print would go.
_LOWEST = 3


class Closed(ValueError):
    """The file descriptor is closed already."""


class LeakTracer:
    """Remembers every open ``OwnedFd`` while it is active: what the tests' leak check reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, str] = {}
        self.active = False

    def opened(self, owned: OwnedFd, what: str) -> None:
        """Note that ``owned`` holds an FD for ``what``."""
        if self.active:
            with self._lock:
                self._open[id(owned)] = what

    def closed(self, owned: OwnedFd) -> None:
        """Note that ``owned`` holds none any more."""
        if self.active:
            with self._lock:
                self._open.pop(id(owned), None)

    def held(self) -> list[str]:
        """What the FDs still open are for."""
        with self._lock:
            return sorted(self._open.values())


tracer = LeakTracer()


class OwnedFd:
    """A file descriptor with one owner.

    Takes a freshly opened FD over: moves it to 3 or above and sets close-on-exec. ``close`` may be
    called from any thread, any number of times; it waits for system calls that borrow the FD, and
    then as long as the kernel needs (50 ms and more for a kprobe-multi link on kernel 6.12).
    """

    __slots__ = ("__weakref__", "_borrowed", "_fd", "_idle", "what")

    def __init__(self, fd: int, what: str) -> None:
        if fd < _LOWEST:
            moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST)
            os.close(fd)
            fd = moved
        else:
            os.set_inheritable(fd, False)
        self._fd = fd
        self._borrowed = 0
        self._idle = threading.Condition(threading.Lock())
        self.what = what
        tracer.opened(self, what)

    def fileno(self) -> int:
        """The FD's number. Raises Closed once it is closed, so that a stale one is never used.

        Only for the thread that also decides about closing; others ``borrow`` it.
        """
        if self._fd < 0:
            raise Closed(f"the file descriptor of {self.what} is closed")
        return self._fd

    @contextmanager
    def borrow(self) -> Iterator[int]:
        """The FD's number for the length of a system call: until then no other thread closes it.

        Without this the number could be given out again, to another user's object, between its
        being read here and its use in the kernel.
        """
        with self._idle:
            fd = self.fileno()
            self._borrowed += 1
        try:
            yield fd
        finally:
            with self._idle:
                self._borrowed -= 1
                if not self._borrowed:
                    self._idle.notify_all()

    @property
    def closed(self) -> bool:
        """Whether it was closed or handed over."""
        return self._fd < 0

    def _take(self) -> int:
        with self._idle:
            # -1 first: from now on nobody can borrow it.
            fd, self._fd = self._fd, -1
            while self._borrowed:
                self._idle.wait()
        tracer.closed(self)
        return fd

    def detach(self) -> int:
        """Hand the bare FD over to the caller, who closes it from now on."""
        self.fileno()
        return self._take()

    def close(self) -> None:
        """Close the FD; does nothing when it is closed already."""
        fd = self._take()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A last resort; the tracer still lists it, so that the tests see the leak.
        if getattr(self, "_fd", -1) >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __repr__(self) -> str:
        return f"<OwnedFd {self._fd} {self.what}>"
