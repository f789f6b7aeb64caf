"""What is in maps, over a kernel's hash that this file has the buckets of."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.bpf import content
from kpmd.bpf.abi import MAP_TYPES, Cmd, MapBatchAttr, MapElemAttr, UpdateFlag
from kpmd.bpf.content import MOST_BYTES, MapContent
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.map_errors import refusal
from kpmd.bpf.maps import Layout
from kpmd.bpf.objects import MapDetails
from kpmd.bpf.syscall import BpfError
from kpmd.errors import (
    Conflict,
    Invalid,
    KernelError,
    KpmdError,
    NotFound,
    NotSupported,
    TooLarge,
)

NO_BATCH = 524
MUCH = 1 << 20


def details(
    type_number: int = 1, key: int = 4, value: int = 4, entries: int = 10_000
) -> MapDetails:
    return MapDetails(1, "m", MAP_TYPES[type_number], type_number, key, value, entries)


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


class Hash:
    """kernel/bpf/hashtab.c as far as one can see it from outside; keys have 4 bytes."""

    def __init__(self, buckets: Sequence[Sequence[int]], value: int = 4) -> None:
        self.buckets = [{key(each): bytes([each % 251]) * value for each in one} for one in buckets]
        self.value_size = value
        #: Commands that fail, and with what.
        self.fails: dict[Cmd, int] = {}
        self.most = 10_000
        self.calls: list[Cmd] = []

    def __call__(self, cmd: Cmd, attr: MapElemAttr | MapBatchAttr) -> int:
        self.calls.append(cmd)
        if error := self.fails.get(cmd):
            raise BpfError(error, cmd)
        error = self._batch(cmd, attr) if isinstance(attr, MapBatchAttr) else self._one(cmd, attr)
        if error:
            raise BpfError(error, cmd)
        return 0

    def keys(self) -> list[bytes]:
        return [each for bucket in self.buckets for each in bucket]

    def _one(self, cmd: Cmd, attr: MapElemAttr) -> int:
        asked = ctypes.string_at(attr.key, 4) if attr.key else None
        keys = self.keys()
        if cmd is Cmd.MAP_GET_NEXT_KEY:
            position = keys.index(asked) + 1 if asked in keys else 0
            if position == len(keys):
                return errno.ENOENT
            ctypes.memmove(attr.value, keys[position], 4)
            return 0
        assert asked is not None
        bucket = next((each for each in self.buckets if asked in each), None)
        if cmd is Cmd.MAP_UPDATE_ELEM:
            return self._update(asked, ctypes.string_at(attr.value, self.value_size), attr.flags)
        if bucket is None:
            return errno.ENOENT
        if cmd is Cmd.MAP_LOOKUP_ELEM:
            ctypes.memmove(attr.value, bucket[asked], self.value_size)
        else:
            assert cmd is Cmd.MAP_DELETE_ELEM
            del bucket[asked]
        return 0

    def _update(self, asked: bytes, value: bytes, flags: int) -> int:
        found = next((each for each in self.buckets if asked in each), None)
        if found is not None and flags == UpdateFlag.NOEXIST:
            return errno.EEXIST
        if found is None and flags == UpdateFlag.EXIST:
            return errno.ENOENT
        if found is None and len(self.keys()) >= self.most:
            return errno.E2BIG
        (self.buckets[0] if found is None else found)[asked] = value
        return 0

    def _batch(self, cmd: Cmd, attr: MapBatchAttr) -> int:
        if cmd in (Cmd.MAP_UPDATE_BATCH, Cmd.MAP_DELETE_BATCH):
            for done in range(attr.count):
                asked = ctypes.string_at(attr.keys + 4 * done, 4)
                if cmd is Cmd.MAP_UPDATE_BATCH:
                    at = attr.values + self.value_size * done
                    error = self._update(asked, ctypes.string_at(at, self.value_size), 0)
                else:
                    error = self._one(Cmd.MAP_DELETE_ELEM, MapElemAttr(key=attr.keys + 4 * done))
                if error:
                    attr.count = done
                    return error
            return 0
        at = int.from_bytes(ctypes.string_at(attr.in_batch, 4), "little") if attr.in_batch else 0
        room, attr.count = attr.count, 0
        while at < len(self.buckets):
            bucket = self.buckets[at]
            if len(bucket) > room - attr.count:
                ctypes.memmove(attr.out_batch, key(at), 4)
                return 0 if attr.count else errno.ENOSPC
            for one, value in bucket.items():
                ctypes.memmove(attr.keys + 4 * attr.count, one, 4)
                ctypes.memmove(attr.values + self.value_size * attr.count, value, self.value_size)
                attr.count += 1
            if cmd is Cmd.MAP_LOOKUP_AND_DELETE_BATCH:
                bucket.clear()
            at += 1
        return errno.ENOENT


@pytest.fixture
def thing() -> Iterator[OwnedFd]:
    with OwnedFd(os.eventfd(0), "a map") as owned:
        yield owned


Use = Callable[..., MapContent]


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch, thing: OwnedFd) -> Use:
    def use(kernel: Callable[..., int], cpus: int = 1, **fields: int) -> MapContent:
        monkeypatch.setattr(content, "bpf", kernel)
        return MapContent(thing, details(**fields), cpus)

    return use


def pages(of: MapContent, limit: int, most: int = MUCH) -> list[list[bytes]]:
    found, after = [], None
    while True:
        chunk = of.page(after, limit, most)
        assert chunk.count <= limit
        assert len(chunk.values) == of.layout.values * chunk.count
        found.append([bytes(chunk.keys[at : at + 4]) for at in range(0, len(chunk.keys), 4)])
        after = chunk.next
        if after is None:
            return found


def flat(found: list[list[bytes]]) -> list[bytes]:
    return [each for page in found for each in page]


@given(
    sizes=st.lists(st.integers(0, 9), max_size=20),
    limit=st.integers(1, 30),
    batches=st.booleans(),
)
def test_pages_have_each_entry_once(sizes: list[int], limit: int, batches: bool) -> None:
    numbers = iter(range(1000))
    kernel = Hash([[next(numbers) for _ in range(size)] for size in sizes])
    if not batches:
        kernel.fails[Cmd.MAP_LOOKUP_BATCH] = NO_BATCH
    with pytest.MonkeyPatch.context() as patch, OwnedFd(os.eventfd(0), "a map") as fd:
        patch.setattr(content, "bpf", kernel)
        found = pages(MapContent(fd, details(), 1), limit)
    assert flat(found) == kernel.keys()
    # Every page but that of an empty map has something in it.
    assert all(found) or found == [[]]


def test_values_stand_beside_their_keys(over: Use) -> None:
    chunk = over(Hash([[1], [2, 3]])).page(None, 10, MUCH)
    assert bytes(chunk.keys) == key(1) + key(2) + key(3)
    assert bytes(chunk.values) == b"\1" * 4 + b"\2" * 4 + b"\3" * 4
    assert (chunk.count, chunk.next) == (3, None)


def test_a_page_costs_no_more_than_its_size(over: Use) -> None:
    kernel = Hash([[each] for each in range(5000)])
    of = over(kernel)
    assert of.page("b4000", 10, MUCH).count == 10
    assert len(kernel.calls) == 2
    assert of.page(None, 1000, 80).count == 10
    assert of.page(None, 1000, 1).count == 1


def test_without_a_batch_the_cursor_is_the_last_key(over: Use) -> None:
    kernel = Hash([[1, 2, 3], [4, 5]])
    kernel.fails[Cmd.MAP_LOOKUP_BATCH] = errno.EINVAL
    of = over(kernel)
    first = of.page(None, 2, MUCH)
    assert first.next == "k" + key(2).hex()
    del kernel.buckets[0][key(3)]
    assert bytes(of.page(first.next, 2, MUCH).keys) == key(4) + key(5)
    with pytest.raises(Invalid):
        of.page("b1", 2, MUCH)


def test_an_entry_that_goes_between_its_key_and_its_value(over: Use) -> None:
    kernel = Hash([[1, 2, 3]])
    kernel.fails[Cmd.MAP_LOOKUP_BATCH] = NO_BATCH

    def handler(cmd: Cmd, attr: MapElemAttr) -> int:
        if cmd is Cmd.MAP_LOOKUP_ELEM and ctypes.string_at(attr.key, 4) == key(2):
            raise BpfError(errno.ENOENT, cmd)
        return kernel(cmd, attr)

    assert flat(pages(over(handler), 10)) == [key(1), key(3)]


def test_a_map_whose_keys_never_end_ends_the_page(over: Use) -> None:
    def handler(cmd: Cmd, attr: MapElemAttr) -> int:
        if cmd is Cmd.MAP_GET_NEXT_KEY:
            return 0  # the same key over and over, and never a value
        raise BpfError(NO_BATCH if cmd is Cmd.MAP_LOOKUP_BATCH else errno.ENOENT, cmd)

    chunk = over(handler).page(None, 10, MUCH)
    assert (chunk.count, chunk.next) == (0, "k00000000")


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "b",
        "b-1",
        "b4294967296",
        "b1.",
        "b1.99999999",
        "b0.9999999",
        "k",
        "k0",
        "k000000",
        "k0000000000",
        "kzzzzzzzz",
        "x1",
        "b1\n",
        "0",
        "k00 00 00 00",
        "b\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_cursors_that_are_none(over: Use, cursor: str) -> None:
    with pytest.raises(Invalid) as error:
        over(Hash([[1], [2]]), value=8).page(cursor, 10, MUCH)
    assert error.value.fields["errors"][0]["loc"] == ["after"]


@pytest.mark.parametrize("cursor", ["b2", "b4294967295", "b1.5", "kffffffff"])
def test_cursors_that_could_have_been(over: Use, cursor: str) -> None:
    assert over(Hash([[1], [2]])).page(cursor, 10, MUCH).next is None


def test_a_bucket_with_too_much_in_it(over: Use) -> None:
    kernel = Hash([range(9000)], value=4096)
    with pytest.raises(TooLarge, match="one bucket"):
        over(kernel, value=4096).page(None, 10, MUCH)


def test_an_entry_that_is_too_large(thing: OwnedFd) -> None:
    with pytest.raises(TooLarge, match="/fd"):
        MapContent(thing, details(2, value=MOST_BYTES), 1)
    with pytest.raises(TooLarge):
        MapContent(thing, details(6, value=1 << 15), 1024)


def test_values_of_each_cpu_are_padded_to_eight_bytes() -> None:
    layout = Layout.of(details(5), 3)
    raw = b"1111....2222....3333...."
    assert (layout.stride, layout.copies, layout.values) == (8, 3, 24)
    assert layout.split(raw) == [b"1111", b"2222", b"3333"]
    assert layout.join([b"1111", b"2222", b"3333"]) == raw.replace(b".", b"\0")
    assert Layout.of(details(1, value=5), 3) == Layout(4, 5, 5, 1, False)
    # What is read of maps of maps are ids.
    assert Layout.of(details(12, value=8), 3).values == 4


@pytest.mark.parametrize("batches", [True, False])
def test_writing_many(over: Use, batches: bool) -> None:
    kernel = Hash([[]])
    if not batches:
        kernel.fails[Cmd.MAP_UPDATE_BATCH] = NO_BATCH
    kernel.most = 3
    of = over(kernel, entries=3)
    of.update([(key(each), b"%04d" % each) for each in range(3)], "any")
    assert kernel.buckets == [{key(each): b"%04d" % each for each in range(3)}]
    with pytest.raises(TooLarge, match="takes 3 entries") as error:
        of.update([(key(each), b"xxxx") for each in (2, 1, 7, 0)], "any")
    assert error.value.fields["done"] == 2
    assert error.value.fields["errno"] == "E2BIG"
    assert kernel.buckets[0][key(1)] == b"xxxx"
    assert kernel.buckets[0][key(0)] == b"0000"


def test_modes(over: Use) -> None:
    kernel = Hash([[1]])
    of = over(kernel)
    with pytest.raises(Conflict) as exists:
        of.update([(key(2), b"2222"), (key(1), b"1111")], "create")
    assert exists.value.fields["done"] == 1
    with pytest.raises(NotFound):
        of.update([(key(3), b"3333")], "replace")
    of.update([(key(1), b"----")], "replace")
    assert kernel.buckets == [{key(1): b"----", key(2): b"2222"}]


@pytest.mark.parametrize("batches", [True, False])
def test_deleting_many(over: Use, batches: bool) -> None:
    kernel = Hash([range(10)])
    if not batches:
        kernel.fails[Cmd.MAP_DELETE_BATCH] = NO_BATCH
    of = over(kernel)
    assert of.delete([key(each) for each in (20, 1, 2, 21, 3, 22, 23)]) == 3
    assert kernel.keys() == [key(each) for each in (0, 4, 5, 6, 7, 8, 9)]
    assert of.delete([key(1)]) == 0
    assert of.delete([]) == 0
    kernel.fails |= dict.fromkeys((Cmd.MAP_DELETE_BATCH, Cmd.MAP_DELETE_ELEM), errno.EPERM)
    with pytest.raises(NotSupported) as error:
        of.delete([key(0), key(4)])
    assert error.value.fields["done"] == 0


@pytest.mark.parametrize("batches", [True, False])
def test_clearing(over: Use, batches: bool) -> None:
    kernel = Hash([[1, 2, 3], [], [4], [5, 6]])
    if not batches:
        kernel.fails[Cmd.MAP_LOOKUP_AND_DELETE_BATCH] = NO_BATCH
    of = over(kernel)
    total, after = 0, None
    for _ in range(6):
        deleted, after = of.clear(after, 2, MUCH)
        total += deleted
        if after is None:
            break
    assert after is None
    assert total == 6
    assert kernel.keys() == []
    assert of.clear(None, 2, MUCH) == (0, None)


@pytest.mark.parametrize("type_number", [3, 4, 8, 14, 22, 23, 27, 30, 31, 33])
def test_maps_without_keys(thing: OwnedFd, type_number: int) -> None:
    of = MapContent(thing, details(type_number), 1)
    calls: list[Callable[[], object]] = [
        lambda: of.lookup(key(1)),
        lambda: of.page(None, 10, MUCH),
        lambda: of.update([(key(1), b"1111")], "any"),
        lambda: of.delete([key(1)]),
        lambda: of.clear(None, 10, MUCH),
    ]
    for call in calls:
        with pytest.raises(NotSupported, match=r"GET|POST"):
            call()


@pytest.mark.parametrize("type_number", [7, 12, 13])
def test_maps_that_are_not_written(over: Use, type_number: int) -> None:
    """Of maps of maps the values would be file descriptors of the daemon's own."""
    kernel = Hash([[1]])
    of = over(kernel, type_number=type_number)
    for items in ([(key(1), bytes([5, 0, 0, 0]))], [(key(1), bytes(4))] * 2):
        with pytest.raises(NotSupported):
            of.update(items, "any")
    assert kernel.calls == []


