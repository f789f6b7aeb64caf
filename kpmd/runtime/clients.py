"""Clients and the processes behind them: each is watched through its pidfd until it ends."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from kpmd.core.model import Client, new_id
from kpmd.core.registry import Ending, Registry
from kpmd.log import Log
from kpmd.runtime.peer import Peer, has_exited

log = Log("kpmd.clients")


class Clients:
    """Turns connections into clients, and the end of a process into an ``Ending``."""

    def __init__(self, registry: Registry, on_end: Callable[[Ending], None]) -> None:
        self._registry = registry
        self._on_end = on_end
        self._pidfds: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        registry.on_forget = self._forget

    def connect(self, peer: Peer) -> Client:
        """The client of a new connection. Takes the peer's pidfd over."""
        if peer.pidfd is None:
            # It can ask, but nothing can live as long as it does.
            return Client(
                new_id("cli"),
                peer.pid,
                peer.uid,
                peer.gid,
                peer.command,
                time.time(),
                connections=1,
                ended=peer.why,
            )
        known = self._registry.find_client(peer.pid, peer.uid, peer.gid)
        if known is not None and has_exited(self._pidfds[known.id]):
            # Its number is used again already, before the loop told of its end.
            self._exited(known)
            known = None
        client = self._registry.connect(peer.pid, peer.uid, peer.gid, peer.command, time.time())
        if known is None:
            self._pidfds[client.id] = peer.pidfd
            self._loop.add_reader(peer.pidfd, self._exited, client)
        else:
            os.close(peer.pidfd)
        return client

    def disconnect(self, client: Client) -> None:
        """A connection of the client has closed."""
        self._registry.disconnect(client)

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

    def close(self) -> None:
        """Stop watching."""
        for pidfd in self._pidfds.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._pidfds.clear()
