"""Which records are carried over a restart of the daemon, and in which form."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kpmd.bpf.fd import OwnedFd
from kpmd.core import carried
from kpmd.core.model import Client, Lease, Link, Map, Program
from kpmd.errors import KernelError, Quota
from kpmd.log import Log
from kpmd.runtime.executor import Executor
from kpmd.runtime.fdstore import Bundle, FdStore, Full
from kpmd.runtime.kernel import Handle

log = Log("kpmd.carrier")


def owned_fds(handle: Any) -> Sequence[OwnedFd]:
    """The file descriptors behind a handle, which may stand for many."""
    if isinstance(handle, OwnedFd):
        return [handle]
    return [fd for each in handle.handles for fd in owned_fds(each)]


#: Lifetimes that are longer than the daemon's: what has one must be stored.
OUTLIVES = ("lease", "persistent")


class Carrier:
    """Puts records into the FD store as they are made. Without a store it does nothing."""

    def __init__(self, store: FdStore | None, executor: Executor) -> None:
        self._store = store if store else None
        self._executor = executor
        self._bundles: dict[str, Bundle] = {}
        self._one_client = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def keeps(self) -> bool:
        """Whether anything outlives the daemon."""
        return self._store is not None

    @property
    def places(self) -> tuple[int, int]:
        """How many places of the store are taken, and how many there are."""
        return (0, 0) if self._store is None else (self._store.used, self._store.capacity)

    def begin(self, record: Client | Lease | Program | Link) -> None:
        """A record was made: what becomes of it from now on is known before it is stored."""
        # A program may outlive its connection. A link cannot, and would end with the daemon.
        connected = isinstance(record, Link) and record.lifetime.kind == "connection"
        if self._store is not None and not connected:
            self._bundles[record.id] = Bundle(self._store, record.id)

    async def carry(
        self,
        record: Lease | Program | Link,
        handles: Sequence[Handle] = (),
        maps: Sequence[Map] = (),
        *,
        must: bool,
    ) -> None:
        """Store a record's file descriptors (a program's before those of its maps) and its state.

        Does nothing where it is stored already, or has ended since ``begin``. Raises Quota where
        the store is full, and KernelError: only for what ``must`` outlive the daemon. What lives as
        long as a process works all the same, until then.
        """
        fds = [fd for handle in handles for fd in owned_fds(handle)]
        try:
            await self._put(record, fds, tuple(maps))
        except Full as full:
            if must:
                raise Quota(
                    "what outlives the daemon takes a place in the service manager's FD store, and "
                    f"all {full} are taken; delete something, or let the administrator raise "
                    "FileDescriptorStoreMax="
                ) from None
            log.warning("the FD store is full", id=record.id, effect="it ends with the daemon")
        except OSError as error:
            if must:
                raise KernelError(
                    "it cannot be put into the service manager's FD store, without which it would "
                    "end with the daemon; nothing was made",
                    error.errno or 0,
                ) from error
            log.warning("not in the FD store", id=record.id, error=str(error))

    async def carry_client(self, client: Client, pidfd: Callable[[], int | None]) -> None:
        """Store a client with its ``pidfd``, once, so that its process is known again.

        ``pidfd`` gives None when the client is not watched, or not any more.
        """
        if self._store is None:
            return
        # Of two requests at once the second waits for the first: what it makes needs its client.
        async with self._one_client:
            number = pidfd()
            if number is None or client.id in self._bundles:
                return
            self.begin(client)
            try:
                with OwnedFd(os.dup(number), f"pidfd of {client.id}") as fd:
                    await self._put(client, [fd])
            except (Full, OSError) as error:
                self.take(client.id)  # to be tried again with the next thing that it makes
                log.warning("not in the FD store", id=client.id, error=str(error))

    async def _put(
        self,
        record: Client | Lease | Program | Link,
        fds: Sequence[OwnedFd],
        maps: tuple[Map, ...] = (),
    ) -> None:
        bundle = self._bundles.get(record.id)
        if bundle is not None:
            await self._executor.run(_store, bundle, record, fds, maps)

    def adopt(self, id_: str, bundle: Bundle) -> None:
        """A record that an earlier daemon stored."""
        self._bundles[id_] = bundle

    def take(self, id_: str) -> Bundle | None:
        """The bundle of what has ended: the caller drops it."""
        return self._bundles.pop(id_, None)

    def drop_later(self, id_: str) -> None:
        """Take a client or a lease, which has ended, out of the store."""
        bundle = self.take(id_)
        if bundle is not None:
            self._later(self._executor.run(bundle.drop))

    async def update(self, record: Lease | Program | Link) -> None:
        """Store what has changed of a record."""
        bundle = self._bundles.get(record.id)
        if bundle is not None:
            # Looked at when it is written: of two changes at once the later one stays.
            await self._executor.run(bundle.update, lambda: carried.head(record))

    def update_later(self, record: Program | Link) -> None:
        """The same, with nobody waiting."""
        bundle = self._bundles.get(record.id)
        if bundle is not None:
            self._later(self._executor.run(bundle.update, lambda: carried.head(record)))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Wait until everything that has begun is done."""
        while self._tasks:
            await asyncio.wait(self._tasks)


def _store(
    bundle: Bundle,
    record: Client | Lease | Program | Link,
    fds: Sequence[OwnedFd],
    maps: tuple[Map, ...],
) -> None:
    bundle.put(carried.head(record), carried.body(record, maps), fds)
