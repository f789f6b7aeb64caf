"""Records in the order they came, to be paged through at a cost that only the page decides."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class HasId(Protocol):
    """Anything with an id."""

    id: str


R = TypeVar("R", bound=HasId)


class Shelf(Generic[R]):
    """Records by id, with an index for each way they are listed (by owner, by program, …).

    ``keys`` gives the index keys of a record; they must not change while it is on the shelf. A
    cursor is the sequence number of the last record of the page before: it stays good when that
    record is gone.
    """

    def __init__(self, keys: Callable[[R], Iterable[Hashable]]) -> None:
        self._keys = keys
        #: Called with each record that comes (1) or goes (-1), so that sums can be kept.
        self.on_count: Callable[[R, int], None] = lambda record, sign: None
        self._records: dict[str, tuple[int, R]] = {}
        self._by_number: dict[int, R] = {}
        # Sequence numbers only grow, so that each list is sorted by being appended to.
        self._indexes: defaultdict[Hashable, list[int]] = defaultdict(list)
        self._next = 1

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[R]:
        return (record for _, record in self._records.values())

    def get(self, id_: str) -> R | None:
        """The record of that id."""
        found = self._records.get(id_)
        return found[1] if found else None

    def add(self, record: R) -> None:
        """Put a record behind all others."""
        number, self._next = self._next, self._next + 1
        self._records[record.id] = (number, record)
        self._by_number[number] = record
        for key in (None, *self._keys(record)):
            self._indexes[key].append(number)
        self.on_count(record, 1)

    def remove(self, id_: str) -> R | None:
        """Take a record away; None when it is not there."""
        found = self._records.pop(id_, None)
        if found is None:
            return None
        number, record = found
        del self._by_number[number]
        for key in (None, *self._keys(record)):
            index = self._indexes[key]
            del index[bisect_right(index, number) - 1]
            if not index:
                del self._indexes[key]
        self.on_count(record, -1)
        return record

    def page(
        self, key: Hashable, after: int, limit: int, where: Callable[[R], bool] | None = None
    ) -> tuple[list[R], int | None]:
        """At most ``limit`` records of index ``key`` (None: all) behind the cursor ``after``.

        Returns them and the cursor of the next page, None at the end.
        """
        index = self._indexes.get(key, [])
        found: list[R] = []
        last = after
        for position in range(bisect_right(index, after), len(index)):
            record = self._by_number[index[position]]
            if where is None or where(record):
                if len(found) == limit:
                    return found, last
                found.append(record)
                last = index[position]
        return found, None

    def ids(self, key: Hashable) -> list[str]:
        """The ids of all records of index ``key``."""
        return [self._by_number[number].id for number in self._indexes.get(key, ())]

    def count(self, key: Hashable) -> int:
        """How many records index ``key`` has."""
        return len(self._indexes.get(key, ()))
