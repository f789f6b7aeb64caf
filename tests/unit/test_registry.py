"""What the registry lets live, and what it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kpmd.core.changes import Ending, Event
from kpmd.core.leases import REMEMBERED, Leases
from kpmd.core.model import Caller, Client, Connection, Lease, Lifetime, Link, Program
from kpmd.core.registry import Registry
from kpmd.errors import Conflict, Gone, NotFound
from tests.unit.records import (
    CONNECTION,
    PERSISTENT,
    PROCESS,
    ROOT,
    a_lease,
    a_link,
    a_map,
    a_program,
    caller,
)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def connect(registry: Registry, pid: int = 10, uid: int = 1000) -> Connection:
    return registry.connect(pid, pid, uid, uid, "test", 0.0)


def load(
    registry: Registry, connection: Connection, lifetime: Lifetime = PROCESS, now: float = 0
) -> Program:
    program = a_program(connection, lifetime)
    registry.add_loaded(caller(connection.client), connection, [program], [], now)
    return program


def attach(
    registry: Registry,
    connection: Connection,
    program: Program,
    lifetime: Lifetime = PROCESS,
    now: float = 0,
) -> Link:
    registry.hold_program(ROOT, program.id)
    link = a_link(connection, program, lifetime)
    registry.add_link(ROOT, connection, program, link, now)
    return link


def detach_all(registry: Registry, ending: Ending) -> Ending:
    """Say that the links of an Ending are detached: all that is to be closed then."""
    rest = Ending([], [*ending.programs], [*ending.maps])
    for link in ending.links:
        more = registry.detached(link)
        rest.programs += more.programs
        rest.maps += more.maps
    return rest


def make_lease(registry: Registry, connection: Connection, ttl: float = 10) -> Lease:
    lease = a_lease(connection.client, ttl, 0)
    registry.create_lease(connection.client, lease)
    return lease


def test_links_end_first_and_keep_their_program_until_they_are_detached(
    registry: Registry,
) -> None:
    connection = connect(registry)
    client = connection.client
    shared = a_map(client.uid)
    program = a_program(connection, maps=(shared.id,))
    shared.programs.add(program.id)
    registry.add_loaded(caller(client), connection, [program], [shared], 0)
    link = attach(registry, connection, program)
    ending = registry.end_client(client)
    assert (ending.links, ending.programs, ending.maps) == ([link], [], [])
    assert link.detaching == "client-gone"
    assert list(registry.links) == [link]
    assert list(registry.programs) == [program]
    rest = registry.detached(link)
    assert (rest.links, rest.programs, rest.maps) == ([], [program], [shared])
    assert program.released == "client-gone"
    assert not registry.end_client(client)
    assert not registry.detached(link)
    assert len(registry.clients) == len(registry.links) == len(registry.programs) == 0


def test_nothing_new_can_be_bound_to_an_ended_client(registry: Registry) -> None:
    connection, other = connect(registry), connect(registry, 11)
    program = load(registry, other)
    registry.end_client(connection.client)
    with pytest.raises(Gone):
        load(registry, connection)
    registry.hold_program(ROOT, program.id)
    with pytest.raises(Gone):
        registry.add_link(ROOT, connection, program, a_link(connection, program), 0)
    assert program.holds == 1
    assert not registry.let_go(program)
    assert program.holds == 0
    # What lives on by itself may still come of it.
    load(registry, connection, PERSISTENT)
    assert len(registry.programs) == 2


def test_nothing_new_can_be_bound_to_a_closed_connection(registry: Registry) -> None:
    first, second = connect(registry), connect(registry)
    registry.disconnect(first)
    with pytest.raises(Gone):
        load(registry, first, CONNECTION)
    load(registry, first, PROCESS)
    load(registry, second, CONNECTION)
    assert len(registry.programs) == 2


def test_nothing_new_can_be_bound_to_an_ended_lease(registry: Registry) -> None:
    connection = connect(registry)
    lease = make_lease(registry, connection)
    lifetime = Lifetime("lease", lease.id)
    with pytest.raises(Gone, match="not renewed"):
        load(registry, connection, lifetime, now=10)
    registry.expire(10)
    with pytest.raises(Gone, match="not renewed"):
        load(registry, connection, lifetime)
    with pytest.raises(NotFound):
        load(registry, connection, Lifetime("lease", "lse-none"))
    with pytest.raises(NotFound):
        load(registry, connect(registry, 11, uid=1001), lifetime)


def test_a_load_of_which_one_part_cannot_be_bound_lists_nothing(registry: Registry) -> None:
    connection = connect(registry)
    registry.end_client(connection.client)
    parts = [a_program(connection, PERSISTENT), a_program(connection, PROCESS)]
    with pytest.raises(Gone):
        registry.add_loaded(ROOT, connection, parts, [a_map(1000)], 0)
    assert len(registry.programs) == len(registry.maps) == 0


def test_a_connection_takes_its_own_along_and_nothing_else(registry: Registry) -> None:
    first, second = connect(registry), connect(registry)
    assert first.client is second.client
    program = load(registry, first, CONNECTION)
    short = attach(registry, second, program, CONNECTION)
    long = attach(registry, second, program, PROCESS)
    assert not registry.disconnect(first)
    assert program.released == "connection-closed"
    ending = registry.disconnect(second)
    assert ending.links == [short]
    assert short.detaching == "connection-closed"
    assert not registry.detached(short)
    assert list(registry.links) == [long]
    ending = registry.delete_link(ROOT, long.id)
    assert detach_all(registry, ending).programs == [program]
    assert list(registry.clients) == []


def test_a_link_may_live_shorter_than_its_program(registry: Registry) -> None:
    connection = connect(registry)
    lease = make_lease(registry, connection)
    program = load(registry, connection, PERSISTENT)
    link = attach(registry, connection, program, Lifetime("lease", lease.id))
    ending = registry.expire(10)
    assert ending.links == [link]
    assert not detach_all(registry, ending)
    assert list(registry.programs) == [program]


def test_a_lease_ends_what_is_bound_to_it_when_its_time_is_over(registry: Registry) -> None:
    connection = connect(registry)
    lease, other = make_lease(registry, connection, 10), make_lease(registry, connection, 20)
    program = load(registry, connection, Lifetime("lease", lease.id))
    link = attach(registry, connection, program, Lifetime("lease", lease.id))
    kept = attach(registry, connection, program, Lifetime("lease", other.id))
    registry.end_client(connection.client)
    assert registry.leases.next_deadline() == 10
    assert not registry.expire(9.999)
    ending = registry.expire(10)
    assert ending.links == [link]
    assert link.detaching == "lease-expired"
    assert not detach_all(registry, ending), "another link needs the program"
    ending = registry.end_lease(ROOT, other.id, 11)
    assert ending.links == [kept]
    assert detach_all(registry, ending).programs == [program]
    assert registry.leases.next_deadline() is None
    assert list(registry.leases) == []


def test_a_renewed_lease_lives_from_then_on(registry: Registry) -> None:
    connection = connect(registry)
    lease = make_lease(registry, connection, 10)
    registry.renew_lease(ROOT, lease.id, None, 9)
    assert (lease.ttl, registry.leases.next_deadline()) == (10, 19)
    registry.renew_lease(ROOT, lease.id, 2, 10)
    assert (lease.ttl, registry.leases.next_deadline()) == (2, 12)
    assert not registry.expire(11)
    registry.expire(12)
    with pytest.raises(Gone, match="not renewed"):
        registry.renew_lease(ROOT, lease.id, None, 12)


def test_a_lease_past_its_time_is_gone_before_anyone_collects_it(registry: Registry) -> None:
    lease = make_lease(registry, connect(registry), 10)
    with pytest.raises(Gone):
        registry.lease(ROOT, lease.id, 10)
    assert registry.lease(ROOT, lease.id, 9) is lease


def test_an_ended_lease_is_gone_for_its_owner_and_unknown_to_others(registry: Registry) -> None:
    connection = connect(registry)
    lease = make_lease(registry, connection)
    registry.end_lease(ROOT, lease.id, 0)
    for who in (ROOT, caller(connection.client)):
        with pytest.raises(Gone, match="has been ended"):
            registry.lease(who, lease.id, 0)
    with pytest.raises(NotFound):
        registry.lease(Caller(1001, 0, 9, admin=False), lease.id, 0)


def test_only_so_many_ended_leases_are_remembered_of_each_user(registry: Registry) -> None:
    connection, other = connect(registry), connect(registry, 11, uid=1001)
    kept = make_lease(registry, other)
    registry.end_lease(ROOT, kept.id, 0)
    ended = [make_lease(registry, connection) for _ in range(REMEMBERED + 1)]
    for lease in ended:
        registry.end_lease(ROOT, lease.id, 0)
    with pytest.raises(NotFound):
        registry.lease(ROOT, ended[0].id, 0)
    for lease in (ended[1], kept):
        with pytest.raises(Gone):
            registry.lease(ROOT, lease.id, 0)


def test_renewing_all_the_time_does_not_fill_the_memory() -> None:
    leases = Leases()
    connection = connect(Registry())
    lease = a_lease(connection.client, 100, 0)
    leases.add(lease)
    for now in range(1000):
        leases.renew(lease, 100, now)
    assert len(leases._deadlines) < 100
    assert leases.next_deadline() == 1099
    assert leases.due(1098) == []
    assert leases.due(1099) == [lease.id]


def test_a_hold_keeps_a_released_program(registry: Registry) -> None:
    connection, other = connect(registry), connect(registry, 11)
    program = load(registry, connection)
    registry.hold_program(ROOT, program.id)
    assert not registry.end_client(connection.client)
    with pytest.raises(Conflict):
        registry.delete_program(ROOT, program.id, force=True)
    link = a_link(other, program)
    registry.add_link(ROOT, other, program, link, 0)
    ending = registry.delete_link(ROOT, link.id)
    assert ending.links == [link]
    assert detach_all(registry, ending).programs == [program]


def test_letting_go_of_a_released_program_ends_it(registry: Registry) -> None:
    connection = connect(registry)
    program = load(registry, connection)
    registry.hold_program(ROOT, program.id)
    registry.hold_program(ROOT, program.id)
    registry.end_client(connection.client)
    assert not registry.let_go(program)
    assert registry.let_go(program).programs == [program]


def test_no_link_can_be_made_with_a_program_that_is_being_deleted(registry: Registry) -> None:
    connection = connect(registry)
    program = load(registry, connection)
    link = attach(registry, connection, program)
    with pytest.raises(Conflict, match="1 link"):
        registry.delete_program(ROOT, program.id, force=False)
    assert registry.delete_program(ROOT, program.id, force=True).links == [link]
    with pytest.raises(Conflict, match="being deleted"):
        registry.hold_program(ROOT, program.id)
    # Asked again, without force: nothing is attached any more.
    assert not registry.delete_program(ROOT, program.id, force=False)
    assert registry.detached(link).programs == [program]


def test_a_link_is_in_one_ending_only(registry: Registry) -> None:
    connection = connect(registry)
    link = attach(registry, connection, load(registry, connection))
    assert registry.delete_link(ROOT, link.id).links == [link]
    assert not registry.delete_link(ROOT, link.id)
    assert not registry.release_client(connection.client)
    assert not registry.end_client(connection.client)
    assert link.detaching == "deleted"


def test_shutting_down_ends_held_programs_once(registry: Registry) -> None:
    program = load(registry, connect(registry))
    registry.hold_program(ROOT, program.id)
    assert registry.end_all().programs == [program]
    assert not registry.let_go(program)


def test_releasing_a_client_ends_all_that_it_made(registry: Registry) -> None:
    connection, other = connect(registry), connect(registry, 11)
    lease = make_lease(registry, connection)
    program = load(registry, connection, PERSISTENT)
    own = attach(registry, connection, program, PERSISTENT)
    lent = attach(registry, other, load(registry, other), Lifetime("lease", lease.id))
    untouched = attach(registry, other, load(registry, other))
    ending = registry.release_client(connection.client)
    assert ending.links == [lent, own]
    assert {link.detaching for link in ending.links} == {"client-released"}
    assert detach_all(registry, ending).programs == [program]
    assert list(registry.links) == [untouched]
    with pytest.raises(Gone, match="released"):
        registry.lease(ROOT, lease.id, 0)


@pytest.mark.parametrize("what", ["program", "map", "link", "client"])
def test_another_users_things_are_not_found(registry: Registry, what: str) -> None:
    connection = connect(registry, uid=1000)
    shared = a_map(1000)
    program = a_program(connection, maps=(shared.id,))
    registry.add_loaded(ROOT, connection, [program], [shared], 0)
    link = attach(registry, connection, program)
    ids = {
        "program": program.id,
        "map": shared.id,
        "link": link.id,
        "client": connection.client.id,
    }
    find: Callable[[Caller, str], object] = getattr(registry, what)
    _not_found_by_others(find, ids[what])


def test_another_users_lease_is_not_found(registry: Registry) -> None:
    lease = make_lease(registry, connect(registry))
    _not_found_by_others(lambda who, id_: registry.lease(who, id_, 0), lease.id)


def _not_found_by_others(find: Callable[[Caller, str], object], id_: str) -> None:
    find(Caller(1000, 5, 99, admin=False), id_)
    find(ROOT, id_)
    with pytest.raises(NotFound) as his:
        find(Caller(1001, 1000, 10, admin=False), id_)
    with pytest.raises(NotFound) as none:
        find(ROOT, "x" + id_[1:])
    assert his.value.detail.replace(id_, "") == none.value.detail.replace("x" + id_[1:], "")


def test_what_a_client_holds_is_what_is_there(registry: Registry) -> None:
    connection = connect(registry)
    client = connection.client
    program = load(registry, connection)
    links = [attach(registry, connection, program) for _ in range(3)]
    detach_all(registry, registry.delete_link(ROOT, links[1].id))
    assert client.links == {links[0].id, links[2].id}
    detach_all(registry, registry.delete_program(ROOT, program.id, force=True))
    assert not client.links
    assert not client.programs
    assert list(registry.clients) == [client]


def test_the_same_process_as_another_user_is_another_client(registry: Registry) -> None:
    assert connect(registry, 10, 1).client is not connect(registry, 10, 2).client
    assert connect(registry, 10, 1).client is connect(registry, 10, 1).client


def test_processes_that_cannot_be_told_apart_are_never_taken_for_each_other(
    registry: Registry,
) -> None:
    first = registry.connect(None, 0, 1000, 1000, "x", 0)
    second = registry.connect(None, 0, 1000, 1000, "x", 0)
    assert first.client is not second.client


def test_who_is_forgotten_is_told_once(registry: Registry) -> None:
    told: list[Client] = []
    registry.on_forget = told.append
    connection = connect(registry)
    program = load(registry, connection)
    registry.disconnect(connection)
    assert told == []
    registry.delete_program(ROOT, program.id, force=False)
    assert told == [connection.client]
    registry.end_client(connection.client)
    assert told == [connection.client]


def test_what_happens_is_told_in_order(registry: Registry) -> None:
    told: list[tuple[str, str, str | None]] = []

    def note(event: Event) -> None:
        told.append((event.what, event.event, event.reason))

    registry.on_event = note
    connection = connect(registry)
    lease = make_lease(registry, connection)
    program = load(registry, connection)
    link = attach(registry, connection, program, Lifetime("lease", lease.id))
    registry.expire(10)
    registry.end_client(connection.client)
    registry.detached(link)
    assert told == [
        ("client", "created", None),
        ("lease", "created", None),
        ("program", "created", None),
        ("link", "created", None),
        ("link", "detaching", "lease-expired"),
        ("lease", "ended", "lease-expired"),
        ("client", "ended", "client-gone"),
        ("link", "ended", "lease-expired"),
        ("program", "ended", "client-gone"),
    ]
