"""Calls about what ends what: leases, clients, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from kpmd.client import answers
from kpmd.client.calls import Calls, path_of
from kpmd.client.events import Events


class LifetimeCalls(Calls):
    """Base of ``Client``: leases, clients and events."""

    # Leases

    def create_lease(self, ttl: float, labels: Mapping[str, str] | None = None) -> answers.Lease:
        """Make a lease, which ends in ``ttl`` seconds unless it is renewed.

        Its id is a lifetime for programs and links; it does not end with this process. Kinds of
        errors: ``invalid`` (more seconds than ``capabilities()["limits"]["lease_seconds"]``),
        ``quota``.
        """
        body = {"ttl": ttl, "labels": dict(labels or {})}
        return cast(answers.Lease, self._object(self._connection.call("POST", "/leases", body)))

    def leases(self) -> list[answers.Lease]:
        """The caller's leases that have not ended; an administrator's are everyone's."""
        return list(self._pages("/leases"))

    def lease(self, id: str) -> answers.Lease:  # noqa: A002 - the API's word
        """One lease. ``gone`` where it has ended, ``not-found`` where there never was one."""
        return cast(answers.Lease, self._get(path_of("leases", id)))

    def renew_lease(
        self,
        id: str,  # noqa: A002 - the API's word
        ttl: float | None = None,
    ) -> answers.Lease:
        """Let a lease live for as long as before from now on, or for ``ttl`` seconds.

        Kinds of errors: ``gone`` where it has ended, ``not-found``, ``invalid``.
        """
        body = None if ttl is None else {"ttl": ttl}
        answer = self._connection.call("PUT", path_of("leases", id), body)
        return cast(answers.Lease, self._object(answer))

    def end_lease(self, id: str) -> None:  # noqa: A002 - the API's word
        """End a lease; when this returns, all that was bound to it is detached.

        Kinds of errors: ``gone`` where it has ended already, ``not-found``.
        """
        self._connection.call("DELETE", path_of("leases", id))

    # Clients

    def clients(self) -> list[answers.ClientRecord]:
        """The caller's processes that are connected or hold something; this is one of them.

        An administrator's are everyone's.
        """
        return list(self._pages("/clients"))

    def client(self, id: str) -> answers.ClientRecord:  # noqa: A002 - the API's word
        """One client. ``not-found`` where there is none, or it holds nothing any more."""
        return cast(answers.ClientRecord, self._get(path_of("clients", id)))

    def release_client(self, id: str) -> None:  # noqa: A002 - the API's word
        """End all that a client made: persistent things and leases, too.

        When this returns, it is detached. The client may go on and make more.
        """
        self._connection.call("DELETE", path_of("clients", id))

    # Events

    def events(self, since: str | None = None) -> Events:
        """What happens to the caller's things (an administrator: to all), as it happens.

        Returns an iterator over a connection of its own, which listens already when this returns;
        close it, or use it as a context manager. It waits for the next event without a timeout,
        and comes to its end when the daemon stops::

            with kpmd.events() as events:
                for event in events:
                    print(event["what"], event["event"], event["id"])

        It raises ``ConnectionFailed`` with the reason ``"lost"`` where the daemon cut it off: it
        failed, or the events were not read as fast as they came. Nothing is ever left out in
        silence, and this does not connect again by itself.

        Who stopped and wants to go on gives the ``seq`` of the event that he had last, which is
        ``events.seq``, as ``since``: what came after it comes first then. Where the daemon no
        longer has that (it keeps some thousand events, and none over a restart; who was cut off for
        being slow is always too late), it is ``gone``. Listen anew then, and, once this has
        returned, list what there is: nothing is missed between the two.
        """
        made = Events(self._connection.another(), since)
        self._streams.add(made)
        return made


def lifetime_body(lifetime: str) -> dict[str, Any]:
    """A lifetime as the API takes it: a kind, or the id of a lease."""
    if lifetime.startswith("lse-"):
        return {"kind": "lease", "lease": lifetime}
    return {"kind": lifetime}
