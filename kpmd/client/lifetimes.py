"""Calls about what ends what: leases, clients, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from kpmd.client import answers
from kpmd.client.calls import Calls, Pages, object_of, path_of
from kpmd.client.events import EventLines
from kpmd.client.lines import Lines, OnGap
from kpmd.client.operation import listing, managed, operation
from kpmd.client.streams import streaming


class LifetimeCalls(Calls):
    """The part of both clients that is about leases, clients and events."""

    # Leases

    @operation
    async def create_lease(
        self, ttl: float, labels: Mapping[str, str] | None = None
    ) -> answers.Lease:
        """Make a lease, which ends in ``ttl`` seconds unless it is renewed.

        Its id is a lifetime for programs and links; it does not end with this process. Kinds of
        errors: ``invalid`` (more seconds than ``capabilities()["limits"]["lease_seconds"]``),
        ``quota``.
        """
        body = {"ttl": ttl, "labels": dict(labels or {})}
        return cast(answers.Lease, object_of(await self._call("POST", "/leases", body)))

    @managed(create_lease)
    async def leased(self, lease: answers.Lease) -> None:
        """What ``create_lease`` makes, as a context manager that ends it, and all bound to it.

        It does not renew the lease.
        """
        await self._call("DELETE", path_of("leases", lease["id"]))

    @listing
    def leases(self) -> Pages[answers.Lease]:
        """The caller's leases that have not ended; an administrator's are everyone's."""
        return self._pages("/leases")

    @operation
    async def lease(self, id: str) -> answers.Lease:  # noqa: A002 - the API's word
        """One lease. ``gone`` where it has ended, ``not-found`` where there never was one."""
        return cast(answers.Lease, await self._get(path_of("leases", id)))

    @operation
    async def renew_lease(
        self,
        id: str,  # noqa: A002 - the API's word
        ttl: float | None = None,
    ) -> answers.Lease:
        """Let a lease live for as long as before from now on, or for ``ttl`` seconds.

        Kinds of errors: ``gone`` where it has ended, ``not-found``, ``invalid``.
        """
        body = None if ttl is None else {"ttl": ttl}
        answer = await self._call("PUT", path_of("leases", id), body)
        return cast(answers.Lease, object_of(answer))

    @operation
    async def end_lease(self, id: str) -> None:  # noqa: A002 - the API's word
        """End a lease; when this returns, all that was bound to it is detached.

        Kinds of errors: ``gone`` where it has ended already, ``not-found``.
        """
        await self._call("DELETE", path_of("leases", id))

    # Clients

    @listing
    def clients(self) -> Pages[answers.ClientRecord]:
        """The caller's processes that are connected or hold something; this is one of them.

        An administrator's are everyone's.
        """
        return self._pages("/clients")

    @operation
    async def client(self, id: str) -> answers.ClientRecord:  # noqa: A002 - the API's word
        """One client. ``not-found`` where there is none, or it holds nothing any more."""
        return cast(answers.ClientRecord, await self._get(path_of("clients", id)))

    @operation
    async def release_client(self, id: str) -> None:  # noqa: A002 - the API's word
        """End all that a client made: persistent things and leases, too.

        When this returns, it is detached. The client may go on and make more.
        """
        await self._call("DELETE", path_of("clients", id))

    # Events

    @streaming
    def events(self, since: str | None = None, on_gap: OnGap | None = None) -> Lines[answers.Event]:
        """What happens to the caller's things (an administrator: to all), as it happens.

        It comes over a connection of its own, and waits for the next event without a timeout::

            with kpmd.events() as events:
                for event in events:
                    print(event["what"], event["event"], event["id"])

        Without ``on_gap`` it comes to its end when the daemon stops, and raises
        ``ConnectionFailed`` with the reason ``"lost"`` where the daemon cut it off: it failed, or
        the events were not read as fast as they came. Nothing is ever left out in silence.

        With ``on_gap`` it connects again by itself, behind the event that came last, for as long as
        ``patience`` says and 30 seconds at the least. Where the daemon no longer has what came
        after that (it keeps some thousand events, and none over a restart), ``on_gap`` is called
        with a sentence that says so, and it goes on from now. It listens already then: who lists
        what there is in ``on_gap`` misses nothing between the two.

        ``since``: begin behind the event with this ``seq``, ``events.seq`` of an earlier stream
        say. Where the daemon no longer has that, the first connection is refused with ``gone``.
        """
        return self._stream(EventLines(self._way, self._patience, on_gap, since))
