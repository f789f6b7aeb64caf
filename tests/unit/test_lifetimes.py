"""Random orders of everything that can happen, against a model that is too simple to be wrong.

Whatever the order of creates, deletes, deaths, expiries and restarts: nothing is held without an
owner, nothing ends early, and every handle is closed exactly once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kpmd.core import carried
from kpmd.core.changes import Ending
from kpmd.core.holdings import LEAST_LENT
from kpmd.core.model import Client, Connection, Lease, Lifetime, Link, Map, Program
from kpmd.core.quotas import KEPT, UNLIMITED, Claim, Kept
from kpmd.core.registry import Registry
from kpmd.errors import Conflict, Gone, NotFound
from tests.unit.records import ROOT, a_lease, a_link, a_map, a_program

Kind = Literal["process", "connection", "lease", "persistent"]
KINDS = st.sampled_from(["process", "connection", "lease", "persistent"])


@dataclass(eq=False)
class Process:
    """A process and what the registry knows it as, for now."""

    number: int
    client: Client
    alive: bool = True


@dataclass(eq=False)
class Anchor:
    """A process, a connection or a lease, as far as lifetimes go; None of them: persistent."""

    alive: bool = True


@dataclass(eq=False)
class Thing:
    """What there should be: a program or a link."""

    record: Program | Link
    maker: str
    anchor: Anchor
    deleted: bool = False
    #: Programs: in the hands of requests.
    holds: int = 0

    @property
    def over(self) -> bool:
        """Its own lifetime is."""
        return self.deleted or not self.anchor.alive


@dataclass
class Model:
    """Everything, by id."""

    programs: dict[str, Thing] = field(default_factory=dict)
    links: dict[str, Thing] = field(default_factory=dict)
    leases: dict[str, Anchor] = field(default_factory=dict)

    def links_of(self, program: str) -> list[Thing]:
        return [
            link
            for link in self.links.values()
            if isinstance(link.record, Link) and link.record.program == program
        ]


FOREVER = Anchor()


class Machine(RuleBasedStateMachine):
    """Random calls, each followed by a look at everything."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.model = Model()
        self.processes: dict[int, Process] = {}
        self.connections: list[tuple[Connection, Anchor]] = []
        self.process_anchors: dict[str, Anchor] = {}
        #: Handles of the kernel: open ones, and all there ever were.
        self.open: set[str] = set()
        self.ever: set[str] = set()
        #: Links that have ended, and that the kernel still holds.
        self.closing: list[Link] = []
        self.held: list[Program] = []
        #: What requests under way have claimed, by user.
        self.claims: list[tuple[int, dict[str, int], Claim]] = []
        self.asking: list[Client] = []
        #: Maps that clients may hold; and what each counts for that has ended, with its user.
        self.handed: set[str] = set()
        self.lent: dict[str, tuple[int, int]] = {}
        #: Clients whose state is stored: those that have held something.
        self.begin(Registry())

    def begin(self, registry: Registry) -> None:
        self.registry = registry
        registry.on_forget = lambda client: self.forgotten.append(client.id)
        self.forgotten: list[str] = []

    # Handles

    def opened(self, id_: str) -> None:
        assert id_ not in self.ever
        self.open.add(id_)
        self.ever.add(id_)

    def closed(self, id_: str) -> None:
        assert id_ in self.open, "closed twice, or never opened"
        self.open.remove(id_)

    def take(self, ending: Ending) -> None:
        """Close what is closed at once, and queue the links, as the daemon does."""
        for link in ending.links:
            assert link not in self.closing
            assert link.id in self.open
            self.closing.append(link)
        for program in ending.programs:
            thing = self.model.programs.pop(program.id)
            assert thing.over, "ended early"
            assert not thing.holds
            assert not self.model.links_of(program.id), "a link needs it"
            self.closed(program.id)
        for each in ending.maps:
            self.closed(each.id)
            if each.id in self.handed:
                self.handed.remove(each.id)
                self.lent[each.id] = each.uid, max(each.memory, LEAST_LENT)

    # What happens

    @rule(number=st.integers(1, 3), uid=st.integers(0, 1))
    def connect(self, number: int, uid: int) -> None:
        known = self.processes.get(number)
        if known is not None and known.client.uid != uid:
            return
        connection = self.registry.connect(number, number, uid, uid, "x", self.now)
        if known is None:
            known = self.processes[number] = Process(number, connection.client)
            self.process_anchors[connection.client.id] = Anchor()
        if connection.client is not known.client:
            # Forgotten meanwhile, as it held nothing; or known to an earlier daemon.
            assert known.client.id in self.forgotten or known.client.id not in {
                each.id for each in self.registry.clients
            }
            known.client = connection.client
            self.process_anchors[connection.client.id] = Anchor()
        self.connections.append((connection, Anchor()))

    def a_connection(self, data: st.DataObject) -> tuple[Connection, Anchor] | None:
        return data.draw(st.sampled_from(self.connections)) if self.connections else None

    @precondition(lambda self: self.connections)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.connections) - 1))
        connection, anchor = self.connections.pop(place)
        anchor.alive = False
        self.take(self.registry.disconnect(connection))

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A process ends. Its connections close by themselves, before or after."""
        process = self.processes.pop(data.draw(st.sampled_from(sorted(self.processes))))
        self.process_anchors[process.client.id].alive = False
        if self.registry.clients.get(process.client.id) is not None:
            self.take(self.registry.end_client(process.client))

    @precondition(lambda self: self.connections)
    @rule(data=st.data())
    def begin_request(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.connections))[0].client
        self.registry.begin_request(client)
        self.asking.append(client)

    @precondition(lambda self: self.asking)
    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        """Its connection may have closed, and its process ended, meanwhile."""
        place = data.draw(st.integers(0, len(self.asking) - 1))
        self.registry.end_request(self.asking.pop(place))

    @precondition(lambda self: self.connections)
    @rule(data=st.data(), ttl=st.integers(1, 5))
    def create_lease(self, data: st.DataObject, ttl: int) -> None:
        client = data.draw(st.sampled_from(self.connections))[0].client
        lease = a_lease(client, ttl, self.now)
        self.registry.create_lease(client, lease)
        self.model.leases[lease.id] = Anchor()

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data(), end=st.booleans())
    def renew_or_end_lease(self, data: st.DataObject, end: bool) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.leases)))
        if not self.model.leases[id_].alive:
            with pytest.raises((Gone, NotFound)):
                self.registry.renew_lease(ROOT, id_, None, self.now)
        elif end:
            self.model.leases[id_].alive = False
            self.take(self.registry.end_lease(ROOT, id_, self.now))
        else:
            self.registry.renew_lease(ROOT, id_, None, self.now)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        for lease in self.registry.leases:
            if lease.deadline <= self.now:
                self.model.leases[lease.id].alive = False
        self.take(self.registry.expire(self.now))

    def a_lifetime(
        self, data: st.DataObject, kind: Kind, connection: Connection, anchor: Anchor
    ) -> tuple[Lifetime, Anchor]:
        if kind == "process":
            return Lifetime(kind), self.process_anchors[connection.client.id]
        if kind == "connection":
            return Lifetime(kind), anchor
        if kind == "lease" and self.model.leases:
            id_ = data.draw(st.sampled_from(sorted(self.model.leases)))
            return Lifetime("lease", id_), self.model.leases[id_]
        return Lifetime("persistent"), FOREVER

    @precondition(lambda self: self.connections)
    @rule(data=st.data(), kind=KINDS, count=st.integers(1, 2), late=st.booleans())
    def load(self, data: st.DataObject, kind: Kind, count: int, late: bool) -> None:
        """``late``: the connection has closed while it was being loaded."""
        connection, anchor = data.draw(st.sampled_from(self.connections))
        client = connection.client
        lifetime, anchor = self.a_lifetime(data, kind, connection, anchor)
        self.registry.begin_request(client)
        if late:
            self.close(connection)
        shared = a_map(client.uid)
        programs = [a_program(connection, lifetime, (shared.id,)) for _ in range(count)]
        shared.programs.update(program.id for program in programs)
        claim = self.a_claim(client, programs=count, map_bytes=shared.memory)
        if anchor.alive:
            self.registry.add_loaded(ROOT, connection, programs, [shared], self.now, claim)
            self.opened(shared.id)
            for program in programs:
                self.opened(program.id)
                self.model.programs[program.id] = Thing(program, client.id, anchor)
        else:
            with pytest.raises((Gone, NotFound)):
                self.registry.add_loaded(ROOT, connection, programs, [shared], self.now, claim)
            claim.release()
        self.registry.end_request(client)

    @rule(uid=st.integers(0, 1), what=st.sampled_from(KEPT), number=st.integers(0, 3))
    def claim(self, uid: int, what: Kept, number: int) -> None:
        """A request is about to make something; of another it is found out how much."""
        if self.claims and self.claims[-1][0] == uid:
            _, claimed, claim = self.claims[-1]
        else:
            claimed, claim = {}, self.registry.accounts.claim(uid, UNLIMITED)
            self.claims.append((uid, claimed, claim))
        claim.want(what, number)
        claimed[what] = number

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release_claim(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.claims) - 1))
        self.claims.pop(place)[2].release()

    def a_claim(self, client: Client, **wanted: int) -> Claim:
        """That of a request for what is made next."""
        claim = self.registry.accounts.claim(client.uid, UNLIMITED)
        for what in KEPT:
            if what in wanted:
                claim.want(what, wanted[what])
        return claim

    def close(self, connection: Connection) -> None:
        for place, (each, anchor) in enumerate(self.connections):
            if each is connection:
                del self.connections[place]
                anchor.alive = False
                self.take(self.registry.disconnect(connection))
                return

    @precondition(lambda self: self.model.programs)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.programs)))
        if self.model.programs[id_].record.released == "deleted":  # type: ignore[union-attr]
            with pytest.raises(Conflict):
                self.registry.hold_program(ROOT, id_)
            return
        self.held.append(self.registry.hold_program(ROOT, id_))
        self.model.programs[id_].holds += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        program = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.model.programs[program.id].holds -= 1
        self.take(self.registry.let_go(program))

    @precondition(lambda self: self.held and self.connections)
    @rule(data=st.data(), kind=KINDS, size=st.integers(1, 3))
    def attach(self, data: st.DataObject, kind: Kind, size: int = 1) -> None:
        connection, anchor = data.draw(st.sampled_from(self.connections))
        lifetime, anchor = self.a_lifetime(data, kind, connection, anchor)
        program = self.held[-1]
        link = a_link(connection, program, lifetime, size)
        claim = self.a_claim(connection.client, links=1, targets=size)
        if not anchor.alive:
            with pytest.raises((Gone, NotFound)):
                self.registry.add_link(ROOT, connection, program, link, self.now, claim)
            claim.release()
            return
        self.held.pop()
        self.registry.add_link(ROOT, connection, program, link, self.now, claim)
        self.opened(link.id)
        self.model.programs[program.id].holds -= 1
        self.model.links[link.id] = Thing(link, connection.client.id, anchor)

    @precondition(lambda self: self.model.programs and self.connections)
    @rule(data=st.data(), kind=KINDS)
    def hold_and_attach(self, data: st.DataObject, kind: Kind) -> None:
        if not self.model.programs:
            return
        held = len(self.held)
        self.hold(data)
        if len(self.held) > held:
            self.attach(data, kind)
            if len(self.held) > held:
                self.model.programs[self.held[-1].id].holds -= 1
                self.take(self.registry.let_go(self.held.pop()))

    @rule(data=st.data(), number=st.integers(1, 3), program=KINDS, link=KINDS)
    def make_all(self, data: st.DataObject, number: int, program: Kind, link: Kind) -> None:
        """What most clients do, in one go: else long histories with links would be rare."""
        uid = self.processes[number].client.uid if number in self.processes else 0
        self.connect(number, uid)
        if "lease" in (program, link):
            self.create_lease(data, 2)
        self.load(data, program, 1, late=False)
        self.hold_and_attach(data, link)

    @precondition(lambda self: self.model.links)
    @rule(data=st.data())
    def delete_link(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.links)))
        self.model.links[id_].deleted = True
        self.take(self.registry.delete_link(ROOT, id_))
        assert not self.registry.delete_link(ROOT, id_)

    @precondition(lambda self: self.model.programs)
    @rule(data=st.data(), force=st.booleans())
    def delete_program(self, data: st.DataObject, force: bool) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.programs)))
        program = self.model.programs[id_]
        attached = [link for link in self.model.links_of(id_) if not link.over]
        if program.holds or (attached and not force):
            with pytest.raises(Conflict):
                self.registry.delete_program(ROOT, id_, force)
            return
        program.deleted = True
        for link in attached:
            link.deleted = True
        self.take(self.registry.delete_program(ROOT, id_, force))

    @precondition(lambda self: len(self.registry.clients) > 0)
    @rule(data=st.data())
    def release_client(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(list(self.registry.clients)))
        for id_ in client.leases:
            self.model.leases[id_].alive = False
        for thing in [*self.model.links.values(), *self.model.programs.values()]:
            thing.deleted |= thing.maker == client.id
        self.take(self.registry.release_client(client))

    @precondition(lambda self: len(self.registry.maps) > 0)
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(list(self.registry.maps)))
        self.registry.hand_over(each)
        self.handed.add(each.id)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def returned(self, data: st.DataObject) -> None:
        """Nobody holds a map any more that was handed over."""
        id_ = data.draw(st.sampled_from(sorted(self.lent)))
        self.registry.returned(id_)
        del self.lent[id_]

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def detached(self, data: st.DataObject) -> None:
        """The kernel has let go of a link, in whatever order."""
        link = self.closing.pop(data.draw(st.integers(0, len(self.closing) - 1)))
        self.closed(link.id)
        del self.model.links[link.id]
        self.take(self.registry.detached(link))

    @rule(data=st.data(), seconds=st.integers(0, 3))
    def restart(self, data: st.DataObject, seconds: int) -> None:
        """The daemon ends, and a new one finds what the old one stored; some clients have died."""
        old = self.registry
        clients = [_again(client) for client in old.clients if _holds(client)]
        leases = [_again(lease) for lease in old.leases]
        maps: dict[str, Map] = {}
        programs = []
        for program in old.programs:
            own = tuple(each for each in old.maps if each.id in program.maps)
            programs.append(_again(program, own))
            maps |= {each.id: each for each in _maps_again(program, own)}
        links = [_again(link) for link in old.links if link.lifetime.kind != "connection"]
        # The kernel itself ends what only the old daemon held.
        for link in old.links:
            if link.lifetime.kind == "connection":
                self.closed(link.id)
                del self.model.links[link.id]
        for _, anchor in self.connections:
            anchor.alive = False
        self.connections, self.closing, self.held, self.asking = [], [], [], []
        self.claims = []
        for number in (
            data.draw(st.sets(st.sampled_from(sorted(self.processes)))) if self.processes else ()
        ):
            self.process_anchors[self.processes.pop(number).client.id].alive = False
        self.now += seconds
        # What clients hold of what had ended nobody knows any more; of the rest they may hold all.
        self.lent = {}
        self.handed = set(maps)
        self.begin(Registry())
        numbers = {process.client.id: number for number, process in self.processes.items()}
        for thing in self.model.programs.values():
            thing.holds = 0
        found = [(each, numbers[each.id]) for each in clients if each.id in numbers]
        for client, number in found:
            self.processes[number].client = client
        for program in programs:
            self.model.programs[program.id].record = program
        for link in links:
            self.model.links[link.id].record = link
        self.take(self.registry.restore(found, leases, maps.values(), programs, links))
        self.time_passes(0)

    # What must be true at all times

    @invariant()
    def what_there_should_be_is_there(self) -> None:
        registry, model = self.registry, self.model
        assert {link.id for link in registry.links} == set(model.links)
        for link in registry.links:
            assert (link.detaching is not None) == model.links[link.id].over
            assert (link in self.closing) == model.links[link.id].over
        expected = {
            id_
            for id_, program in model.programs.items()
            if not program.over or program.holds or model.links_of(id_)
        }
        assert {program.id for program in registry.programs} == expected == set(model.programs)
        for program in registry.programs:
            assert program.links == {link.record.id for link in model.links_of(program.id)}
            assert (program.released is not None) == model.programs[program.id].over
        maps = {map_id for program in registry.programs for map_id in program.maps}
        assert {each.id for each in registry.maps} == maps
        for each in registry.maps:
            assert each.programs == {
                program.id for program in registry.programs if each.id in program.maps
            }

    @invariant()
    def what_is_open_is_what_is_listed(self) -> None:
        registry = self.registry
        listed = [*registry.links, *registry.programs, *registry.maps]
        assert {each.id for each in listed} == self.open

    @invariant()
    def what_is_counted_is_what_is_listed_and_claimed(self) -> None:
        registry = self.registry
        for uid in (0, 1):
            links = [link for link in registry.links if link.uid == uid]
            expected = Counter(
                programs=sum(each.uid == uid for each in registry.programs),
                links=len(links),
                targets=sum(len(link.targets) for link in links),
                map_bytes=sum(each.memory for each in registry.maps if each.uid == uid)
                + sum(memory for owner, memory in self.lent.values() if owner == uid),
                leases=sum(lease.uid == uid for lease in registry.leases),
            )
            for owner, claimed, _ in self.claims:
                if owner == uid:
                    expected.update(claimed)
            assert registry.accounts.used(uid) == expected

    @invariant()
    def what_is_lent_has_ended(self) -> None:
        assert self.registry.lent == self.lent
        assert self.registry.handed == self.handed <= {each.id for each in self.registry.maps}

    @invariant()
    def what_is_bound_is_what_has_not_ended(self) -> None:
        things: list[Thing] = [*self.model.links.values(), *self.model.programs.values()]
        anchors = {each.record.anchor for each in things} | self.model.leases.keys()
        for anchor in anchors - {""}:
            assert {each.id for each in self.registry.bound(anchor)} == {
                each.record.id for each in things if each.record.anchor == anchor and not each.over
            }

    @invariant()
    def leases_are_there_until_they_end(self) -> None:
        assert {lease.id for lease in self.registry.leases} == {
            id_ for id_, anchor in self.model.leases.items() if anchor.alive
        }

    @invariant()
    def clients_are_listed_as_long_as_they_matter(self) -> None:
        listed = {client.id: client for client in self.registry.clients}
        for process in self.processes.values():
            client = process.client
            links = {id_ for id_, each in self.model.links.items() if each.maker == client.id}
            programs = {id_ for id_, each in self.model.programs.items() if each.maker == client.id}
            leases = {lease.id for lease in self.registry.leases if lease.client == client.id}
            busy = any(each.client is client for each, _ in self.connections)
            busy |= any(client is each for each in self.asking)
            assert (client.id in listed) == bool(busy or links or programs or leases)
            if client.id in listed:
                assert (client.links, client.programs, client.leases) == (links, programs, leases)
        assert set(listed) <= {process.client.id for process in self.processes.values()}

    def teardown(self) -> None:
        for thing in [*self.model.links.values(), *self.model.programs.values()]:
            thing.deleted, thing.holds = True, 0
        for anchor in self.model.leases.values():
            anchor.alive = False
        self.held = []
        self.take(self.registry.end_all())
        while self.closing:
            link = self.closing.pop()
            self.closed(link.id)
            del self.model.links[link.id]
            self.take(self.registry.detached(link))
        assert not self.open
        assert len(self.registry.links) == len(self.registry.programs) == 0
        assert len(self.registry.maps) == len(self.registry.leases) == 0


def _holds(client: Client) -> bool:
    return bool(client.links or client.programs or client.leases)


R = TypeVar("R", Client, Lease, Program, Link)


def _again(record: R, maps: tuple[Map, ...] = ()) -> R:
    """A record, stored by one daemon and read by the next."""
    content = carried.read(carried.head(record), carried.body(record, maps))
    assert isinstance(content.record, type(record))
    return content.record


def _maps_again(program: Program, maps: tuple[Map, ...]) -> tuple[Map, ...]:
    """The maps of a program, stored with it."""
    content = carried.read(carried.head(program), carried.body(program, maps))
    return content.maps


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
