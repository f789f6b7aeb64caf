"""Making, renewing and ending leases."""

from __future__ import annotations

from collections.abc import Mapping

from kpmd.core.model import Caller, Connection, Lease, new_id
from kpmd.log import Log
from kpmd.runtime.state import State

log = Log("kpmd.leases")


async def create(
    state: State, caller: Caller, connection: Connection, ttl: float, labels: Mapping[str, str]
) -> Lease:
    """A lease that ends in ``ttl`` seconds, unless it is renewed. Raises Quota, KernelError."""
    state.check_open()
    client = connection.client
    user = await state.owner_name(client)
    state.check_open()
    # Nothing else runs between this and the lease's being listed: it needs no claim.
    state.registry.accounts.check(client.uid, caller.limits, "leases", 1)
    lease = Lease(
        id=new_id("lse"),
        uid=client.uid,
        user=user,
        client=client.id,
        ttl=ttl,
        deadline=state.clock() + ttl,
        labels=dict(labels),
        created_at=state.now(),
    )
    state.registry.create_lease(client, lease)
    state.carrier.begin(lease)
    state.lease_timer.arm()
    try:
        await state.clients.carry(client)
        await state.carrier.carry(lease, must=True)
    except BaseException as error:
        await state.undo(state.registry.withdraw_lease(lease), error)
        raise
    log.info("lease created", id=lease.id, ttl=ttl, uid=client.uid, pid=client.pid)
    return lease


async def renew(state: State, caller: Caller, id_: str, ttl: float | None) -> Lease:
    """Let a lease live for its ``ttl`` from now on, or for another. Raises Gone, NotFound."""
    lease = state.registry.renew_lease(caller, id_, ttl, state.clock())
    state.lease_timer.arm()
    await state.carrier.update(lease)
    return lease


async def end(state: State, caller: Caller, id_: str) -> None:
    """End a lease; returns when all that was bound to it is detached. Raises Gone, NotFound."""
    ending = state.registry.end_lease(caller, id_, state.clock())
    # With those that were being detached already.
    await state.closing.now(ending, state.registry.links.ids(("lease", id_)))
    log.info("lease ended", id=id_, uid=caller.uid)
