"""Which struct the records of a map are, as far as the object's BTF lets that be found out."""

from __future__ import annotations

import pytest

from kpmd.core.btf import BtfError
from kpmd.core.types import ObjectTypes
from tests.unit.btf import OBJECTS, Types, section


def object_of(*structs: str, **variables: str) -> ObjectTypes:
    """An object with these structs, and global variables that point to some of them."""
    types = Types()
    number = types.integer("int", 4, signed=True)
    made = {name: types.struct(name, 4, [("member", number, 0)]) for name in structs}
    for name, struct in variables.items():
        types.var(name, types.ptr(made[struct]))
    return ObjectTypes(types.raw())


def found(types: ObjectTypes, map_name: str = "events") -> str | None:
    codec = types.record(map_name, None)
    return None if codec is None else codec.name


def test_the_one_that_is_named() -> None:
    types = object_of("event", "events")
    codec = types.record("events", "event")
    assert codec is not None
    assert codec.name == "struct event"
    assert types.record("other", "event") is codec


@pytest.mark.parametrize(
    "name", ["Event", "event\0events", "event\0member", "", "x" * 300, "\ud800"]
)
def test_one_that_is_not_there(name: str) -> None:
    with pytest.raises(BtfError, match="it has: event, events"):
        object_of("event", "events").record("events", name)
    with pytest.raises(BtfError, match=r"it has: s00, .*, …"):
        object_of(*(f"s{number:02}" for number in range(40))).record("events", name)


def test_the_one_that_is_named_as_the_map() -> None:
    assert found(object_of("event", "events", unused="event")) == "struct events"


def test_the_one_that_a_variable_points_to() -> None:
    assert found(object_of("event", "other", unused="event")) == "struct event"
    assert found(object_of("event", unused="event", again="event")) == "struct event"


def test_of_several_the_one_whose_variable_has_the_maps_name() -> None:
    both = object_of("event", "other", unused_events="event", unused_others="other")
    assert found(both) == "struct event"
    assert found(both, "others") == "struct other"
    assert found(both, "third") is None


def test_none_at_all() -> None:
    assert found(object_of("event", "other")) is None


def test_of_a_compiled_object() -> None:
    types = ObjectTypes(section(OBJECTS / "events.bpf.o", ".BTF"))
    assert found(types) == "struct event"
    assert found(types, "perf_events") == "struct event"


def test_bytes_that_are_no_btf() -> None:
    types = ObjectTypes(b"no BTF")
    for _ in range(2):
        with pytest.raises(BtfError):
            types.record("events", "event")
        with pytest.raises(BtfError):
            types.codec(1)
