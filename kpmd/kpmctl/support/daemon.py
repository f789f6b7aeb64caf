"""The parts of a support bundle that the daemon answers, as far as the caller may know."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from kpmd.client import AsyncClient
from kpmd.client.calls import object_of
from kpmd.client.errors import NotFound
from kpmd.kpmctl.support.parts import Part

#: Items of each list: one page.
_ITEMS = 1000

#: Links of which it is told what they are attached to, and functions of each.
_LINKS, _TARGETS = 20, 100

_LISTS = ("programs", "links", "maps", "clients", "leases")


def parts(client: AsyncClient, lists: bool) -> list[Part]:
    """What the daemon is asked; ``lists``: also for what it holds."""

    def asks(file: str, method: str, target: str, body: object = None) -> Part:
        async def get() -> object:
            return await client.call(method, target, body)

        return Part(f"daemon/{file}.json", f"{method} {target}", get)

    found = [
        asks("version", "GET", "/version"),
        asks("health", "GET", "/healthz"),
        asks("capabilities", "GET", "/capabilities"),
        Part("daemon/contract.json", "GET /openapi.json, its head", _contract(client)),
        asks("policy", "GET", "/policy"),
        asks("explain", "POST", "/policy/explain", {}),
        asks("work", "GET", f"/work?limit={_ITEMS}"),
        Part("daemon/metrics.txt", "GET /metrics", client.metrics),
    ]
    if lists:
        found += [asks(name, "GET", f"/{name}?limit={_ITEMS}") for name in _LISTS]
        asked = f"GET /links/ID/targets, {_TARGETS} of each of {_LINKS} links"
        found.append(Part("daemon/targets.json", asked, _targets(client)))
    return found


def _contract(client: AsyncClient) -> Callable[[], Awaitable[object]]:
    async def get() -> object:
        whole = object_of(await client.call("GET", "/openapi.json"))
        paths = whole.get("paths")
        return {"info": whole.get("info"), "paths": sorted(paths) if paths else []}

    return get


def _targets(client: AsyncClient) -> Callable[[], Awaitable[object]]:
    async def get() -> object:
        page = object_of(await client.call("GET", f"/links?limit={_LINKS}"))
        found: dict[str, Any] = {}
        for link in page["items"]:
            target = f"/links/{quote(str(link['id']), safe='')}/targets?limit={_TARGETS}"
            try:
                found[str(link["id"])] = await client.call("GET", target)
            except NotFound:
                continue  # detached meanwhile
        return found

    return get
