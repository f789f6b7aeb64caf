"""Records as text and back: nothing may change on the way, and nothing broken may get through."""

from __future__ import annotations

import dataclasses
import json
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core import carried
from kpmd.core.carried import Unreadable
from kpmd.core.model import (
    Client,
    Connection,
    Lease,
    Lifetime,
    Link,
    Map,
    Program,
    Skipped,
    Targets,
)
from kpmd.core.types import ObjectTypes
from tests.unit.records import a_lease, a_link, a_map, a_program

TEXT = st.text(max_size=20)
U64 = st.integers(0, 2**64 - 1)
NUMBER = st.integers(0, 2**32 - 1)
SECONDS = st.one_of(st.integers(1, 10**9), st.floats(0.001, 1e9))
LABELS = st.dictionaries(TEXT, TEXT, max_size=3)
REASON = st.sampled_from(
    [
        None,
        "deleted",
        "program-deleted",
        "client-gone",
        "client-released",
        "connection-closed",
        "lease-expired",
        "lease-ended",
        "shutdown",
    ]
)
LIFETIME = st.one_of(
    st.builds(Lifetime, st.sampled_from(["process", "connection", "persistent"])),
    st.builds(Lifetime, st.just("lease"), TEXT),
)
SKIPPED = st.builds(
    Skipped,
    TEXT,
    st.none() | TEXT,
    st.sampled_from(["unknown", "untraceable", "blacklisted", "denied", "ambiguous"]),
    TEXT,
)


@st.composite
def targets(draw: st.DrawFn) -> Targets:
    count = draw(st.integers(0, 4))
    some = st.lists(U64, min_size=count, max_size=count)
    names = st.lists(TEXT, min_size=count, max_size=count)
    return Targets(
        tuple(draw(st.just([]) | names)),
        array("Q", draw(st.just([]) | some)),
        array("Q", draw(some)),
        draw(st.dictionaries(st.integers(0, max(0, count - 1)), TEXT, max_size=count)),
    )


CLIENTS = st.builds(Client, TEXT, NUMBER, NUMBER, NUMBER, TEXT, SECONDS)
LEASES = st.builds(Lease, TEXT, NUMBER, st.none() | TEXT, TEXT, SECONDS, SECONDS, LABELS, SECONDS)
MAPS = st.builds(Map, TEXT, NUMBER, TEXT, TEXT, NUMBER, NUMBER, NUMBER, NUMBER, st.booleans())
PROGRAMS = st.builds(
    Program,
    id=TEXT,
    kernel_id=NUMBER,
    name=TEXT,
    tag=TEXT,
    attach=st.sampled_from(["kprobe_multi", "kprobe_session"]),
    mechanism=st.sampled_from(["kprobe_multi", "perf_event"]),
    uid=NUMBER,
    user=st.none() | TEXT,
    client=TEXT,
    lifetime=LIFETIME,
    maps=st.lists(TEXT, max_size=3).map(tuple),
    labels=LABELS,
    created_at=SECONDS,
    verified_instructions=NUMBER,
    jited_bytes=NUMBER,
    entry_only=st.booleans(),
    anchor=TEXT,
    released=REASON,
)
LINKS = st.builds(
    Link,
    id=TEXT,
    kernel_id=NUMBER,
    program=TEXT,
    kind=st.sampled_from(["kprobe", "kretprobe", "session"]),
    mechanism=st.sampled_from(["kprobe_multi", "perf_event"]),
    count=NUMBER,
    skipped=st.lists(SKIPPED, max_size=3).map(tuple),
    uid=NUMBER,
    user=st.none() | TEXT,
    client=TEXT,
    lifetime=LIFETIME,
    labels=LABELS,
    created_at=SECONDS,
    targets=targets(),
    anchor=TEXT,
    detaching=REASON,
)
RECORDS: st.SearchStrategy[Any] = st.one_of(CLIENTS, LEASES, PROGRAMS, LINKS)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def again(record: Any, maps: tuple[Map, ...] = ()) -> carried.Carried:
    head = json.loads(json.dumps(carried.head(record)))
    return carried.read(head, carried.body(record, maps))


