"""Maps that clients may hold after they have ended here: looked after, however they are closed."""

from __future__ import annotations

import os

from kpmd.bpf.fd import OwnedFd
from kpmd.core.registry import Registry
from kpmd.runtime.executor import Executor
from kpmd.runtime.lent import Lent
from tests.http.serving import until


async def test_one_that_is_closed_twice_is_looked_after_once() -> None:
    """As every handle may be."""
    registry, executor = Registry(), Executor()
    lent = Lent(registry, executor)
    registry.accounts.add(7, "map_bytes", 10)
    registry.lent["map-1"] = 7, 10
    own = lent.last("map-1", OwnedFd(os.eventfd(0), "map m"))
    own.close()
    own.close()
    await until(lambda: registry.accounts.used(7)["map_bytes"] == 0)
    await lent.close()
    await executor.drain()
