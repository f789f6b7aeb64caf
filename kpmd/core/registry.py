"""The one place that decides what exists, who sees it, and what ends what. Synchronous, no I/O.

A method that ends things takes them off the shelves at once and returns an ``Ending``: the records
whose file descriptors the caller must close now, links first. Nothing is in two Endings.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kpmd.core.model import Caller, Client, Link, Map, Program, new_id
from kpmd.core.shelf import Shelf
from kpmd.errors import Conflict, Gone, NotFound


@dataclass
class Ending:
    """What has ended, in the order in which it must be closed, and why."""

    reason: str
    links: list[Link] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.links or self.programs or self.maps)


Owned = TypeVar("Owned", Program, Map, Link, Client)


class Registry:
    """Clients, programs, maps and links, and the rules between them.

    - A link or program with lifetime ``process`` ends with its client; a ``persistent`` one when it
      is deleted.
    - A program outlives its own lifetime while a link uses it or is being made with it.
    - A map ends with the last program that uses it.
    """

    def __init__(self) -> None:
        self.clients: Shelf[Client] = Shelf(lambda client: [("uid", client.uid)])
        self.programs: Shelf[Program] = Shelf(lambda program: [("uid", program.uid)])
        self.maps: Shelf[Map] = Shelf(lambda each: [("uid", each.uid)])
        self.links: Shelf[Link] = Shelf(self._link_keys)
        self._live: dict[tuple[int, int, int], Client] = {}
        #: Called with each client that is listed no more, so that its process is no longer watched.
        self.on_forget: Callable[[Client], None] = lambda client: None

    @staticmethod
    def _link_keys(link: Link) -> list[Hashable]:
        return [("uid", link.uid), ("program", link.program), ("client", link.client)]

    # Who sees what

    @staticmethod
    def scope(caller: Caller) -> Hashable:
        """The index key of what the caller may list: all for administrators, else their own."""
        return None if caller.admin else ("uid", caller.uid)

    @staticmethod
    def sees(caller: Caller, record: Client | Program | Map | Link) -> bool:
        """Whether the caller may see and touch the record."""
        return caller.admin or caller.uid == record.uid

    def _visible(self, caller: Caller, shelf: Shelf[Owned], id_: str, what: str) -> Owned:
        record = shelf.get(id_)
        if record is None or not self.sees(caller, record):
            raise NotFound(f"there is no {what} {id_!r} that you may see; list yours with GET")
        return record

    def program(self, caller: Caller, id_: str) -> Program:
        """The program of that id; NotFound also when it is another user's."""
        return self._visible(caller, self.programs, id_, "program")

    def map(self, caller: Caller, id_: str) -> Map:
        """The map of that id; NotFound also when it is another user's."""
        return self._visible(caller, self.maps, id_, "map")

    def link(self, caller: Caller, id_: str) -> Link:
        """The link of that id; NotFound also when it is another user's."""
        return self._visible(caller, self.links, id_, "link")

    def client(self, caller: Caller, id_: str) -> Client:
        """The client of that id; NotFound also when it is another user's."""
        return self._visible(caller, self.clients, id_, "client")

    # Clients

    def find_client(self, pid: int, uid: int, gid: int) -> Client | None:
        """The client that this process has already, if it is known not to have ended."""
        return self._live.get((pid, uid, gid)) if pid else None

    def connect(self, pid: int, uid: int, gid: int, command: str, now: float) -> Client:
        """A new connection of a process: its client, made if this is the first."""
        client = self.find_client(pid, uid, gid)
        if client is None:
            client = Client(new_id("cli"), pid, uid, gid, command, now)
            self.clients.add(client)
            if pid:
                self._live[(pid, uid, gid)] = client
        client.connections += 1
        return client

    def begin_request(self, client: Client) -> None:
        """A request is under way: its client stays known, whatever becomes of the connection."""
        client.requests += 1

    def end_request(self, client: Client) -> None:
        """A request has been answered."""
        client.requests -= 1
        if not client.connections:
            self._forget_if_idle(client)

    def disconnect(self, client: Client) -> None:
        """One of its connections has closed; without connection and holding it is forgotten."""
        client.connections -= 1
        self._forget_if_idle(client)

    def _forget_if_idle(self, client: Client) -> None:
        if not (client.connections or client.requests or client.programs or client.links):
            self._unlist(client)

    def _unlist(self, client: Client) -> None:
        if self.clients.remove(client.id) is not None:
            self._live.pop((client.pid, client.uid, client.gid), None)
            self.on_forget(client)

    def end_client(self, client: Client) -> Ending:
        """The process has ended, however it ended: so do its things of lifetime ``process``."""
        if client.ended:
            return Ending("client gone")
        client.ended = "the process that opened this connection has ended"
        self._unlist(client)
        return self._release(client, "client gone", lambda held: held.lifetime.kind == "process")

    def release_client(self, client: Client) -> Ending:
        """Everything that the client holds, persistent things too: it asked, or was made to."""
        return self._release(client, "client released", lambda held: True)

    def _release(
        self, client: Client, reason: str, which: Callable[[Program | Link], bool]
    ) -> Ending:
        ending = Ending(reason)
        for id_ in sorted(client.links):
            link = self.links.get(id_)
            if link is not None and which(link):
                self._end_link(link, ending)
        for id_ in sorted(client.programs):
            program = self.programs.get(id_)
            if program is not None and which(program):
                program.released = True
                self._end_program_if_free(program, ending)
        return ending

    # Programs and maps

    def add_loaded(self, client: Client, programs: Sequence[Program], maps: Sequence[Map]) -> None:
        """List what was loaded for a client. Raises Gone when the client ended meanwhile."""
        for program in programs:
            self._check_alive(client, program)
        for each in maps:
            self.maps.add(each)
        for program in programs:
            self.programs.add(program)
            if not client.ended:
                client.programs.add(program.id)

    @staticmethod
    def _check_alive(client: Client, thing: Program | Link) -> None:
        if client.ended and thing.lifetime.kind == "process":
            raise Gone(
                f"{client.ended}, so nothing can live as long as it does; connect from a process "
                'that lives, or ask for the lifetime {"kind": "persistent"}'
            )

    def delete_program(self, caller: Caller, id_: str, force: bool) -> Ending:
        """End a program; with ``force`` its links first. Raises Conflict when it is in use."""
        program = self.program(caller, id_)
        if program.holds:
            raise Conflict(f"a link is being made with program {id_} right now; try again")
        if program.links and not force:
            raise Conflict(
                f"program {id_} has {len(program.links)} link(s); delete them first, "
                "or add ?force=true to detach them",
            )
        ending = Ending("deleted")
        program.released = True
        for link_id in sorted(program.links):
            link = self.links.get(link_id)
            if link is not None:
                self._end_link(link, ending)
        self._end_program_if_free(program, ending)
        return ending

    def _end_program_if_free(self, program: Program, ending: Ending) -> None:
        if not program.released or program.links or program.holds:
            return
        if self.programs.remove(program.id) is None:
            return
        ending.programs.append(program)
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
        """The program, kept from ending until ``add_link`` or ``let_go`` settles the hold."""
        program = self.program(caller, id_)
        program.holds += 1
        return program

    def let_go(self, program: Program) -> Ending:
        """No link came of it: the hold ends, and so may the program."""
        program.holds -= 1
        ending = Ending("client gone")
        self._end_program_if_free(program, ending)
        return ending

    def add_link(self, client: Client, program: Program, link: Link) -> None:
        """List a new link and settle the hold on its program.

        Raises Gone when the client ended meanwhile: the hold stays, and the caller lets it go.
        """
        self._check_alive(client, link)
        program.holds -= 1
        program.links.add(link.id)
        self.links.add(link)
        if not client.ended:
            client.links.add(link.id)

    def delete_link(self, caller: Caller, id_: str) -> Ending:
        """End a link, and its program when only this link kept it."""
        ending = Ending("deleted")
        self._end_link(self.link(caller, id_), ending)
        return ending

    def _end_link(self, link: Link, ending: Ending) -> None:
        if self.links.remove(link.id) is None:
            return
        ending.links.append(link)
        owner = self.clients.get(link.client)
        if owner is not None:
            owner.links.discard(link.id)
            self._forget_if_idle(owner)
        program = self.programs.get(link.program)
        if program is not None:
            program.links.discard(link.id)
            self._end_program_if_free(program, ending)

    def end_all(self) -> Ending:
        """Everything ends: the daemon stops."""
        ending = Ending("shutdown")
        for link in list(self.links):
            self._end_link(link, ending)
        for program in list(self.programs):
            program.released = True
            program.holds = 0
            self._end_program_if_free(program, ending)
        return ending
