"""Maps that have ended here and that clients may hold: on their users' books until nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from kpmd.bpf.fd import Closed, OwnedFd
from kpmd.bpf.held import Held
from kpmd.core.registry import Registry
from kpmd.log import Log
from kpmd.runtime.executor import Executor

log = Log("kpmd.lent")

#: Seconds between looks at what somebody holds: nothing tells when they let go of it.
_BETWEEN_LOOKS = 5.0


class Lent:
    """Looks after the maps in ``registry.lent``, and reports each that nobody holds any more."""

    def __init__(self, registry: Registry, executor: Executor) -> None:
        self._registry = registry
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, Held] = {}
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def last(self, id_: str, fd: OwnedFd) -> Own:
        """The daemon's own file descriptor of such a map, to be closed."""
        return Own(self, id_, fd)

    def closed_here(self, id_: str, held: Held) -> None:
        """The daemon has let go of a map. In any thread."""
        self._loop.call_soon_threadsafe(self._look_after, id_, held)

    def _look_after(self, id_: str, held: Held) -> None:
        self._held[id_] = held
        self._more.set()
        if self._task is None:
            self._task = self._loop.create_task(self._follow())

    async def _follow(self) -> None:
        while self._held:
            self._more.clear()
            for id_ in await self._executor.run(_let_go, dict(self._held)):
                self._held.pop(id_).close()
                self._registry.returned(id_)
            if self._held:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_BETWEEN_LOOKS):
                        await self._more.wait()
        self._task = None

    async def close(self) -> None:
        """Look no more: the daemon ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for held in self._held.values():
            held.close()
        self._held.clear()


def _let_go(held: Mapping[str, Held]) -> list[str]:
    """Those of them that nobody holds."""
    found = []
    for id_, each in held.items():
        with suppress(OSError):  # out of file descriptors: it is looked at again
            if not each.still():
                found.append(id_)
    return found


@dataclass(frozen=True)
class Own:
    """A handle that is looked after once it is closed."""

    _lent: Lent
    _id: str
    _fd: OwnedFd

    def close(self) -> None:
        """Close it; from then on it is known who else holds it."""
        held: Held | None = None
        try:
            held = Held(self._fd)
        except Closed:
            return  # before, and it is looked after already
        except OSError as error:
            log.error(
                "counts until kpmd is restarted: nobody can tell who holds it", error, id=self._id
            )
        finally:
            self._fd.close()
        if held is not None:
            self._lent.closed_here(self._id, held)
