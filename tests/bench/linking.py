"""Links made and closed by system calls alone, and another client that does so meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

from kpmd.bpf import objects
from kpmd.bpf.abi import AttachType
from kpmd.bpf.fd import OwnedFd

#: mov r0, 0; exit
_RETURN_0 = bytes.fromhex("b7000000000000009500000000000000")

#: How many links are closed, of how many functions each.
LINKS, EACH = 48, 10

#: Seconds between two attaches of the other client, at random: not in step with the closes.
_PACE = (0.05, 0.15)


class Maker:
    """Makes links of functions that no other link of the round has."""

    def __init__(self, addresses: Sequence[int]) -> None:
        self._addresses = addresses
        self._at = 0
        self._lock = threading.Lock()
        self.program, _ = objects.program_load(
            _RETURN_0, "zero", "Apache-2.0", AttachType.KPROBE_MULTI
        )

    def make(self, count: int) -> OwnedFd:
        with self._lock:
            if self._at + count > len(self._addresses):
                self._at = 0
            part = self._addresses[self._at : self._at + count]
            self._at += count
        return objects.link_create(self.program, AttachType.KPROBE_MULTI, addresses=part)

    def close(self) -> None:
        self.program.close()


def timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Other:
    """Another client, a thread of the same process: attaches to ten functions now and then.

    ``detaches``: and closes what it has made at once, as a client that waits for its DELETE.
    """

    def __init__(self, maker: Maker, *, detaches: bool = False) -> None:
        self._maker = maker
        self._detaches = detaches
        self._links: list[OwnedFd] = []
        self._stop = threading.Event()
        self.attaches: list[float] = []
        self.closes: list[float] = []
        self._idle = threading.Condition()
        self._attaching = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        pace = random.Random(2)  # noqa: S311
        while not self._stop.wait(pace.uniform(*_PACE)):
            with self._idle:
                self._attaching = True
            begun = time.perf_counter()
            link = self._maker.make(EACH)
            self.attaches.append(time.perf_counter() - begun)
            with self._idle:
                self._attaching = False
                self._idle.notify_all()
            if self._detaches:
                self.closes.append(timed(link.close))
            else:
                self._links.append(link)

    def wait_until_attached(self) -> None:
        """Return when no attach is under way."""
        with self._idle:
            self._idle.wait_for(lambda: not self._attaching)

    def __enter__(self) -> Other:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def close(self) -> None:
        for link in self._links:
            link.close()
