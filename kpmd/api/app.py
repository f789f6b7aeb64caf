"""All routes, in one table."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiohttp import web

from kpmd.api import (
    clients,
    events,
    leases,
    links,
    map_dump,
    map_entries,
    map_fds,
    map_globals,
    maps,
    openapi,
    policy,
    records,
    symbols,
    work,
)
from kpmd.api.daemon import DaemonCalls
from kpmd.api.metrics import Metrics
from kpmd.api.programs import ProgramCalls
from kpmd.api.route import Route
from kpmd.api.server import Api
from kpmd.runtime.state import State

if TYPE_CHECKING:
    from kpmd.api.tracing import Traces

#: Bytes of a request's body at the most: a million symbols fit.
MAX_BODY = 32 << 20

#: Bytes of an ELF object at the most.
MAX_OBJECT = 16 << 20


def routes(max_body: int = MAX_BODY, max_object: int = MAX_OBJECT) -> Sequence[Route]:
    """The route table."""
    daemon = DaemonCalls(max_body, max_object)
    table = [
        *daemon.routes(),
        *Metrics().routes(),
        *ProgramCalls(max_object).routes(),
        *maps.ROUTES,
        *map_entries.ROUTES,
        *map_dump.ROUTES,
        *map_globals.ROUTES,
        *map_fds.ROUTES,
        *records.ROUTES,
        *links.ROUTES,
        *symbols.ROUTES,
        *clients.ROUTES,
        *leases.ROUTES,
        *events.ROUTES,
        *policy.ROUTES,
        *work.ROUTES,
    ]
    daemon.describe = lambda: openapi.to_json(table)
    return table


def make_api(
    state: State,
    *,
    max_body: int = MAX_BODY,
    max_object: int = MAX_OBJECT,
    traces: Traces | None = None,
) -> Api:
    """The application that serves ``state``; requests are traced where there are ``traces``."""
    return Api(state, routes(max_body, max_object), max_body, traces)


async def wind_down(
    server: asyncio.AbstractServer,
    api: Api,
    runner: web.ServerRunner,
    state: State,
    seconds: float,
    *,
    keep: bool,
) -> None:
    """Let what is under way end, then everything; who listens hears of it.

    ``seconds``: how long requests may take for it. ``keep``: what is in the FD store stays there.
    """
    state.stopping = True
    server.close()
    await api.idle(seconds)
    await state.end(keep=keep)
    state.journal.close()
    state.records.stop()
    await runner.cleanup()
    await state.close()
