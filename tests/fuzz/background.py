"""A daemon in a thread of its own, for tests that are not coroutines; and how many examples."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import uvloop
from hypothesis import HealthCheck, settings

from tests.fakes.kernel import FakeKernel
from tests.http.serving import Served

T = TypeVar("T")

#: ``make fuzz`` makes many more examples than ``make test``, and not the same ones each time.
LONGER = int(os.environ.get("KPMD_FUZZ", "1"))


def examples(number: int) -> settings:
    """So many examples, the same in each run; with KPMD_FUZZ=N N times as many, always others."""
    return settings(
        max_examples=number * LONGER,
        derandomize=LONGER == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Background:
    """The daemon over the fake kernel; at the end nothing of its connections may be left."""

    def __init__(self, **options: Any) -> None:
        """``options`` as for ``Served.start``."""
        self.kernel = FakeKernel()
        self.served: Served
        self._options = options
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks = 0

    def __enter__(self) -> Background:
        self._thread.start()
        self.served = self.run(Served.start(self.kernel, **self._options))
        self._tasks = self._count()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.check_rest()
        finally:
            self.run(self.served.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def call(self, work: Callable[[], T]) -> T:
        """Call a function in the daemon's loop."""
        future: Future[T] = Future()
        self._loop.call_soon_threadsafe(lambda: future.set_result(work()))
        return future.result(60)

    def _count(self) -> int:
        return self.call(lambda: len(asyncio.all_tasks(self._loop)))

    def check_rest(self) -> None:
        """Fail unless all connections, and the tasks that served them, come to their end."""
        deadline = time.monotonic() + 20
        while self.call(lambda: self.served.connections) or self._count() > self._tasks:
            assert time.monotonic() < deadline, self.call(
                lambda: [repr(task) for task in asyncio.all_tasks(self._loop)]
            )
            time.sleep(0.005)

    def connect(self) -> socket.socket:
        """A connection, with a time limit on all that is done with it."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(str(self.served.path))
        return sock