def test_arrays_and_queues(thing: OwnedFd) -> None:
    for type_number in (2, 6):
        of = MapContent(thing, details(type_number), 1)
        with pytest.raises(NotSupported, match="zeros"):
            of.delete([key(1)])
        with pytest.raises(NotSupported, match="zeros"):
            of.clear(None, 1, MUCH)
        with pytest.raises(NotSupported, match="queues"):
            of.pop(keep=True)
        with pytest.raises(NotSupported, match="queues"):
            of.push(b"1111", overwrite=False)


def test_sizes_are_checked_before_the_kernel_reads_memory(over: Use) -> None:
    kernel = Hash([[1]])
    of = over(kernel)
    calls: list[Callable[[], object]] = [
        lambda: of.lookup(b"123"),
        lambda: of.update([(b"12345", b"1111")], "any"),
        lambda: of.update([(key(1), b"11111")], "any"),
        lambda: of.update([(key(1), b"1111"), (b"12345", b"111")], "any"),
        lambda: of.delete([b"123"]),
        lambda: of.delete([key(1), b"123"]),
        lambda: of.write_at(1, b"1111"),
        lambda: of.write_at(-1, b"1"),
    ]
    for call in calls:
        with pytest.raises(ValueError):  # noqa: PT011 - of Python's own words
            call()
    assert kernel.calls == []


