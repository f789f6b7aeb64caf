"""What the daemon holds: the registry's records and, beside them, the handles of the kernel."""

from __future__ import annotations

import pwd
import time
from collections.abc import Callable
from dataclasses import dataclass

from kpmd.bpf.objects import MapDetails
from kpmd.bpf.progress import Progress
from kpmd.core.changes import Ending, Event
from kpmd.core.deny import DenyList
from kpmd.core.model import Client, Link, Map, Program
from kpmd.core.policy import Policy
from kpmd.core.registry import Registry
from kpmd.core.specs import MAX_TARGETS
from kpmd.errors import ShuttingDown
from kpmd.runtime.audit import Audit
from kpmd.runtime.carrier import Carrier, owned_fds
from kpmd.runtime.clients import Clients
from kpmd.runtime.closing import Closing
from kpmd.runtime.executor import Executor
from kpmd.runtime.fdstore import Bundle, FdStore
from kpmd.runtime.features import Features
from kpmd.runtime.journal import Journal
from kpmd.runtime.kernel import Handle, Kernel
from kpmd.runtime.lease_timer import LeaseTimer
from kpmd.runtime.lent import Lent
from kpmd.runtime.missed import Missed
from kpmd.runtime.policies import Policies
from kpmd.runtime.quotas import Counters
from kpmd.runtime.records import Records
from kpmd.runtime.stacks import StackSymbols
from kpmd.runtime.symbols import Symbols
from kpmd.runtime.tallies import Tallies
from kpmd.runtime.work import Board


def user_name(uid: int) -> str | None:
    """The user's name, or None. May block in NSS: for the pool only."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


@dataclass(frozen=True)
class _Stored:
    """A handle, and its copy in the FD store: nothing may keep it alive once it is closed."""

    handle: Handle
    bundle: Bundle | None

    @property
    def detaching(self) -> Progress | None:
        """How far ``close`` is, where the handle counts that."""
        return getattr(self.handle, "detaching", None)

    def close(self) -> None:
        try:
            if self.bundle is not None:
                self.bundle.drop()
        finally:
            self.handle.close()


class State:
    """Registry and handles, and what lets a handle go."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        deny: DenyList | None = None,
        max_targets: int = MAX_TARGETS,
        load_seconds: float = 10.0,
        store: FdStore | None = None,
        policies: Policies | None = None,
        audit: Audit | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``now`` gives the time of day; ``clock`` that of leases, CLOCK_MONOTONIC."""
        self.kernel = kernel
        self.policies = policies or Policies(Policy())
        self.audit = audit or Audit()
        self.max_targets = max_targets
        self.load_seconds = load_seconds
        self.now = now
        self.clock = clock
        self.executor = Executor()
        self.counters = Counters()
        self.tallies = Tallies()
        self.registry = Registry()
        self.journal = Journal(now)
        self.registry.on_event = self._happened
        self.board = Board(now)
        self.closing = Closing(self.executor, self.registry, self._take, self.board)
        self.missed = Missed(kernel, self.executor, self.registry, self.handle)
        self.lent = Lent(self.registry, self.executor)
        self.carrier = Carrier(store, self.executor)
        self.registry.on_change = self.carrier.update_later
        self.clients = Clients(self.registry, self.closing.later, self.carrier)
        self.lease_timer = LeaseTimer(self.registry, clock, self.closing.later)
        self.features = Features(kernel, self.executor)
        self.records = Records(kernel, self.executor)
        self.symbols = Symbols(kernel, deny or DenyList())
        self.stacks = StackSymbols(kernel)
        #: What the kernel told of each map when it was made.
        self.map_details: dict[str, MapDetails] = {}
        self._handles: dict[str, Handle] = {}
        self._user_names: dict[int, str | None] = {}
        self.stopping = False
        #: What has to be added to the clock to get the time of day.
        self._offset = now() - clock()

    def time_of(self, deadline: float) -> float:
        """The time of day, in seconds since the epoch, of a time of the clock.

        The same each time it is asked for, as long as the two clocks go on side by side.
        """
        offset = self.now() - self.clock()
        if abs(offset - self._offset) > 1:
            self._offset = offset  # the time was set, or the machine was suspended
        return deadline + self._offset

    def usage(self, uid: int) -> dict[str, int]:
        """What a user has, by the names of the limits on it."""
        return {**self.registry.accounts.used(uid), **self.counters.usage(uid)}

    def warnings(self) -> list[str]:
        """What an administrator has to look at."""
        found = [self.policies.fault, self.audit.failing]
        if self.audit.lost:
            found.append(f"{self.audit.lost} audit records were lost")
        return [each for each in found if each is not None]

    def check_open(self) -> None:
        """Raise ShuttingDown once the daemon stops: nothing new is made then."""
        if self.stopping:
            raise ShuttingDown("kpmd is stopping; try again when it has been started anew")

    def keep(self, record: Program | Map | Link, handle: Handle) -> None:
        """Hold the handle of a record that has just been listed."""
        self._handles[record.id] = handle
        if not isinstance(record, Map):
            self.carrier.begin(record)

    def adopt(self, record: Program | Map | Link, handle: Handle, bundle: Bundle | None) -> None:
        """Hold the handle of a record that an earlier daemon made."""
        self._handles[record.id] = handle
        if bundle is not None:
            self.carrier.adopt(record.id, bundle)

    def handle(self, id_: str) -> Handle:
        """The handle of a record that is on the registry's shelves."""
        return self._handles[id_]

    def _take(self, id_: str) -> Handle:
        """The handle of a record that has ended, to be closed."""
        self.map_details.pop(id_, None)
        self.records.end(id_)
        handle = self._handles.pop(id_)
        if id_ in self.registry.lent:
            handle = self.lent.last(id_, *owned_fds(handle))
        return _Stored(handle, self.carrier.take(id_))

    def _happened(self, event: Event) -> None:
        self.tallies.events[event.what, event.event, event.reason or ""] += 1
        if event.what == "lease" and event.event == "ended":
            self.carrier.drop_later(event.record.id)
        self.journal.add(event)

    async def undo(self, ending: Ending, error: BaseException) -> None:
        """Close what ``error`` has ended: before it is told, where somebody hears of it."""
        if isinstance(error, Exception):
            await self.closing.now(ending)
        else:
            self.closing.later(ending)

    async def owner_name(self, client: Client) -> str | None:
        """The name of the client's user; looked up once for each."""
        if client.uid not in self._user_names:
            self._user_names[client.uid] = await self.executor.run(
                user_name, client.uid, uid=client.uid
            )
        return self._user_names[client.uid]

    def known_name(self, uid: int) -> str | None:
        """The user's name, if it was looked up already."""
        return self._user_names.get(uid)

    async def end(self, *, keep: bool) -> None:
        """End everything; returns when all is detached and closed.

        ``keep``: what is in the FD store stays as it is, for the next daemon.
        """
        self.stopping = True
        self.lease_timer.close()
        if keep:
            self.closing.stop()
        else:
            ending = self.registry.end_all()
            await self.closing.now(ending, [link.id for link in self.registry.links])

    async def close(self) -> None:
        """End the pools and the kernel's helpers, when what runs in them has ended."""
        await self.closing.drain()
        await self.carrier.drain()
        self.clients.close()
        await self.lent.close()
        await self.records.drain()
        await self.executor.drain()
        self.kernel.close()
