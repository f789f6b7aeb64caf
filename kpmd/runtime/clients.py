"""Clients and the processes behind them: each is watched through its pidfd until it ends."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from kpmd.core.changes import Ending
from kpmd.core.model import Client, Connection, new_id
from kpmd.core.registry import Registry
from kpmd.log import Log
from kpmd.runtime.carrier import Carrier
from kpmd.runtime.peer import Peer, has_exited

log = Log("kpmd.clients")


class Clients:
    """Turns connections into clients, and the end of a process into an ``Ending``."""

    def __init__(
        self, registry: Registry, on_end: Callable[[Ending], None], carrier: Carrier
    ) -> None:
        self._registry = registry
        self._on_end = on_end
        self._carrier = carrier
        self._pidfds: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        registry.on_forget = self._forget

    def connect(self, peer: Peer) -> Connection:
        """A new connection, of a client known or new. Takes the peer's pidfd over."""
        if peer.pidfd is None:
            # It can ask, but nothing can live as long as it does.
            unknown = Client(
                new_id("cli"), peer.pid, peer.uid, peer.gid, peer.command, time.time(), 1
            )
            unknown.ended = peer.why
            return Connection(new_id("con"), unknown)
        process = peer.process
        known = self._registry.find_client(process, peer.uid, peer.gid)
        if known is not None and has_exited(self._pidfds[known.id]):
            # Its number is used again already, before the loop told of its end.
            self._exited(known)
            known = None
        connection = self._registry.connect(
            process, peer.pid, peer.uid, peer.gid, peer.command, time.time()
        )
        if known is None:
            self.watch(connection.client, peer.pidfd)
        else:
            os.close(peer.pidfd)
        return connection

    def watch(self, client: Client, pidfd: int) -> None:
        """Watch a listed client's process. Takes its pidfd over."""
        self._pidfds[client.id] = pidfd
        self._loop.add_reader(pidfd, self._exited, client)

    def disconnect(self, connection: Connection) -> None:
        """A connection has closed."""
        self._on_end(self._registry.disconnect(connection))

    async def carry(self, client: Client) -> None:
        """Have the client known again after a restart of the daemon: it is about to hold things."""
        await self._carrier.carry_client(client, lambda: self._pidfds.get(client.id))

    def _exited(self, client: Client) -> None:
        held = client.links or client.programs
        ending = self._registry.end_client(client)
        if held:
            log.info(
                "client gone",
                client=client.id,
                pid=client.pid,
                uid=client.uid,
                links=len(ending.links),
                programs=len(ending.programs),
            )
        self._on_end(ending)

    def _forget(self, client: Client) -> None:
        pidfd = self._pidfds.pop(client.id, None)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._carrier.drop_later(client.id)

    def close(self) -> None:
        """Stop watching."""
        for pidfd in self._pidfds.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._pidfds.clear()
