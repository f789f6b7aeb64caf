"""The registry against a model of its rules that is too simple to be wrong."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kpmd.core.model import Caller, Client, Lifetime, Link, Map, Program, Targets
from kpmd.core.registry import Ending, Registry
from kpmd.errors import Conflict, Gone, NotFound

ROOT = Caller(0, 0, 1, admin=True)
Kind = Literal["process", "persistent"]

_numbers = itertools.count()


def an_id(prefix: str) -> str:
    """Ids in order: what is drawn from a sorted list of them must not be left to chance."""
    return f"{prefix}-{next(_numbers):010}"


def a_program(client: Client, kind: Kind = "process", maps: tuple[str, ...] = ()) -> Program:
    return Program(
        id=an_id("prg"),
        kernel_id=1,
        name="p",
        tag="",
        attach="kprobe_multi",
        mechanism="kprobe_multi",
        uid=client.uid,
        user=None,
        client=client.id,
        lifetime=Lifetime(kind),
        maps=maps,
        labels={},
        created_at=0,
        verified_instructions=0,
        jited_bytes=0,
    )


def a_map(uid: int) -> Map:
    return Map(an_id("map"), 1, "m", "hash", 8, 8, 1, uid, False)


def a_link(client: Client, program: Program, kind: Kind = "process") -> Link:
    return Link(
        id=an_id("lnk"),
        kernel_id=1,
        program=program.id,
        kind="kprobe",
        mechanism="kprobe_multi",
        count=1,
        skipped=(),
        uid=client.uid,
        user=None,
        client=client.id,
        lifetime=Lifetime(kind),
        labels={},
        created_at=0,
        targets=Targets(("f",), array("Q"), array("Q", [0]), {}),
    )


@pytest.fixture
def registry() -> Registry:
    return Registry()


def connect(registry: Registry, pid: int = 10, uid: int = 1000) -> Client:
    return registry.connect(pid, uid, uid, "test", 0.0)


def load(registry: Registry, client: Client, kind: Kind = "process") -> Program:
    program = a_program(client, kind)
    registry.add_loaded(client, [program], [])
    return program


def attach(registry: Registry, client: Client, program: Program, kind: Kind = "process") -> Link:
    registry.hold_program(ROOT, program.id)
    link = a_link(client, program, kind)
    registry.add_link(client, program, link)
    return link


def test_things_are_ended_links_first(registry: Registry) -> None:
    client = connect(registry)
    shared = a_map(client.uid)
    program = a_program(client, maps=(shared.id,))
    shared.programs.add(program.id)
    registry.add_loaded(client, [program], [shared])
    link = attach(registry, client, program)
    ending = registry.end_client(client)
    assert (ending.links, ending.programs, ending.maps) == ([link], [program], [shared])
    assert ending.reason == "client gone"
    assert not registry.end_client(client)
    assert len(registry.clients) == len(registry.links) == len(registry.programs) == 0


def test_nothing_new_can_be_bound_to_an_ended_client(registry: Registry) -> None:
    client, other = connect(registry), connect(registry, 11)
    program = load(registry, other)
    registry.end_client(client)
    with pytest.raises(Gone):
        registry.add_loaded(client, [a_program(client)], [])
    registry.hold_program(ROOT, program.id)
    with pytest.raises(Gone):
        registry.add_link(client, program, a_link(client, program))
    assert program.holds == 1
    assert not registry.let_go(program)
    assert program.holds == 0
    # What lives on by itself may still come of it.
    registry.add_loaded(client, [a_program(client, "persistent")], [])
    assert len(registry.programs) == 2


def test_a_load_of_which_one_part_cannot_be_bound_lists_nothing(registry: Registry) -> None:
    client = connect(registry)
    registry.end_client(client)
    parts = [a_program(client, "persistent"), a_program(client, "process")]
    with pytest.raises(Gone):
        registry.add_loaded(client, parts, [a_map(client.uid)])
    assert len(registry.programs) == len(registry.maps) == 0


def test_a_hold_keeps_a_released_program(registry: Registry) -> None:
    client, other = connect(registry), connect(registry, 11)
    program = load(registry, client)
    registry.hold_program(ROOT, program.id)
    assert not registry.end_client(client)
    with pytest.raises(Conflict):
        registry.delete_program(ROOT, program.id, force=True)
    link = a_link(other, program)
    registry.add_link(other, program, link)
    ending = registry.delete_link(ROOT, link.id)
    assert (ending.links, ending.programs) == ([link], [program])


def test_letting_go_of_a_released_program_ends_it(registry: Registry) -> None:
    client = connect(registry)
    program = load(registry, client)
    registry.hold_program(ROOT, program.id)
    registry.hold_program(ROOT, program.id)
    registry.end_client(client)
    assert not registry.let_go(program)
    assert registry.let_go(program).programs == [program]


def test_shutting_down_ends_held_programs_once(registry: Registry) -> None:
    client = connect(registry)
    program = load(registry, client)
    registry.hold_program(ROOT, program.id)
    assert registry.end_all().programs == [program]
    assert not registry.let_go(program)


@pytest.mark.parametrize("what", ["program", "map", "link", "client"])
def test_another_users_things_are_not_found(registry: Registry, what: str) -> None:
    client = connect(registry, uid=1000)
    shared = a_map(client.uid)
    program = a_program(client, maps=(shared.id,))
    registry.add_loaded(client, [program], [shared])
    link = attach(registry, client, program)
    id_ = {"program": program.id, "map": shared.id, "link": link.id, "client": client.id}[what]
    find: Callable[[Caller, str], object] = getattr(registry, what)
    find(Caller(1000, 5, 99, admin=False), id_)
    find(ROOT, id_)
    with pytest.raises(NotFound) as his:
        find(Caller(1001, 1000, 10, admin=False), id_)
    with pytest.raises(NotFound) as none:
        find(ROOT, "x" + id_[1:])
    assert his.value.detail.replace(id_, "") == none.value.detail.replace("x" + id_[1:], "")


def test_what_a_client_holds_is_what_is_there(registry: Registry) -> None:
    client = connect(registry)
    program = load(registry, client)
    links = [attach(registry, client, program) for _ in range(3)]
    registry.delete_link(ROOT, links[1].id)
    assert client.links == {links[0].id, links[2].id}
    registry.delete_program(ROOT, program.id, force=True)
    assert not client.links
    assert not client.programs
    assert list(registry.clients) == [client]


def test_the_same_number_of_another_user_is_another_client(registry: Registry) -> None:
    assert connect(registry, 10, 1) is not connect(registry, 10, 2)
    assert connect(registry, 10, 1) is connect(registry, 10, 1)


def test_processes_that_cannot_be_seen_are_never_taken_for_each_other(registry: Registry) -> None:
    assert connect(registry, 0) is not connect(registry, 0)


def test_who_is_forgotten_is_told_once(registry: Registry) -> None:
    told: list[Client] = []
    registry.on_forget = told.append
    client = connect(registry)
    program = load(registry, client)
    registry.disconnect(client)
    assert told == []
    registry.delete_program(ROOT, program.id, force=False)
    assert told == [client]
    registry.end_client(client)
    assert told == [client]


@dataclass
class Model:
    """What there should be."""

    programs: dict[str, ModelProgram] = field(default_factory=dict)
    links: dict[str, ModelLink] = field(default_factory=dict)


@dataclass
class ModelProgram:
    client: Client
    kind: Kind
    map: str
    holds: int = 0
    released: bool = False


@dataclass
class ModelLink:
    client: Client
    program: str
    kind: Kind
    over: bool = False


class Machine(RuleBasedStateMachine):
    """Random calls, each followed by a look at everything."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry()
        self.forgotten: list[str] = []
        self.registry.on_forget = lambda client: self.forgotten.append(client.id)
        self.clients: list[Client] = []
        self.ended: set[str] = set()
        self.open: dict[str, int] = {}
        self.model = Model()
        self.held: list[Program] = []
        self.gone: list[str] = []
        self.asking: list[Client] = []

    def settle(self, ending: Ending) -> None:
        """Apply the rules to the model, and compare what ended with the ``Ending``."""
        model = self.model
        before = self.everything()
        model.links = {id_: link for id_, link in model.links.items() if not link.over}
        used = {link.program for link in model.links.values()}
        model.programs = {
            id_: program
            for id_, program in model.programs.items()
            if not program.released or program.holds or id_ in used
        }
        told = [
            *(each.id for each in ending.links),
            *(each.id for each in ending.programs),
            *(each.id for each in ending.maps),
        ]
        assert sorted(told) == sorted(before - self.everything())
        assert not set(told) & set(self.gone), "in two Endings"
        self.gone += told

    def everything(self) -> set[str]:
        maps = {program.map for program in self.model.programs.values()}
        return {*self.model.links, *self.model.programs, *maps}

    @rule(pid=st.integers(1, 4), uid=st.integers(0, 1))
    def connect(self, pid: int, uid: int) -> None:
        client = self.registry.connect(pid, uid, uid, "x", 0.0)
        if all(client is not each for each in self.clients):
            self.clients.append(client)
            self.open[client.id] = 0
        assert client.id not in self.ended
        self.open[client.id] += 1

    def pick(self, data: st.DataObject, ended: bool) -> Client | None:
        clients = [
            client
            for client in self.clients
            if (client.id in self.ended and ended)
            or self.open[client.id] > 0
            or (ended and any(client is each for each in self.asking))
        ]
        return data.draw(st.sampled_from(clients)) if clients else None

    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        client = self.pick(data, ended=False)
        if client is not None:
            self.registry.disconnect(client)
            self.open[client.id] -= 1

    @rule(data=st.data())
    def begin_request(self, data: st.DataObject) -> None:
        client = self.pick(data, ended=False)
        if client is not None:
            self.registry.begin_request(client)
            self.asking.append(client)

    @precondition(lambda self: self.asking)
    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        """Its connection may have closed, and its process ended, meanwhile."""
        position = data.draw(st.integers(0, len(self.asking) - 1))
        self.registry.end_request(self.asking.pop(position))

    @rule(data=st.data(), kind=st.sampled_from(["process", "persistent"]), count=st.integers(1, 3))
    def load(self, data: st.DataObject, kind: Kind, count: int) -> None:
        client = self.pick(data, ended=True)
        if client is None:
            return
        shared = a_map(client.uid)
        programs = [a_program(client, kind, (shared.id,)) for _ in range(count)]
        shared.programs.update(program.id for program in programs)
        if client.id in self.ended and kind == "process":
            with pytest.raises(Gone):
                self.registry.add_loaded(client, programs, [shared])
            return
        self.registry.add_loaded(client, programs, [shared])
        for program in programs:
            self.model.programs[program.id] = ModelProgram(client, kind, shared.id)

    @precondition(lambda self: self.model.programs)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.programs)))
        self.held.append(self.registry.hold_program(ROOT, id_))
        self.model.programs[id_].holds += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        program = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.model.programs[program.id].holds -= 1
        self.settle(self.registry.let_go(program))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), kind=st.sampled_from(["process", "persistent"]))
    def attach(self, data: st.DataObject, kind: Kind) -> None:
        client = self.pick(data, ended=True)
        if client is None:
            return
        program = self.held[-1]
        link = a_link(client, program, kind)
        if client.id in self.ended and kind == "process":
            with pytest.raises(Gone):
                self.registry.add_link(client, program, link)
            return
        self.held.pop()
        self.registry.add_link(client, program, link)
        self.model.programs[program.id].holds -= 1
        self.model.links[link.id] = ModelLink(client, program.id, kind)

    @precondition(lambda self: self.model.programs)
    @rule(data=st.data(), kind=st.sampled_from(["process", "persistent"]))
    def hold_and_attach(self, data: st.DataObject, kind: Kind) -> None:
        self.hold(data)
        self.attach(data, kind)

    @precondition(lambda self: self.model.links)
    @rule(data=st.data())
    def delete_link(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.links)))
        self.model.links[id_].over = True
        self.settle(self.registry.delete_link(ROOT, id_))
        with pytest.raises(NotFound):
            self.registry.delete_link(ROOT, id_)

    @precondition(lambda self: self.model.programs)
    @rule(data=st.data(), force=st.booleans())
    def delete_program(self, data: st.DataObject, force: bool) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.model.programs)))
        program = self.model.programs[id_]
        links = [link for link in self.model.links.values() if link.program == id_]
        if program.holds or (links and not force):
            with pytest.raises(Conflict):
                self.registry.delete_program(ROOT, id_, force)
            return
        program.released = True
        for link in links:
            link.over = True
        self.settle(self.registry.delete_program(ROOT, id_, force))

    def end(self, client: Client, which: Callable[[Kind], bool]) -> None:
        for link in self.model.links.values():
            link.over |= link.client is client and which(link.kind)
        for program in self.model.programs.values():
            program.released |= program.client is client and which(program.kind)

    @rule(data=st.data())
    def end_client(self, data: st.DataObject) -> None:
        """Of those without connection too: their process may end at any time."""
        clients = [
            client for client in self.clients if self.registry.clients.get(client.id) is client
        ]
        if clients:
            client = data.draw(st.sampled_from(clients))
            self.ended.add(client.id)
            self.end(client, lambda kind: kind == "process")
            self.settle(self.registry.end_client(client))

    @rule(data=st.data())
    def release_client(self, data: st.DataObject) -> None:
        clients = [
            client for client in self.clients if self.registry.clients.get(client.id) is client
        ]
        if clients:
            client = data.draw(st.sampled_from(clients))
            self.end(client, lambda kind: True)
            self.settle(self.registry.release_client(client))

    @invariant()
    def what_there_should_be_is_there(self) -> None:
        registry, model = self.registry, self.model
        assert {link.id for link in registry.links} == set(model.links)
        assert {program.id for program in registry.programs} == set(model.programs)
        assert {each.id for each in registry.maps} == {
            program.map for program in model.programs.values()
        }
        for each in registry.maps:
            assert each.programs == {
                id_ for id_, program in model.programs.items() if program.map == each.id
            }
        for program in registry.programs:
            assert program.links == {
                id_ for id_, link in model.links.items() if link.program == program.id
            }

    @invariant()
    def clients_are_listed_as_long_as_they_matter(self) -> None:
        for client in self.clients:
            links = {id_ for id_, link in self.model.links.items() if link.client is client}
            programs = {id_ for id_, each in self.model.programs.items() if each.client is client}
            listed = self.registry.clients.get(client.id) is client
            busy = self.open[client.id] or any(client is each for each in self.asking)
            assert listed == (client.id not in self.ended and bool(busy or links or programs))
            if listed:
                assert (client.links, client.programs) == (links, programs)
            assert self.forgotten.count(client.id) == (0 if listed else 1)

    def teardown(self) -> None:
        for link in self.model.links.values():
            link.over = True
        for program in self.model.programs.values():
            program.released, program.holds = True, 0
        self.settle(self.registry.end_all())
        assert len(self.registry.links) == len(self.registry.programs) == 0
        assert len(self.registry.maps) == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
