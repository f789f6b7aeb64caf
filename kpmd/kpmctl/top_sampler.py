"""The thread of ``kpmctl top`` that talks to the daemon."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kpmd.kpmctl.counting import Report

#: Seconds from attaching to the first sample, where the interval is longer.
_FIRST = 0.2

#: Seconds in which to detach; what takes longer is left to the daemon, as this process ends.
_PATIENCE = 5.0


class Counting(Protocol):
    """What is sampled: a ``Counter`` that is attached."""

    def report(self, interval: float) -> Report:
        """Sample now. Raises ClientError."""


class Sampler:
    """Attaches, samples each interval, and detaches, all in one thread.

    ``attached`` is the whole of it: entered, it attaches, left, it detaches. Reports come into
    ``news``, and the error that ended it, if one did, is ``failure``; ``wake`` is called behind
    each.
    """

    def __init__(
        self, attached: Callable[[], AbstractContextManager[Counting]], interval: float
    ) -> None:
        self.news: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.failure: Exception | None = None
        self.wake: Callable[[], object] = _nobody
        self._attached = attached
        self._interval = interval
        self._sampling = False
        self._stopped = threading.Event()
        # A daemon thread: what the daemon is still at does not keep this process from its end.
        self._thread = threading.Thread(target=self.run, name="sampler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let it detach."""
        self._stopped.set()

    def wait(self) -> None:
        """Wait until it has detached; what is just being attached ends with this process."""
        if self._sampling:
            self._thread.join(_PATIENCE)

    def run(self) -> None:
        """What the thread does: sample until ``stop``, or until it fails."""
        try:
            with self._attached() as counting:
                self._sampling = True
                self._sample(counting)
        except Exception as error:
            self.failure = error
            self._wake()

    def _sample(self, counting: Counting) -> None:
        wait = min(_FIRST, self._interval)
        while not self._stopped.wait(wait):
            self.news.put(counting.report(self._interval))
            self._wake()
            wait = self._interval

    def _wake(self) -> None:
        # Who was to be woken may have ended in this moment.
        with contextlib.suppress(RuntimeError):
            self.wake()


def _nobody() -> None:
    """Nobody waits yet."""
