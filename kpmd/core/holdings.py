"""Everything that there is, and who sees what of it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from kpmd.core.leases import Leases
from kpmd.core.model import Caller, Client, Lease, Link, Map, Program
from kpmd.core.shelf import Shelf
from kpmd.errors import NotFound

Owned = TypeVar("Owned", Program, Map, Link, Client)


class Holdings:
    """The records, by id and as they are listed. Another user's are not there for who asks."""

    def __init__(self) -> None:
        self.clients: Shelf[Client] = Shelf(lambda client: [("uid", client.uid)])
        self.programs: Shelf[Program] = Shelf(lambda program: [("uid", program.uid)])
        self.maps: Shelf[Map] = Shelf(lambda each: [("uid", each.uid)])
        self.links: Shelf[Link] = Shelf(self._link_keys)
        self.leases = Leases()

    @staticmethod
    def _link_keys(link: Link) -> list[Hashable]:
        keys: list[Hashable] = [
            ("uid", link.uid),
            ("program", link.program),
            ("client", link.client),
        ]
        if link.lifetime.kind == "lease":
            keys.append(("lease", link.lifetime.lease))
        return keys

    @staticmethod
    def scope(caller: Caller) -> Hashable:
        """The index key of what the caller may list: all for administrators, else their own."""
        return None if caller.admin else ("uid", caller.uid)

    @staticmethod
    def sees(caller: Caller, record: Client | Program | Map | Link | Lease) -> bool:
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

    def lease(self, caller: Caller, id_: str, now: float) -> Lease:
        """The lease of that id. Raises Gone when it has ended, NotFound also for another user's."""
        return self.leases.get(caller, id_, now)
