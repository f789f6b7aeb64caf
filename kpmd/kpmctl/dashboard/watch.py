"""Reading the daemon while somebody looks: once an interval, however many pages there are."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from kpmd.client.errors import ClientError
from kpmd.kpmctl.dashboard.feed import Feed
from kpmd.kpmctl.dashboard.reading import Daemon, Reader

#: Seconds from one reading to the next.
INTERVAL = 1.0

#: Seconds without a look after which nobody listens to events either.
_IDLE = 15.0


class Watcher:
    """What pages show, as JSON. Reads nothing while nobody looks; ``close`` it.

    ``clock`` is as ``time.monotonic``.
    """

    def __init__(self, daemon: Daemon, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turn = asyncio.Lock()
        self._due = 0.0
        self._reader = Reader(daemon)
        self._feed = Feed(daemon)
        self._last: dict[str, Any] = {}
        self._text = b""
        self._idle: asyncio.TimerHandle | None = None

    async def look(self, after: int) -> bytes:
        """What there is now, and the events behind that number.

        Where the daemon cannot be read it is what there was before, and why: ``trouble``.
        """
        self._feed.start()
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(_IDLE, self._feed.stop)
        async with self._turn:
            if not self._text or self._clock() >= self._due:
                self._text = await self._read()
                self._due = self._clock() + INTERVAL
        return b'{"sample":%b,"feed":%b}' % (self._text, _json(self._feed.after(after)))

    async def _read(self) -> bytes:
        trouble = None
        try:
            self._last = await self._reader.read(self._clock)
        except ClientError as error:
            trouble = str(error)
            self._reader.forget()
        # Times are as browsers have them, in milliseconds.
        told = {"trouble": trouble, "interval": INTERVAL * 1000, "now": time.time() * 1000}
        return _json(self._last | told)

    async def close(self) -> None:
        """Listen no more."""
        if self._idle is not None:
            self._idle.cancel()
        task = self._feed.stop()
        if task is not None:
            await asyncio.wait([task])


def _json(found: object) -> bytes:
    return json.dumps(found, separators=(",", ":")).encode()
