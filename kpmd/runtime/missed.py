"""How many calls links have missed: the kernel's counts, added up a bounded part at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kpmd.bpf.fd import Closed
from kpmd.core.model import Link
from kpmd.core.registry import Registry
from kpmd.log import Log
from kpmd.runtime import parts
from kpmd.runtime.executor import Executor
from kpmd.runtime.kernel import Handle, Kernel

log = Log("kpmd.missed")

#: Links, and system calls, that one ``refresh`` takes at the most; one link may take more. A link
#: that is made of many to single functions takes a call for each.
_LINKS, _CALLS = 256, 1024


class Missed:
    """What links have missed since they were made, as far as somebody has looked.

    The kernel tells it for each link, by a system call, and forgets it with the link: what one
    misses after it was last looked at is not in here. For the event loop only.
    """

    def __init__(
        self,
        kernel: Kernel,
        executor: Executor,
        registry: Registry,
        handle: Callable[[str], Handle],
    ) -> None:
        self._kernel = kernel
        self._executor = executor
        self._registry = registry
        self._handle = handle
        #: By kind and mechanism.
        self.total: Counter[tuple[str, str]] = Counter()
        self._known: dict[str, int] = {}
        self._cursor = 0

    async def refresh(self) -> None:
        """Look at the links that it is the turn of."""
        shelf = self._registry.links
        wanted: list[tuple[Link, Handle]] = []
        calls = 0
        cursor: int | None = self._cursor
        while cursor is not None and len(wanted) < _LINKS and calls < _CALLS:
            page, cursor = shelf.page(None, cursor, 1)
            for link in page:
                if link.detaching is None:
                    calls += 1 if link.mechanism == "kprobe_multi" else link.count
                    wanted.append((link, self._handle(link.id)))
        self._cursor = cursor or 0
        for link, missed in await self._executor.run(self._ask, wanted):
            self.total[link.kind, link.mechanism] += max(0, missed - self._known.get(link.id, 0))
            self._known[link.id] = missed
        if cursor is None:
            self._known = {id_: n for id_, n in self._known.items() if shelf.get(id_) is not None}

    def _ask(self, wanted: list[tuple[Link, Handle]]) -> list[tuple[Link, int]]:
        """Blocks."""
        found = []
        for link, handle in wanted:
            try:
                missed = parts.details_of(self._kernel, handle).missed
            except Closed:
                continue
            except OSError as error:
                log.debug("not told", id=link.id, error=str(error))
                continue
            if missed is not None:
                found.append((link, missed))
        return found
