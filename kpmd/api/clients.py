"""Calls about clients."""

from __future__ import annotations

from kpmd.api.answers import ClientAnswer, ClientsPage
from kpmd.api.bodies import PageQuery
from kpmd.api.paging import cursor, position
from kpmd.api.route import Call, Reply, Route
from kpmd.core.model import Client
from kpmd.core.times import rfc3339


def client_answer(client: Client) -> ClientAnswer:
    """A client as the API shows it."""
    return ClientAnswer(
        id=client.id,
        pid=client.pid,
        uid=client.uid,
        gid=client.gid,
        command=client.command,
        since=rfc3339(client.since),
        links=len(client.links),
        programs=len(client.programs),
        leases=len(client.leases),
    )


async def list_clients(call: Call) -> Reply:
    """GET /clients"""
    query: PageQuery = call.query
    registry = call.state.registry
    found, after = registry.clients.page(
        registry.scope(call.caller), position(query.after), query.limit
    )
    return Reply(ClientsPage(items=[client_answer(each) for each in found], next=cursor(after)))


async def get_client(call: Call) -> Reply:
    """GET /clients/{id}"""
    return Reply(client_answer(call.state.registry.client(call.caller, call.path["id"])))


async def release_client(call: Call) -> Reply:
    """DELETE /clients/{id}"""
    registry = call.state.registry
    client = registry.client(call.caller, call.path["id"], touch=True)
    links = list(client.links)
    await call.state.closing.now(registry.release_client(client), links)
    return Reply(status=204)


ROUTES = [
    Route(
        "GET",
        "/clients",
        list_clients,
        "Who holds what",
        ClientsPage,
        query=PageQuery,
        tag="clients",
    ),
    Route(
        "GET",
        "/clients/{id}",
        get_client,
        "One client",
        ClientAnswer,
        errors=("not-found",),
        tag="clients",
    ),
    Route(
        "DELETE",
        "/clients/{id}",
        release_client,
        "Release all that a client holds; answers when it is detached",
        None,
        status=204,
        errors=("not-found",),
        tag="clients",
    ),
]
