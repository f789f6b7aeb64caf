"""The last events, for all pages that look."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from kpmd.client.errors import ApiError, ClientError
from kpmd.kpmctl.dashboard.reading import Daemon

#: Events that are kept.
EVENTS = 200

#: Seconds until events are asked for again, where they were refused or cut off.
_AGAIN = 1.0


class Feed:
    """The last events, numbered from 1 on; listens from ``start`` to ``stop``."""

    def __init__(self, daemon: Daemon, again: float = _AGAIN) -> None:
        self._daemon = daemon
        self._wait = again
        self._rows: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._count = 0
        self._seq: str | None = None
        self._trouble: str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen, from behind the last event on if there was one."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())

    def stop(self) -> asyncio.Task[None] | None:
        """Listen no more. Returns what is ending."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        return task

    def after(self, number: int) -> dict[str, Any]:
        """The events behind that number; ``trouble`` is why there are no more of them."""
        rows = [each for each in self._rows if each["number"] > number]
        return {"rows": rows, "last": self._count, "most": EVENTS, "trouble": self._trouble}

    def _add(self, row: dict[str, Any]) -> None:
        self._count += 1
        self._rows.append({**row, "number": self._count})

    def _gap(self, why: str) -> None:
        self._add({"gap": why, "time": time.time() * 1000})

    async def _listen(self) -> None:
        while True:
            try:
                async with self._daemon.events(self._seq, on_gap=self._gap) as events:
                    self._trouble = None
                    async for event in events:
                        self._seq = event["seq"]
                        self._add(dict(event))
            except ClientError as error:
                self._trouble = str(error)
                if isinstance(error, ApiError) and error.kind == "gone":
                    self._seq = None
                    self._gap(str(error))
            await asyncio.sleep(self._wait)