def types(value: Any) -> Any:
    """What equality does not see: 1 and 1.0, and what is in a tuple."""
    if dataclasses.is_dataclass(value):
        return {each.name: types(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return type(value)


@quick
@given(RECORDS, st.lists(MAPS, max_size=3).map(tuple))
def test_every_field_comes_back(record: Any, maps: tuple[Map, ...]) -> None:
    if isinstance(record, Program):
        record.maps = tuple(each.id for each in maps)
    else:
        maps = ()
    found = again(record, maps)
    assert found == carried.Carried(record, maps)
    assert types(found.record) == types(record)


def filled(kind: type[Any]) -> Any:
    """A record in which no field has its default."""
    known: dict[str, Any] = {
        "lifetime": Lifetime("lease", "lse-1"),
        "targets": Targets(("f", "g"), array("Q", [1, 2]), array("Q", [3, 4]), {1: "m"}),
        "skipped": (Skipped("f", None, "denied", "why"), Skipped("g", "m", "unknown", "")),
        "maps": ("map-1",),
        "labels": {"a": "b"},
        "attach": "kprobe_session",
        "mechanism": "perf_event",
        "released": "lease-ended",
        "detaching": "client-gone",
        "types": ObjectTypes(b"BTF"),
    }
    made = {}
    for number, field in enumerate(dataclasses.fields(kind), start=1):
        by_type = {
            "str": f"value {number}",
            "str | None": f"value {number}",
            "int": number,
            "float": number + 0.5,
            "bool": True,
            "LinkKind": "session",
            "set[str]": {f"value {number}"},
            "Hashable": number,
        }
        made[field.name] = known[field.name] if field.name in known else by_type[str(field.type)]
    record = kind(**made)
    if isinstance(record, Map):
        record.id = "map-1"
    return record


def maps_of(record: Any) -> tuple[Map, ...]:
    """The maps that a record has, to be carried with it."""
    if not isinstance(record, Program):
        return ()
    return tuple(dataclasses.replace(filled(Map), id=id_) for id_ in record.maps)


def body_of(record: Any) -> dict[str, Any]:
    """A record's body with its maps."""
    body: dict[str, Any] = json.loads(carried.body(record, maps_of(record)))
    return body


#: What the next daemon finds out anew: on whom else it depends, and how many there are of it.
NEW = {
    Client: {
        "connections": 0,
        "requests": 0,
        "programs": set(),
        "links": set(),
        "leases": set(),
        "ended": "",
        "process": None,
    },
    Lease: {},
    Program: {"links": set(), "holds": 0},
    Link: {},
}


@pytest.mark.parametrize("kind", [Client, Lease, Program, Link])
def test_no_field_is_forgotten(kind: type[Any]) -> None:
    """A field that is added to a record is carried, or stands above."""
    record = filled(kind)
    assert again(record, maps_of(record)).record == dataclasses.replace(record, **NEW[kind])


def test_a_maps_programs_are_found_out_anew() -> None:
    record, map_ = filled(Program), filled(Map)
    assert again(record, (map_,)).maps == (dataclasses.replace(map_, programs=set()),)


def test_the_maps_of_a_program_share_its_objects_types() -> None:
    record, map_ = filled(Program), filled(Map)
    record.maps = ("map-1", "map-2")
    first, second = again(record, (map_, dataclasses.replace(map_, id="map-2"))).maps
    assert first.types is second.types
    assert first.types is not None
    assert first.types.raw == b"BTF"


@pytest.mark.parametrize("types", [7, "?", "AAAA", []])
def test_types_that_are_none(types: Any) -> None:
    record = filled(Program)
    body = body_of(record) | {"types": types}
    with pytest.raises(Unreadable):
        carried.read(carried.head(record), json.dumps(body).encode())


@quick
@given(RECORDS)
def test_what_changes_while_it_lives_is_in_the_head_alone(record: Any) -> None:
    """The head is rewritten when one of these changes; the body never is."""
    before = carried.body(record)
    if isinstance(record, Lease):
        record.ttl, record.deadline = 7, 99.5
    elif isinstance(record, Program):
        record.released, record.holds = "deleted", 3
        record.links.add("lnk-1")
    elif isinstance(record, Link):
        record.detaching = "deleted"
    else:
        record.links.add("lnk-1")
        record.ended = "it has"
    assert carried.body(record) == before
    assert len(json.dumps(carried.head(record))) < 200


def test_a_newer_kpmds_fields_are_left_out() -> None:
    """Within a version fields may be added; a daemon that does not know them goes on."""
    record = filled(Lease)
    data = json.loads(carried.body(record)) | {"colour": "green"}
    assert carried.read(carried.head(record) | {"x": 1}, json.dumps(data).encode()).record == record


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"\xff\xfe",
    b"{}",
    b'{"id": "x"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("kind", [Client, Lease, Program, Link])
def test_a_body_that_is_none(kind: type[Any], body: bytes) -> None:
    with pytest.raises(Unreadable):
        carried.read(carried.head(filled(kind)), body)


@pytest.mark.parametrize("kind", [Client, Lease, Program, Link])
def test_a_body_without_one_of_its_fields(kind: type[Any]) -> None:
    record = filled(kind)
    whole = body_of(record)
    needed = {
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    for name in needed & whole.keys():
        rest = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(Unreadable, match=name):
            carried.read(carried.head(record), json.dumps(rest).encode())


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"kpmd": 1},
        {"kpmd": 1, "kind": None},
        {"kpmd": 1, "kind": "map"},
        {"kpmd": 1, "kind": ["link"]},
        {"kpmd": 1, "kind": "link"},
        {"kpmd": 1, "kind": "lease", "ttl": 1},
        {"kpmd": 1, "kind": "program"},
        {"kpmd": 0, "kind": "client"},
        {"kpmd": 2, "kind": "client"},
        {"kpmd": "1", "kind": "client"},
        {"kpmd": None, "kind": "client"},
        {"kpmd": [], "kind": "client"},
    ],
    ids=str,
)
def test_a_head_that_is_none(head: dict[str, Any]) -> None:
    for kind in (Client, Lease, Program, Link):
        if head.get("kind") != "client" or kind is Client:
            with pytest.raises(Unreadable):
                carried.read(head, json.dumps(body_of(filled(kind))).encode())


