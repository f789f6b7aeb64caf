"""Lets leases end when their time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kpmd.core.changes import Ending
from kpmd.core.registry import Registry


class LeaseTimer:
    """One timer, for the lease that ends next."""

    def __init__(
        self,
        registry: Registry,
        clock: Callable[[], float],
        on_end: Callable[[Ending], None],
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        self._at: float | None = None

    def arm(self) -> None:
        """To be called whenever a lease was made or renewed: the next end may be another one."""
        at = self._registry.leases.next_deadline()
        if at == self._at:
            return
        self.close()
        if at is not None:
            self._at = at
            wait = max(0.0, at - self._clock())
            self._timer = asyncio.get_running_loop().call_later(wait, self._due)

    def _due(self) -> None:
        self._at = self._timer = None
        self._on_end(self._registry.expire(self._clock()))
        self.arm()

    def close(self) -> None:
        """End no more leases."""
        if self._timer is not None:
            self._timer.cancel()
        self._at = self._timer = None
