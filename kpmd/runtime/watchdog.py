"""Signs of life for the service manager, which starts a daemon anew whose event loop hangs."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping

from kpmd.runtime.notify import Notifier


def watchdog_seconds(environ: MutableMapping[str, str], pid: int) -> float | None:
    """How long the manager waits for a sign of life; None where it does not.

    Takes the variables away. As sd_watchdog_enabled(3) reads them.
    """
    interval, owner = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", str(pid))
    if owner != str(pid) or not interval.isdecimal() or int(interval) == 0:
        return None
    return int(interval) / 1e6


async def keep_alive(notifier: Notifier, seconds: float) -> None:
    """Tell the manager twice in ``seconds`` that the event loop turns. Until cancelled."""
    while True:
        pause = seconds / 2
        try:
            notifier.send("WATCHDOG=1", wait=False)
        except OSError:
            # Its queue is full: it is busy, and does not look at its clock either.
            pause = seconds / 20
        await asyncio.sleep(pause)
