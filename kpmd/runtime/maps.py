"""What is in maps, and the global variables of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kpmd.bpf.fd import Closed
from kpmd.core.model import Caller, Map
from kpmd.errors import NotFound
from kpmd.runtime.executor import Lane
from kpmd.runtime.kernel import MapContent
from kpmd.runtime.state import State

T = TypeVar("T")

#: Bytes that a page of entries has in the kernel at the most, or one entry.
PAGE_BYTES = 256 << 10

#: Entries that are deleted in one go.
_CLEARED = 4096


async def use(
    state: State,
    caller: Caller,
    id_: str,
    work: Callable[[Map, MapContent], T],
    *,
    touch: bool = False,
    lane: Lane = Lane.QUICK,
) -> T:
    """Do something in the pool with what is in a map; ``touch``: other than to read it.

    Raises NotFound, also where the map ends meanwhile, Forbidden, and what ``work`` does.
    """
    each = state.registry.map(caller, id_, touch=touch)
    return await _run(state, caller, [each], lambda open_: work(each, open_(each)), lane)


async def use_all(
    state: State,
    caller: Caller,
    id_: str,
    work: Callable[[list[Map], Callable[[Map], MapContent]], T],
    *,
    touch: bool = False,
) -> T:
    """The same with all maps of a program, each of which ``work`` opens where it needs it."""
    program = state.registry.program(caller, id_, touch=touch)
    found = [each for map_ in program.maps if (each := state.registry.maps.get(map_)) is not None]
    return await _run(state, caller, found, lambda open_: work(found, open_), Lane.PARSE)


async def _run(
    state: State,
    caller: Caller,
    maps: list[Map],
    work: Callable[[Callable[[Map], MapContent]], T],
    lane: Lane,
) -> T:
    """Work in the pool, with what opens one of the maps."""
    handles = {each.id: (state.handle(each.id), state.map_details[each.id]) for each in maps}

    def open_(each: Map) -> MapContent:
        return state.kernel.content(*handles[each.id])

    try:
        return await state.executor.run(work, open_, lane=lane, uid=caller.uid)
    except Closed:
        raise NotFound("the map has ended with its last program") from None


async def clear(state: State, caller: Caller, id_: str) -> int:
    """Delete all entries of a map: how many. Those that come meanwhile are deleted or not."""
    total, after = 0, None
    most = 2 * state.registry.map(caller, id_, touch=True).max_entries
    while True:

        def some(_: Map, content: MapContent, after: str | None = after) -> tuple[int, str | None]:
            return content.clear(after, _CLEARED, PAGE_BYTES)

        deleted, after = await use(state, caller, id_, some, touch=True)
        total += deleted
        # It may be filled as fast as it is cleared.
        if after is None or not deleted or total > most:
            return total
