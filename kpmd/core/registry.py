"""The one place that decides what exists, who sees it, and what ends what. Synchronous, no I/O.

A method that ends things returns an ``Ending``: the records whose file descriptors the caller must
close now. Nothing is in two Endings. Links stay listed, as detaching, until the caller says with
``detached`` that the kernel has let go of them; that may end the program which they kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Literal

from kpmd.core.changes import Ending, Event
from kpmd.core.holdings import Holdings
from kpmd.core.model import (
    Caller,
    Client,
    Connection,
    Lease,
    Lifetime,
    Link,
    Map,
    Program,
    Reason,
    new_id,
)
from kpmd.core.quotas import Claim
from kpmd.errors import Conflict, Gone


class Registry(Holdings):
    """Clients, leases, programs, maps and links, and the rules between them.

    - A link or program ends with what its lifetime binds it to, its anchor: the client's process,
      the connection, the lease. A persistent one ends when it is deleted.
    - A program outlives its own lifetime while a link uses it, is being made with it, or is being
      detached from it.
    - A map ends with the last program that uses it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[tuple[Hashable, int, int], Client] = {}
        #: What ends with each anchor, in the order in which it was made.
        self._bound: dict[str, dict[str, Program | Link]] = {}
        #: Called with each client that is listed no more, so that its process is no longer watched.
        self.on_forget: Callable[[Client], None] = lambda client: None
        #: Called with what is to end, but may take its time: links, and programs that links need.
        self.on_change: Callable[[Program | Link], None] = lambda thing: None
        #: Called with everything that happens, in order.
        self.on_event: Callable[[Event], None] = lambda event: None

    # Clients and connections

    def find_client(self, process: Hashable, uid: int, gid: int) -> Client | None:
        """The client that this process has already, if it is known not to have ended.

        ``process`` tells processes apart; None where that cannot be done.
        """
        return None if process is None else self._live.get((process, uid, gid))

    def connect(
        self, process: Hashable, pid: int, uid: int, gid: int, command: str, now: float
    ) -> Connection:
        """A new connection of a process; its client is made if this is the first."""
        client = self.find_client(process, uid, gid)
        if client is None:
            client = Client(new_id("cli"), pid, uid, gid, command, now)
            self._list_client(client, process)
            self.on_event(Event("client", "created", client))
        client.connections += 1
        return Connection(new_id("con"), client)

    def _list_client(self, client: Client, process: Hashable) -> None:
        client.process = process
        self.clients.add(client)
        if process is not None:
            self._live[(process, client.uid, client.gid)] = client

    def begin_request(self, client: Client) -> None:
        """A request is under way: its client stays known, whatever becomes of the connection."""
        client.requests += 1

    def end_request(self, client: Client) -> None:
        """A request has been answered."""
        client.requests -= 1
        if not client.connections:
            self._forget_if_idle(client)

    def disconnect(self, connection: Connection) -> Ending:
        """A connection has closed: what was bound to it ends.

        A client without connection that holds nothing is forgotten.
        """
        connection.closed = True
        connection.client.connections -= 1
        ending = self._end_anchor(connection.id, "connection-closed")
        self._forget_if_idle(connection.client)
        return ending

    def _forget_if_idle(self, client: Client) -> None:
        busy = client.connections or client.requests
        if not (busy or client.programs or client.links or client.leases):
            self._unlist(client, "connection-closed")

    def _unlist(self, client: Client, reason: Reason) -> None:
        if self.clients.remove(client.id) is not None:
            self._live.pop((client.process, client.uid, client.gid), None)
            self.on_forget(client)
            self.on_event(Event("client", "ended", client, reason))

    def end_client(self, client: Client) -> Ending:
        """The process has ended, however it ended: so do its things of lifetime ``process``."""
        if client.ended:
            return Ending()
        client.ended = "the process that opened this connection has ended"
        ending = self._end_anchor(client.id, "client-gone")
        self._unlist(client, "client-gone")
        return ending

    def release_client(self, client: Client) -> Ending:
        """Everything that the client made, persistent things and leases too: it is to be rid of."""
        ending = Ending()
        for id_ in sorted(client.leases):
            self._end_lease(id_, "client-released", ending)
        for id_ in sorted(client.links):
            if (link := self.links.get(id_)) is not None:
                self._end_link(link, "client-released", ending)
        for id_ in sorted(client.programs):
            if (program := self.programs.get(id_)) is not None:
                self._release_program(program, "client-released", ending)
        return ending

    # Anchors: what a lifetime binds a thing to

    def anchor(self, caller: Caller, connection: Connection, lifetime: Lifetime, now: float) -> str:
        """The id of what a thing of that lifetime ends with; empty where it is persistent.

        Raises Gone where that has ended already, NotFound for a lease that the caller cannot see.
        """
        if lifetime.kind == "process":
            if ended := connection.client.ended:
                raise Gone(
                    f"{ended}, so nothing can live as long as it does; connect from a process that "
                    'lives, or ask for the lifetime {"kind": "persistent"}'
                )
            return connection.client.id
        if lifetime.kind == "connection":
            if connection.closed:
                raise Gone("the connection has closed, so nothing can live as long as it does")
            return connection.id
        if lifetime.kind == "lease":
            return self.lease(caller, lifetime.lease, now, touch=True).id
        return ""

    def _bind(self, thing: Program | Link, anchor: str) -> None:
        thing.anchor = anchor
        if anchor:
            self._bound.setdefault(anchor, {})[thing.id] = thing

    def _unbind(self, thing: Program | Link) -> None:
        bound = self._bound.get(thing.anchor)
        if bound is not None:
            bound.pop(thing.id, None)
            if not bound:
                del self._bound[thing.anchor]

    def bound(self, anchor: str) -> Collection[Program | Link]:
        """What ends with the client, connection or lease of that id."""
        return self._bound.get(anchor, {}).values()

    def _end_anchor(self, anchor: str, reason: Reason, ending: Ending | None = None) -> Ending:
        ending = Ending() if ending is None else ending
        things = self._bound.pop(anchor, {}).values()
        # Links first: a program of the same anchor may then end in the same go.
        for thing in things:
            if isinstance(thing, Link):
                self._end_link(thing, reason, ending)
        for thing in things:
            if isinstance(thing, Program):
                self._release_program(thing, reason, ending)
        return ending

    # Leases

    def create_lease(self, client: Client, lease: Lease) -> None:
        """List a new lease."""
        self.leases.add(lease)
        if not client.ended:
            client.leases.add(lease.id)
        self.on_event(Event("lease", "created", lease))

    def renew_lease(self, caller: Caller, id_: str, ttl: float | None, now: float) -> Lease:
        """Let a lease live for its ``ttl`` from now on, or for another. Raises Gone, NotFound."""
        lease = self.lease(caller, id_, now, touch=True)
        self.leases.renew(lease, lease.ttl if ttl is None else ttl, now)
        return lease

    def end_lease(self, caller: Caller, id_: str, now: float) -> Ending:
        """End a lease, and all that is bound to it. Raises Gone, NotFound."""
        ending = Ending()
        self._end_lease(self.lease(caller, id_, now, touch=True).id, "lease-ended", ending)
        return ending

    def withdraw_lease(self, lease: Lease) -> Ending:
        """End a lease that was just made: a later step of its making has failed."""
        ending = Ending()
        self._end_lease(lease.id, "lease-ended", ending)
        return ending

    def expire(self, now: float) -> Ending:
        """End the leases whose time is over, and all that is bound to them."""
        ending = Ending()
        for id_ in self.leases.due(now):
            self._end_lease(id_, "lease-expired", ending)
        return ending

    def _end_lease(self, id_: str, reason: Reason, ending: Ending) -> None:
        lease = self.leases.end(id_, reason)
        if lease is None:
            return
        self._end_anchor(id_, reason, ending)
        self.on_event(Event("lease", "ended", lease, reason))
        owner = self.clients.get(lease.client)
        if owner is not None:
            owner.leases.discard(id_)
            self._forget_if_idle(owner)

    # Programs and maps

    def add_loaded(
        self,
        caller: Caller,
        connection: Connection,
        programs: Sequence[Program],
        maps: Sequence[Map],
        now: float,
        claim: Claim | None = None,
    ) -> None:
        """List what was loaded on a connection; it counts in the place of the claim.

        Raises Gone when its anchor ended meanwhile.
        """
        client = connection.client
        anchors = [self.anchor(caller, connection, each.lifetime, now) for each in programs]
        with self.accounts.settle(claim):
            for each in maps:
                self.maps.add(each)
            for program in programs:
                self.programs.add(program)
        for program, anchor in zip(programs, anchors, strict=True):
            self._bind(program, anchor)
            if not client.ended:
                client.programs.add(program.id)
            self.on_event(Event("program", "created", program))

    def delete_program(self, caller: Caller, id_: str, force: bool) -> Ending:
        """End a program; with ``force`` its links first. Raises Conflict when it is in use."""
        program = self.program(caller, id_, touch=True)
        if program.holds:
            raise Conflict(f"a link is being made with program {id_} right now; try again")
        attached = [
            link
            for link_id in sorted(program.links)
            if (link := self.links.get(link_id)) is not None and link.detaching is None
        ]
        if attached and not force:
            raise Conflict(
                f"program {id_} has {len(attached)} link(s); delete them first, "
                "or add ?force=true to detach them",
            )
        ending = Ending()
        for link in attached:
            self._end_link(link, "program-deleted", ending)
        self._release_program(program, "deleted", ending)
        return ending

    def _release_program(self, program: Program, reason: Reason, ending: Ending) -> None:
        """Its own lifetime is over; it ends now, or with the last link that needs it."""
        if program.released is None or reason == "deleted":
            program.released = reason
            self._unbind(program)
            self.on_change(program)
        self._end_program_if_free(program, ending)

    def _end_program_if_free(self, program: Program, ending: Ending) -> None:
        if program.released is None or program.links or program.holds:
            return
        if self.programs.remove(program.id) is None:
            return
        ending.programs.append(program)
        self.on_event(Event("program", "ended", program, program.released))
        owner = self.clients.get(program.client)
        if owner is not None:
            owner.programs.discard(program.id)
            self._forget_if_idle(owner)
        for map_id in program.maps:
            each = self.maps.get(map_id)
            if each is not None:
                each.programs.discard(program.id)
                if not each.programs:
                    self.maps.remove(map_id)
                    ending.maps.append(each)

    # Links

    def hold_program(self, caller: Caller, id_: str) -> Program:
        """The program, kept from ending until ``add_link`` or ``let_go`` settles the hold.

        Raises NotFound, and Conflict when it is being deleted.
        """
        program = self.program(caller, id_, touch=True)
        if program.released == "deleted":
            raise Conflict(f"program {id_} is being deleted: its links are being detached")
        program.holds += 1
        return program

    def let_go(self, program: Program) -> Ending:
        """No link came of it: the hold ends, and so may the program."""
        program.holds -= 1
        ending = Ending()
        self._end_program_if_free(program, ending)
        return ending

    def add_link(
        self,
        caller: Caller,
        connection: Connection,
        program: Program,
        link: Link,
        now: float,
        claim: Claim | None = None,
    ) -> None:
        """List a new link and settle the hold on its program, and the claim that it counts for.

        Raises Gone when its anchor ended meanwhile: the hold stays, and the caller lets it go.
        """
        anchor = self.anchor(caller, connection, link.lifetime, now)
        program.holds -= 1
        with self.accounts.settle(claim):
            self._list_link(program, link)
        self._bind(link, anchor)
        if not connection.client.ended:
            connection.client.links.add(link.id)
        self.on_event(Event("link", "created", link))

    def _list_link(self, program: Program, link: Link) -> None:
        program.links.add(link.id)
        self.links.add(link)

    def delete_link(self, caller: Caller, id_: str) -> Ending:
        """End a link, and its program when only this link kept it.

        The Ending is empty when it is being detached already.
        """
        ending = Ending()
        self._end_link(self.link(caller, id_, touch=True), "deleted", ending)
        return ending

    def _end_link(self, link: Link, reason: Reason, ending: Ending) -> None:
        if link.detaching is not None:
            return
        link.detaching = reason
        self._unbind(link)
        self.on_change(link)
        ending.links.append(link)
        self.on_event(Event("link", "detaching", link, reason))

    def detached(self, link: Link) -> Ending:
        """The kernel has let go of a link of an Ending: it is listed no more."""
        ending = Ending()
        if self.links.remove(link.id) is None:
            return ending
        self.on_event(Event("link", "ended", link, link.detaching))
        owner = self.clients.get(link.client)
        if owner is not None:
            owner.links.discard(link.id)
            self._forget_if_idle(owner)
        program = self.programs.get(link.program)
        if program is not None:
            program.links.discard(link.id)
            self._end_program_if_free(program, ending)
        return ending

    def withdraw(self, *things: Program | Link) -> Ending:
        """End what was just made, all of it: a later step of its making has failed."""
        ending = Ending()
        for thing in things:
            if isinstance(thing, Link):
                self._end_link(thing, "deleted", ending)
            else:
                self._release_program(thing, "deleted", ending)
        return ending

    # The daemon's own end and beginning

    def end_all(self) -> Ending:
        """Everything ends: the daemon stops."""
        ending = Ending()
        for lease in list(self.leases):
            self._end_lease(lease.id, "shutdown", ending)
        for link in list(self.links):
            self._end_link(link, "shutdown", ending)
        for program in list(self.programs):
            program.holds = 0
            self._release_program(program, "shutdown", ending)
        return ending

    def restore(
        self,
        clients: Iterable[tuple[Client, Hashable]],
        leases: Iterable[Lease],
        maps: Iterable[Map],
        programs: Iterable[Program],
        links: Iterable[Link],
    ) -> Ending:
        """List what an earlier daemon left, and end what has lost its anchor meanwhile.

        ``clients`` are those whose process still lives, each with what tells it apart.
        """
        ending = Ending()
        for client, process in clients:
            self._list_client(client, process)
        for lease in leases:
            self.leases.add(lease)
            self._hold(lease.client, "leases", lease.id)
        for each in maps:
            self.maps.add(each)
            self.hand_over(each)  # the earlier daemon may have
        stranded: list[Program] = []
        for program in programs:
            self.programs.add(program)
            self._hold(program.client, "programs", program.id)
            for map_id in program.maps:
                if (used := self.maps.get(map_id)) is not None:
                    used.programs.add(program.id)
            if program.released is not None or self._has_anchor(program):
                self._bind(program, "" if program.released else program.anchor)
            else:
                stranded.append(program)
        for link in links:
            owner = self.programs.get(link.program)
            self.links.add(link)
            self._hold(link.client, "links", link.id)
            if owner is not None:
                owner.links.add(link.id)
            reason, link.detaching = link.detaching, None
            if reason is None and not self._has_anchor(link):
                reason = _LOST[link.lifetime.kind]
            if reason is None:
                self._bind(link, link.anchor)
            else:
                self._end_link(link, reason, ending)
        for program in stranded:
            self._release_program(program, _LOST[program.lifetime.kind], ending)
        for program in list(self.programs):
            self._end_program_if_free(program, ending)
        for client in list(self.clients):
            self._forget_if_idle(client)
        return ending

    def _has_anchor(self, thing: Program | Link) -> bool:
        """Connections never outlive the daemon."""
        return (
            not thing.anchor
            or self.clients.get(thing.anchor) is not None
            or self.leases.shelf.get(thing.anchor) is not None
        )

    def _hold(self, client: str, what: Literal["programs", "links", "leases"], id_: str) -> None:
        if (owner := self.clients.get(client)) is not None:
            held: set[str] = getattr(owner, what)
            held.add(id_)


#: Why something ended whose anchor did not live to see the daemon's next start.
_LOST: dict[str, Reason] = {
    "process": "client-gone",
    "connection": "connection-closed",
    "lease": "lease-expired",
}
