"""Calls about maps."""

from __future__ import annotations

import binascii

from kpmd.api.answers import EntriesPage, EntryAnswer, MapAnswer, MapsPage
from kpmd.api.bodies import PageQuery
from kpmd.api.paging import cursor, position
from kpmd.api.route import Call, Reply, Route
from kpmd.bpf.maps import Entry
from kpmd.core.model import Map
from kpmd.errors import Invalid
from kpmd.runtime import programs


def map_answer(each: Map) -> MapAnswer:
    """A map as the API shows it."""
    return MapAnswer(
        id=each.id,
        kernel_id=each.kernel_id,
        name=each.name,
        type=each.type,
        key_size=each.key_size,
        value_size=each.value_size,
        max_entries=each.max_entries,
        programs=sorted(each.programs),
    )


def entry_answer(entry: Entry, percpu: bool) -> EntryAnswer:
    """An entry as the API shows it."""
    key, values = entry
    shown = [value.hex() for value in values]
    return EntryAnswer(key=key.hex(), value=shown if percpu else shown[0])


def hex_key(text: str, where: str) -> bytes:
    """The bytes of a key in hex. Raises Invalid."""
    try:
        return binascii.unhexlify(text)
    except ValueError:
        raise Invalid.at([where], "must be the key's bytes in hex, two digits each") from None


async def list_maps(call: Call) -> Reply:
    """GET /maps"""
    query: PageQuery = call.query
    registry = call.state.registry
    found, after = registry.maps.page(
        registry.scope(call.caller), position(query.after), query.limit
    )
    return Reply(MapsPage(items=[map_answer(each) for each in found], next=cursor(after)))


async def get_map(call: Call) -> Reply:
    """GET /maps/{id}"""
    return Reply(map_answer(call.state.registry.map(call.caller, call.path["id"])))


async def entries(call: Call) -> Reply:
    """GET /maps/{id}/entries: the cursor is the last key."""
    query: PageQuery = call.query
    after = None if query.after is None else hex_key(query.after, "after")
    id_ = call.path["id"]
    found = await programs.entries(call.state, call.caller, id_, after, query.limit + 1)
    percpu = call.state.registry.map(call.caller, id_).percpu
    page = found[: query.limit]
    return Reply(
        EntriesPage(
            items=[entry_answer(entry, percpu) for entry in page],
            next=page[-1][0].hex() if len(found) > query.limit else None,
        )
    )


async def entry(call: Call) -> Reply:
    """GET /maps/{id}/entries/{key}"""
    id_ = call.path["id"]
    percpu = call.state.registry.map(call.caller, id_).percpu
    found = await programs.entry(call.state, call.caller, id_, hex_key(call.path["key"], "key"))
    return Reply(entry_answer(found, percpu))


ROUTES = [
    Route(
        "GET",
        "/maps",
        list_maps,
        "The maps of the caller's programs",
        MapsPage,
        query=PageQuery,
        tag="maps",
    ),
    Route(
        "GET",
        "/maps/{id}",
        get_map,
        "One map",
        MapAnswer,
        errors=("not-found",),
        tag="maps",
    ),
    Route(
        "GET",
        "/maps/{id}/entries",
        entries,
        "A page of a map's entries",
        EntriesPage,
        query=PageQuery,
        right="maps",
        errors=("not-found", "not-supported", "kernel"),
        tag="maps",
    ),
    Route(
        "GET",
        "/maps/{id}/entries/{key}",
        entry,
        "One entry; the key is in hex",
        EntryAnswer,
        right="maps",
        errors=("not-found", "not-supported", "kernel"),
        tag="maps",
    ),
]
