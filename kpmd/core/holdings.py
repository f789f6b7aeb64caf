"""Everything that there is, and who sees what of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import TypeVar

from kpmd.core.leases import Leases
from kpmd.core.model import Caller, Client, Lease, Link, Map, Program
from kpmd.core.quotas import Accounts
from kpmd.core.shelf import Shelf
from kpmd.errors import Forbidden, NotFound

Owned = TypeVar("Owned", Program, Map, Link, Client)

#: Bytes that a map counts for at the least once only clients hold it. However small it is, the
#: kernel keeps the BTF of its object with it, and no number of programs bounds that of such maps.
LEAST_LENT = 1 << 20


class Holdings:
    """The records, by id and as they are listed. Another user's are not there for who asks."""

    def __init__(self) -> None:
        self.clients: Shelf[Client] = Shelf(lambda client: [("uid", client.uid)])
        self.programs: Shelf[Program] = Shelf(lambda program: [("uid", program.uid)])
        self.maps: Shelf[Map] = Shelf(lambda each: [("uid", each.uid)])
        self.links: Shelf[Link] = Shelf(self._link_keys)
        self.leases = Leases()
        self.accounts = Accounts()
        #: Links, and the functions that they are attached to, by kind and mechanism.
        self.links_of: Counter[tuple[str, str]] = Counter()
        self.targets_of: Counter[tuple[str, str]] = Counter()
        #: Ids of maps of which clients may hold a file descriptor.
        self.handed: set[str] = set()
        #: Those of them that have ended here: whose they are, and how many bytes they count for.
        self.lent: dict[str, tuple[int, int]] = {}
        # Nothing is listed that is not counted: where records come and go, the sums do.
        count = self.accounts.add
        self.programs.on_count = lambda program, sign: count(program.uid, "programs", sign)
        self.maps.on_count = self._count_map
        self.links.on_count = self._count_link
        self.leases.shelf.on_count = lambda lease, sign: count(lease.uid, "leases", sign)

    def _count_map(self, each: Map, sign: int) -> None:
        change = sign * each.memory
        if sign < 0 and each.id in self.handed:
            self.handed.discard(each.id)
            kept = max(each.memory, LEAST_LENT)
            self.lent[each.id] = each.uid, kept
            change += kept
        self.accounts.add(each.uid, "map_bytes", change)

    def hand_over(self, each: Map) -> None:
        """Clients may hold the map from now on: its memory counts until it is ``returned``."""
        self.handed.add(each.id)

    def returned(self, id_: str) -> None:
        """Nobody holds a map that was handed over and has ended."""
        uid, memory = self.lent.pop(id_)
        self.accounts.add(uid, "map_bytes", -memory)

    def _count_link(self, link: Link, sign: int) -> None:
        self.accounts.add(link.uid, "links", sign)
        self.accounts.add(link.uid, "targets", sign * len(link.targets))
        self.links_of[link.kind, link.mechanism] += sign
        self.targets_of[link.kind, link.mechanism] += sign * len(link.targets)

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
        """The index key of what the caller may list: all, or their own."""
        return None if caller.reads_others else ("uid", caller.uid)

    @staticmethod
    def sees(caller: Caller, record: Client | Program | Map | Link | Lease) -> bool:
        """Whether the caller may see the record."""
        return caller.reads_others or caller.uid == record.uid

    def _visible(
        self, caller: Caller, shelf: Shelf[Owned], id_: str, what: str, touch: bool
    ) -> Owned:
        record = shelf.get(id_)
        if record is None or not self.sees(caller, record):
            raise NotFound(
                f"there is no {what} {id_!r} that you may see; list yours with GET /{what}s"
            )
        if touch:
            check_touch(caller, record.uid, f"{what} {id_}")
        return record

    def program(self, caller: Caller, id_: str, *, touch: bool = False) -> Program:
        """The program of that id, to be read, or changed or used (``touch``).

        NotFound also when it is another user's; Forbidden when the caller may only read it.
        """
        return self._visible(caller, self.programs, id_, "program", touch)

    def map(self, caller: Caller, id_: str, *, touch: bool = False) -> Map:
        """The map of that id, to be read, or written to or taken from (``touch``).

        NotFound also when it is another user's; Forbidden when the caller may only read it.
        """
        return self._visible(caller, self.maps, id_, "map", touch)

    def link(self, caller: Caller, id_: str, *, touch: bool = False) -> Link:
        """The link of that id, to be read, or changed or used (``touch``).

        NotFound also when it is another user's; Forbidden when the caller may only read it.
        """
        return self._visible(caller, self.links, id_, "link", touch)

    def client(self, caller: Caller, id_: str, *, touch: bool = False) -> Client:
        """The client of that id, to be read, or changed or used (``touch``).

        NotFound also when it is another user's; Forbidden when the caller may only read it.
        """
        return self._visible(caller, self.clients, id_, "client", touch)

    def lease(self, caller: Caller, id_: str, now: float, *, touch: bool = False) -> Lease:
        """The lease of that id, to be read, or changed or used (``touch``).

        Raises Gone when it has ended, NotFound also for another user's, and Forbidden when the
        caller may only read it.
        """
        lease = self.leases.get(caller, id_, now)
        if touch:
            check_touch(caller, lease.uid, f"lease {id_}")
        return lease


def check_touch(caller: Caller, uid: int, what: str) -> None:
    """Raise Forbidden where a user who may read what is others' would change it."""
    if not caller.admin and caller.uid != uid:
        raise Forbidden(
            f"{what} is another user's: the policy's rule {caller.rule_name!r} lets you read it, "
            "and no more",
            rule=caller.rule_name,
        )
