"""Calls about leases."""

from __future__ import annotations

from kpmd.api.answers import LeaseAnswer, LeasesPage
from kpmd.api.bodies import LeaseBody, PageQuery, RenewBody
from kpmd.api.paging import cursor, position
from kpmd.api.policy_answers import OwnerAnswer
from kpmd.api.route import Call, Reply, Route
from kpmd.core.model import Lease, Link
from kpmd.core.times import rfc3339
from kpmd.runtime import leases
from kpmd.runtime.state import State


def lease_answer(state: State, lease: Lease) -> LeaseAnswer:
    """A lease as the API shows it."""
    bound = state.registry.bound(lease.id)
    links = sum(isinstance(each, Link) for each in bound)
    return LeaseAnswer(
        id=lease.id,
        ttl=lease.ttl,
        expires_at=rfc3339(state.time_of(lease.deadline)),
        owner=OwnerAnswer(uid=lease.uid, user=lease.user),
        client=lease.client,
        links=links,
        programs=len(bound) - links,
        labels=lease.labels,
        created_at=rfc3339(lease.created_at),
    )


async def create(call: Call) -> Reply:
    """POST /leases"""
    body: LeaseBody = call.body
    lease = await leases.create(call.state, call.caller, call.connection, body.ttl, body.labels)
    call.what |= {"lease": lease.id, "ttl": body.ttl}
    return Reply(
        lease_answer(call.state, lease), status=201, headers={"Location": f"/leases/{lease.id}"}
    )


async def list_leases(call: Call) -> Reply:
    """GET /leases"""
    query: PageQuery = call.query
    registry = call.state.registry
    found, after = registry.leases.shelf.page(
        registry.scope(call.caller), position(query.after), query.limit
    )
    items = [lease_answer(call.state, each) for each in found]
    return Reply(LeasesPage(items=items, next=cursor(after)))


async def get_lease(call: Call) -> Reply:
    """GET /leases/{id}"""
    state = call.state
    lease = state.registry.lease(call.caller, call.path["id"], state.clock())
    return Reply(lease_answer(state, lease))


async def renew(call: Call) -> Reply:
    """PUT /leases/{id}"""
    body: RenewBody = call.body
    lease = await leases.renew(call.state, call.caller, call.path["id"], body.ttl)
    return Reply(lease_answer(call.state, lease))


async def end(call: Call) -> Reply:
    """DELETE /leases/{id}"""
    await leases.end(call.state, call.caller, call.path["id"])
    return Reply(status=204)


ROUTES = [
    Route(
        "POST",
        "/leases",
        create,
        "Make a lease, for programs and links to live as long as it does",
        LeaseAnswer,
        status=201,
        body=LeaseBody,
        right="leases",
        errors=("quota", "kernel", "shutting-down"),
        tag="leases",
    ),
    Route(
        "GET",
        "/leases",
        list_leases,
        "Leases that have not ended",
        LeasesPage,
        query=PageQuery,
        tag="leases",
    ),
    Route(
        "GET",
        "/leases/{id}",
        get_lease,
        "One lease",
        LeaseAnswer,
        errors=("not-found", "gone"),
        tag="leases",
    ),
    Route(
        "PUT",
        "/leases/{id}",
        renew,
        "Renew a lease: it lives for its time from now on, or for another",
        LeaseAnswer,
        body=RenewBody,
        optional_body=True,
        right="leases",
        errors=("not-found", "gone"),
        tag="leases",
    ),
    Route(
        "DELETE",
        "/leases/{id}",
        end,
        "End a lease; answers when all that was bound to it is detached",
        None,
        status=204,
        errors=("not-found", "gone"),
        tag="leases",
    ),
]