def test_a_version_that_is_not_known_is_told() -> None:
    record = filled(Link)
    with pytest.raises(Unreadable, match="version 2"):
        carried.read(carried.head(record) | {"kpmd": 2}, carried.body(record))


def refused(record: Any, name: str, value: Any) -> None:
    """A state with something else in that place, in the head or in the body, is Unreadable."""
    head, body = carried.head(record), body_of(record)
    assert (name in head) != (name in body)
    (head if name in head else body)[name] = value
    with pytest.raises(Unreadable):
        carried.read(head, json.dumps(body).encode())


BROKEN: list[tuple[str, Any]] = [
    ("lifetime", None),
    ("lifetime", "process"),
    ("lifetime", {}),
    ("lifetime", {"kind": "lease"}),
    ("targets", None),
    ("targets", {}),
    ("targets", {"names": None, "addresses": "", "cookies": "", "modules": []}),
    ("targets", {"names": [], "addresses": "AAA=", "cookies": "", "modules": []}),
    ("targets", {"names": [], "addresses": "****", "cookies": "", "modules": []}),
    ("targets", {"names": [], "addresses": "AAAA", "cookies": "", "modules": []}),
    ("targets", {"names": [], "addresses": 5, "cookies": "", "modules": []}),
    ("targets", {"names": [], "addresses": "", "cookies": "", "modules": [[1]]}),
    ("targets", {"names": [], "addresses": "", "cookies": "", "modules": [["x", "m"]]}),
    ("skipped", None),
    ("skipped", [["f"]]),
    ("skipped", [5]),
    ("skipped", 5),
]


@pytest.mark.parametrize(("name", "value"), BROKEN, ids=str)
def test_a_part_that_is_broken(name: str, value: Any) -> None:
    refused(filled(Link), name, value)


@pytest.mark.parametrize("value", [None, 5, [5], [{}], [None], {"a": 1}])
def test_maps_that_are_broken(value: Any) -> None:
    record = filled(Program)
    data = body_of(record) | {"map_records": value}
    with pytest.raises(Unreadable):
        carried.read(carried.head(record), json.dumps(data).encode())


WRONG: list[tuple[type[Any], str, Any]] = [
    (Client, "id", []),
    (Client, "pid", "7"),
    (Link, "uid", "root"),
    (Link, "labels", 7),
    (Link, "labels", {"a": 1}),
    (Link, "count", None),
    (Link, "lifetime", {"kind": "for ever", "lease": ""}),
    (Program, "created_at", "now"),
    (Program, "maps", [[]]),
    (Program, "maps", "map-1"),
]


@pytest.mark.parametrize(("kind", "name", "value"), WRONG, ids=str)
def test_a_field_of_another_type(kind: type[Any], name: str, value: Any) -> None:
    """Whoever uses it would fail later: in the middle of taking over all the others, say."""
    refused(plausible(kind), name, value)


@pytest.mark.parametrize("name", ["ttl", "deadline"])
@pytest.mark.parametrize("value", ["soon", None, [], True])
def test_a_lease_that_ends_at_no_time(name: str, value: Any) -> None:
    record = plausible(Lease)
    with pytest.raises(Unreadable):
        carried.read(carried.head(record) | {name: value}, carried.body(record))


@pytest.mark.parametrize("which", [[], [0], [0, 1, 1]])
def test_a_program_with_other_maps_than_it_has(which: list[int]) -> None:
    """They are matched with its file descriptors one by one."""
    record = plausible(Program)
    maps = maps_of(record)
    chosen = tuple(maps[each] for each in which)
    with pytest.raises(Unreadable):
        carried.read(carried.head(record), carried.body(record, chosen))


def plausible(kind: type[Any]) -> Any:
    """A record with something of the right type in each field."""
    client = Client("cli-1", 7, 0, 0, "x", 1.5)
    connection = Connection("con-1", client)
    program = a_program(connection, Lifetime("persistent"), ("map-1", "map-2"))
    made: dict[type[Any], Any] = {
        Client: client,
        Lease: a_lease(client, 60, 1.5),
        Program: program,
        Link: a_link(connection, program),
        Map: a_map(0),
    }
    return made[kind]
