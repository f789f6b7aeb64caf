"""What users have open right now, and what their maps weigh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

from kpmd.bpf.maps import memory_of, possible_cpus
from kpmd.bpf.objects import MapDetails
from kpmd.core.quotas import exceeded

#: What is open as long as a connection or a request lasts.
Open = Literal["streams", "requests", "connections"]
OPEN: tuple[Open, ...] = ("streams", "requests", "connections")


class Counters:
    """Counts what each user has open. For the event loop only."""

    def __init__(self) -> None:
        self._used: dict[tuple[int, Open], int] = {}

    def used(self, uid: int, what: Open) -> int:
        """How many the user has open."""
        return self._used.get((uid, what), 0)

    def total(self, what: Open) -> int:
        """How many all users have open."""
        return sum(used for (_, each), used in self._used.items() if each == what)

    def usage(self, uid: int) -> dict[str, int]:
        """How many of each the user has open."""
        return {what: self.used(uid, what) for what in OPEN}

    @contextmanager
    def hold(self, uid: int, what: Open, most: int) -> Iterator[None]:
        """Count one more as long as the block lasts. Raises Quota where ``most`` are open."""
        used = self.used(uid, what)
        if used >= most:
            raise exceeded(what, used, most)
        self._used[uid, what] = used + 1
        try:
            yield
        finally:
            left = self._used.pop((uid, what)) - 1
            if left:
                self._used[uid, what] = left


_possible_cpus = cache(possible_cpus)


def map_memory(details: MapDetails, cpus: int | None = None) -> int:
    """About what a map takes of the kernel's memory when it is full.

    ``cpus``: those that the kernel keeps room for; the machine's where it is left out.
    """
    return memory_of(
        details.type_number,
        details.key_size,
        details.value_size,
        details.max_entries,
        _possible_cpus() if cpus is None else cpus,
    )