def test_a_locked_bucket_is_tried_again(over: Use) -> None:
    kernel = Hash([[1]])
    busy = iter([True, True, False])

    def handler(cmd: Cmd, attr: MapElemAttr) -> int:
        if next(busy):
            raise BpfError(errno.EBUSY, cmd)
        return kernel(cmd, attr)

    assert over(handler).lookup(key(1)) == b"\1" * 4
    kernel.fails[Cmd.MAP_LOOKUP_ELEM] = errno.EBUSY
    with pytest.raises(KernelError) as error:
        over(kernel).lookup(key(1))
    assert error.value.fields["errno"] == "EBUSY"


@pytest.mark.parametrize(
    ("number", "write", "kind"),
    [
        (errno.EPERM, True, NotSupported),
        (errno.EPERM, False, NotSupported),
        (errno.EEXIST, True, Conflict),
        (errno.ENOENT, True, NotFound),
        (errno.E2BIG, True, TooLarge),
        (errno.ENOSPC, True, TooLarge),
        (errno.ENOMEM, True, KernelError),
        (errno.E2BIG, False, KernelError),
        (errno.EINVAL, True, KernelError),
    ],
)
def test_refusals(number: int, write: bool, kind: type[KpmdError]) -> None:
    assert type(refusal(number, details(), None, write=write)) is kind


def test_an_index_that_is_none() -> None:
    error = refusal(errno.E2BIG, details(2, entries=4), 1, write=True)
    assert isinstance(error, Invalid)
    assert "0 to 3" in error.detail


def test_a_prefix_that_is_too_long() -> None:
    error = refusal(errno.EINVAL, details(11, key=8), None, write=True)
    assert isinstance(error, Invalid)
    assert "at most 32" in error.detail


@pytest.mark.parametrize(
    "call",
    [lambda of: of.lookup(key(1)), lambda of: of.page(None, 1, 9), lambda of: of.page("b0", 1, 9)],
)
def test_what_the_kernel_refuses(over: Use, call: Callable[[MapContent], object]) -> None:
    kernel = Hash([[1]])
    kernel.fails = dict.fromkeys(Cmd, errno.ENOMEM)
    with pytest.raises(KernelError, match="did not read") as error:
        call(over(kernel))
    assert error.value.fields["errno"] == "ENOMEM"
