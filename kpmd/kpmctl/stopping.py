"""Ctrl-C, SIGTERM and the end of a time as requests to end in order."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal came during something that may be left half done."""


class Stop:
    """A context manager in which SIGINT and SIGTERM are kept in mind, and ``requested`` tells.

    They break off what stands in a block of ``breakable`` and nothing else: no table is left half
    drawn. The second signal ends the process as if nobody had handled it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signalled = False
        self._breakable = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for number in _SIGNALS:
            # What is ignored, as for a shell's background job, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True
        self._request()

    def _request(self) -> None:
        self.requested = True
        if self._breakable:
            raise Stopped

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """A block that a signal may leave by raising Stopped, at once if one has come already."""
        self._breakable = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._breakable = False

    @contextlib.contextmanager
    def after(self, seconds: float | None) -> Iterator[None]:
        """A block in which the end is requested ``seconds`` from now, too; None: not by time."""
        if seconds is None:
            yield
            return
        before = signal.signal(signal.SIGALRM, lambda number, frame: self._request())
        # 0 would be no alarm at all.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def wait(self, seconds: float) -> None:
        """Sleep. Raises Stopped."""
        with self.breakable():
            time.sleep(max(seconds, 0))
