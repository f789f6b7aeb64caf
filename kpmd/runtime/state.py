"""What the daemon holds: the registry's records and, beside them, the handles of the kernel."""

from __future__ import annotations

import pwd
import time
from collections.abc import Callable

from kpmd.bpf.objects import MapDetails
from kpmd.core.deny import DenyList
from kpmd.core.model import Client
from kpmd.core.registry import Ending, Registry
from kpmd.core.specs import MAX_TARGETS
from kpmd.errors import ShuttingDown
from kpmd.log import Log
from kpmd.runtime.clients import Clients
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.features import Features
from kpmd.runtime.kernel import Handle, Kernel
from kpmd.runtime.symbols import Symbols

log = Log("kpmd.state")


def user_name(uid: int) -> str | None:
    """The user's name, or None. May block in NSS: for the pool only."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


class State:
    """Registry and handles, and the only code that lets a handle go."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        deny: DenyList | None = None,
        max_targets: int = MAX_TARGETS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.kernel = kernel
        self.max_targets = max_targets
        self.now = now
        self.executor = Executor()
        self.registry = Registry()
        self.clients = Clients(self.registry, self.close_later)
        self.features = Features(kernel, self.executor)
        self.symbols = Symbols(kernel, deny or DenyList())
        #: What the kernel told of each map when it was made.
        self.map_details: dict[str, MapDetails] = {}
        self._handles: dict[str, Handle] = {}
        self._user_names: dict[int, str | None] = {}
        self.stopping = False

    def check_open(self) -> None:
        """Raise ShuttingDown once the daemon stops: nothing new is made then."""
        if self.stopping:
            raise ShuttingDown("kpmd is stopping; try again when it has been started anew")

    def keep(self, id_: str, handle: Handle) -> None:
        """Hold a handle under its record's id."""
        self._handles[id_] = handle

    def handle(self, id_: str) -> Handle:
        """The handle of a record that is on the registry's shelves."""
        return self._handles[id_]

    def _take(self, ending: Ending) -> Callable[[], None] | None:
        """The closing of what has ended, for the pool; None when there is nothing to close."""
        closing = [
            (what, record, self._handles.pop(record.id))
            for what, records in (
                ("link", ending.links),
                ("program", ending.programs),
                ("map", ending.maps),
            )
            for record in records
        ]
        for each in ending.maps:
            del self.map_details[each.id]

        def close() -> None:
            for what, record, handle in closing:
                try:
                    handle.close()
                except OSError as error:
                    # The kernel has let go of it all the same: close(2) frees the FD first.
                    log.error("closing failed", error, what=what, id=record.id)
                log.info("ended", what=what, id=record.id, uid=record.uid, reason=ending.reason)

        return close if closing else None

    async def close_now(self, ending: Ending) -> None:
        """Close what has ended; returns when the kernel has let go of it."""
        if close := self._take(ending):
            await self.executor.run(close, lane=Lane.CLOSE)

    def close_later(self, ending: Ending) -> None:
        """Close what has ended, behind other closing, with nobody waiting for it."""
        if close := self._take(ending):
            self.executor.close_later(close)

    async def owner_name(self, client: Client) -> str | None:
        """The name of the client's user; looked up once for each."""
        if client.uid not in self._user_names:
            self._user_names[client.uid] = await self.executor.run(user_name, client.uid)
        return self._user_names[client.uid]

    async def close(self) -> None:
        """Detach and close everything, then end the pools and the kernel's helpers."""
        self.stopping = True
        await self.close_now(self.registry.end_all())
        self.clients.close()
        await self.executor.drain()
        self.kernel.close()
