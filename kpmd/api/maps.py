"""Calls about maps themselves; what is in them is for ``map_entries`` and the others."""

from __future__ import annotations

from kpmd.api.answers import MapAnswer, MapsPage
from kpmd.api.bodies import PageQuery
from kpmd.api.paging import cursor, position
from kpmd.api.route import Call, Reply, Route
from kpmd.core.model import Map


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
]
