"""The shelf against a plain list."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core.shelf import Shelf


@dataclass
class Record:
    id: str
    colour: int


def colours(record: Record) -> list[Hashable]:
    return [("colour", record.colour)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2)),
        st.tuples(st.just("remove"), st.integers(0, 40)),
    ),
    max_size=60,
)


def play(steps: list[tuple[str, int]]) -> tuple[Shelf[Record], list[Record]]:
    shelf: Shelf[Record] = Shelf(colours)
    plain: list[Record] = []
    for number, (what, value) in enumerate(steps):
        if what == "add":
            record = Record(f"r{number}", value)
            shelf.add(record)
            plain.append(record)
        elif plain:
            record = plain.pop(value % len(plain))
            assert shelf.remove(record.id) is record
            assert shelf.remove(record.id) is None
    return shelf, plain


@settings(derandomize=True, database=None, deadline=None)
@given(STEPS)
def test_it_holds_what_a_list_would(steps: list[tuple[str, int]]) -> None:
    shelf, plain = play(steps)
    assert list(shelf) == plain
    assert len(shelf) == shelf.count(None) == len(plain)
    for record in plain:
        assert shelf.get(record.id) is record
    for colour in range(4):
        expected = [record for record in plain if record.colour == colour]
        assert shelf.page(("colour", colour), 0, 100) == (expected, None)
        assert shelf.count(("colour", colour)) == len(expected)


@settings(derandomize=True, database=None, deadline=None)
@given(STEPS, st.integers(1, 7), st.none() | st.integers(0, 2), st.booleans())
def test_pages_are_the_list_in_pieces(
    steps: list[tuple[str, int]], limit: int, colour: int | None, odd: bool
) -> None:
    shelf, plain = play(steps)
    key = None if colour is None else ("colour", colour)

    def where(record: Record) -> bool:
        return not odd or int(record.id[1:]) % 2 == 1

    expected = [record for record in plain if colour in (None, record.colour) and where(record)]
    collected: list[Record] = []
    after: int | None = 0
    while after is not None:
        page, after = shelf.page(key, after, limit, where)
        assert len(page) == limit or after is None
        assert page or not expected
        collected += page
    assert collected == expected


@settings(derandomize=True, database=None, deadline=None)
@given(STEPS, st.integers(1, 5), st.sets(st.integers(0, 60)))
def test_deleting_between_pages_hides_nothing(
    steps: list[tuple[str, int]], limit: int, doomed: set[int]
) -> None:
    shelf, plain = play(steps)
    page, after = shelf.page(None, 0, limit)
    rest = plain[len(page) :]
    for position in doomed:
        if position < len(plain):
            shelf.remove(plain[position].id)
    left = [record for record in rest if shelf.get(record.id)]
    late = Record("late", 0)
    shelf.add(late)
    collected: list[Record] = []
    while after is not None:
        found, after = shelf.page(None, after, limit)
        collected += found
    if rest:
        assert collected == [*left, late]


def test_a_page_looks_only_at_its_own_index() -> None:
    shelf: Shelf[Record] = Shelf(colours)
    for number in range(1000):
        shelf.add(Record(f"r{number}", number % 10))
    looked: list[Record] = []

    def where(record: Record) -> bool:
        looked.append(record)
        return True

    page, after = shelf.page(("colour", 3), 500, 5, where)
    assert len(page) == 5
    assert after is not None
    assert len(looked) == 6
