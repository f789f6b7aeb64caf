"""A machine on which daemons come and go: what the service manager keeps, the next one finds."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

from tests.fakes.kernel import FakeKernel
from tests.fakes.systemd import Manager, eventfd_number
from tests.http.serving import Client, Served
from tests.http.streaming import listening


class Clock:
    """CLOCK_MONOTONIC, which goes on when it is told to and not before."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


class House:
    """A machine: one kernel, one service manager, and daemons one after the other."""

    def __init__(self, kernel: FakeKernel, manager: Manager, stack: AsyncExitStack) -> None:
        self.kernel = kernel
        self.manager = manager
        self.now = time.monotonic()
        self._stack = stack
        self.daemon: Served = None  # type: ignore[assignment]
        self.client: Client = None  # type: ignore[assignment]

    async def start(self, **options: Any) -> None:
        """Start a daemon, and connect to it."""
        self.daemon = await Served.start(
            self.kernel, manager=self.manager, clock=lambda: self.now, **options
        )
        self._stack.push_async_callback(self.daemon.stop)
        self.client = await self._stack.enter_async_context(Client(self.daemon.path))

    async def end(self, how: str = "stop") -> None:
        """Have the daemon end; what it had open the kernel closes."""
        if how == "stop":
            await self.daemon.stop(keep=True)
        else:
            await self.daemon.kill()

    async def again(self, how: str = "stop", **options: Any) -> None:
        """End the daemon and start the next one."""
        before = self.references()
        await self.end(how)
        between = self.references()
        # Nothing that is there in the end was ever gone.
        await self.start(**options)
        assert set(self.references()) <= set(between) <= set(before)

    def references(self) -> Counter[int]:
        """What keeps the kernel's objects: how many FDs of each, here and at the manager's."""
        found = self.manager.references()
        for name in os.listdir("/proc/self/fd"):
            number = eventfd_number(int(name))
            if number is not None:
                found[number] += 1
        return Counter(
            {each: count for each, count in found.items() if each in self.kernel.objects}
        )

    async def ids(self, path: str) -> list[str]:
        return sorted(each["id"] for each in (await self.client.get(path))["items"])

    async def everything(self) -> dict[str, Any]:
        """All that the API shows of what is held."""
        found: dict[str, Any] = {}
        for path in ("/programs", "/links", "/maps", "/leases"):
            for each in (await self.client.get(path))["items"]:
                found[each["id"]] = each
                if path == "/links":
                    for more in ("targets", "skipped"):
                        of = f"{path}/{each['id']}/{more}"
                        found[of] = await self.client.get(of)
                if path == "/maps":
                    found[each["id"] + "!"] = await self.client.get(f"/maps/{each['id']}/entries")
                    each["programs"].sort()
        return found

    async def history(self) -> list[tuple[str, str, str]]:
        """What this daemon has told since it began: (what or id, event, reason)."""
        boot = self.daemon.state.journal._boot
        lease = (await self.client.post("/leases", {"ttl": 1}))["id"]
        async with listening(self.daemon.path, f"?since={boot}-0") as stream:
            events = await stream.until("created", lease)
        await self.client.delete(f"/leases/{lease}")
        return [(each["id"], each["event"], each.get("reason", "")) for each in events]


async def a_lease(client: Any, ttl: float = 60) -> str:
    """Make a lease: its id."""
    id_: str = (await client.post("/leases", {"ttl": ttl}))["id"]
    return id_


def on(lease: str) -> dict[str, str]:
    """The lifetime of what is bound to a lease."""
    return {"kind": "lease", "lease": lease}
