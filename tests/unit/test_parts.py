"""A link in several pieces: made in halves where memory lacks, and closed all together."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.bpf.objects import LinkDetails
from kpmd.runtime import parts
from kpmd.runtime.parts import Parts
from tests.fakes.kernel import FakeKernel


class Thing:
    """A handle that knows what it is of, and can fail to close."""

    def __init__(self, made: slice, log: list[slice], fails: int = 0) -> None:
        self.made = made
        self.closed = 0
        self._log = log
        self._fails = fails

    def close(self) -> None:
        self.closed += 1
        self._log.append(self.made)
        if self._fails:
            raise OSError(self._fails, "closing failed")


class Maker:
    """Makes links of ``most`` targets and fewer; ``fail`` are errors by the number of the call."""

    def __init__(self, most: int, fail: dict[int, BaseException] | None = None) -> None:
        self.most = most
        self.fail = fail or {}
        self.asked: list[slice] = []
        self.things: list[Thing] = []
        self.closed: list[slice] = []

    def __call__(self, part: slice) -> tuple[Thing, LinkDetails]:
        number = len(self.asked)
        self.asked.append(part)
        assert part.stop > part.start
        if number in self.fail:
            raise self.fail[number]
        if part.stop - part.start > self.most:
            raise OSError(errno.ENOMEM, "too many")
        thing = Thing(part, self.closed)
        self.things.append(thing)
        return thing, LinkDetails(100 + number, 7, part.stop - part.start, 1)

    @property
    def open(self) -> list[Thing]:
        return [each for each in self.things if not each.closed]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_what_fits_is_made_in_one_piece(count: int) -> None:
    maker = Maker(1000)
    handle, details = parts.create(maker, count)
    assert maker.asked == [slice(0, count)]
    assert handle is maker.things[0]
    assert (details.kernel_id, details.count, details.missed) == (100, count, 1)


@settings(derandomize=True, database=None, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500))
def test_the_pieces_are_all_targets_once_and_in_their_order(count: int, most: int) -> None:
    maker = Maker(most)
    handle, details = parts.create(maker, count)
    made = [each.made for each in maker.things]
    assert [at for part in made for at in range(part.start, part.stop)] == list(range(count))
    assert all(part.stop - part.start <= most for part in made)
    # Halves of halves: no piece is smaller than it must be.
    assert len(made) == 1 or min(part.stop - part.start for part in made) >= most // 2
    assert details.count == count
    assert details.missed == len(made)
    assert maker.closed == []
    handle.close()
    assert maker.open == []
    assert [each.closed for each in maker.things] == [1] * len(made)


def test_memory_that_lacks_only_later() -> None:
    maker = Maker(100, fail={2: OSError(errno.ENOMEM, "now it is full")})
    handle, details = parts.create(maker, 200)
    assert [each.made for each in maker.things] == [slice(0, 100), slice(100, 150), slice(150, 200)]
    assert details.count == 200
    handle.close()
    assert maker.open == []


def test_a_single_target_that_does_not_fit() -> None:
    maker = Maker(0)
    with pytest.raises(OSError, match="too many") as error:
        parts.create(maker, 1)
    assert error.value.errno == errno.ENOMEM
    assert maker.asked == [slice(0, 1)]


def test_halving_ends_at_one_target() -> None:
    maker = Maker(0)
    with pytest.raises(OSError, match="too many"):
        parts.create(maker, 1 << 20)
    assert maker.asked[-1] == slice(0, 1)
    assert len(maker.asked) == 21


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT, errno.ESRCH, errno.EMFILE, 524])
def test_no_other_error_is_reason_to_halve(number: int) -> None:
    maker = Maker(1000, fail={0: OSError(number, "no")})
    with pytest.raises(OSError, match="no") as error:
        parts.create(maker, 1000)
    assert error.value.errno == number
    assert len(maker.asked) == 1


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize(
    "failure", [OSError(errno.EMFILE, "no"), KeyError("a bug"), KeyboardInterrupt("now")]
)
def test_an_error_in_the_middle_leaves_nothing(at: int, failure: BaseException) -> None:
    # Calls: 0-400 no, 0-200 no, 0-100, 100-200, 200-400 no, 200-300, 300-400.
    maker = Maker(100, fail={at: failure})
    with pytest.raises(type(failure)) as error:
        parts.create(maker, 400)
    assert error.value is failure
    assert maker.open == []
    assert len(maker.asked) == at + 1
    assert all(each.closed == 1 for each in maker.things)


def test_an_error_is_told_even_if_closing_fails_as_well() -> None:
    """What the client has to know is why its link was not made."""
    closed: list[slice] = []

    def make(part: slice) -> tuple[Thing, LinkDetails]:
        if part == slice(0, 2):
            raise OSError(errno.ENOMEM, "too many")
        if part == slice(1, 2):
            raise OSError(errno.EMFILE, "no more")
        return Thing(part, closed, errno.EIO), LinkDetails(1, 1, 1, 0)

    with pytest.raises(OSError, match=r".") as error:
        parts.create(make, 2)
    assert closed == [slice(0, 1)]
    assert error.value.errno == errno.EMFILE


def test_closing_goes_on_after_an_error() -> None:
    closed: list[slice] = []
    fails = [0, errno.EIO, 0, errno.EINTR, 0]
    things = [Thing(slice(at, at + 1), closed, fail) for at, fail in enumerate(fails)]
    with pytest.raises(OSError, match="closing failed") as error:
        Parts(things).close()
    assert closed == [each.made for each in reversed(things)]
    # The first that came up, which is of the last piece but one.
    assert error.value.errno == errno.EINTR


def test_total() -> None:
    first, second = LinkDetails(5, 9, 10, 1), LinkDetails(6, 9, 20, 2)
    assert parts.total([first]) == first
    assert parts.total([first, second]) == LinkDetails(5, 9, 30, 3)
    assert parts.total([second, first]) == LinkDetails(6, 9, 30, 3)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_total_of_which_a_part_is_not_known_is_not_known(at: int) -> None:
    counts: list[int | None] = [1, 2, 3]
    counts[at] = None
    details = [LinkDetails(5, 9, count, 1) for count in counts]
    assert parts.total(details) == LinkDetails(5, 9, None, 3)
    details = [LinkDetails(5, 9, 1, count) for count in counts]
    assert parts.total(details) == LinkDetails(5, 9, 3, None)
    assert parts.total([LinkDetails(5, 9, 0, 0)] * 2) == LinkDetails(5, 9, 0, 0)


def test_present_details_are_those_of_all_parts() -> None:
    kernel = FakeKernel(most_targets=2)
    program = kernel.load_instructions(b"", "p", "GPL", "kprobe_multi", False).programs[0].fd
    addresses = [0xFFFFFFFF81001000 + 0x1000 * each for each in range(5)]

    def make(part: slice) -> parts.Made:
        return kernel.create_link(
            program,
            "kprobe_multi",
            retprobe=False,
            addresses=addresses[part],
            symbols=(),
            cookies=(),
        )

    handle, _ = parts.create(make, 5)
    try:
        assert len(kernel.attached) == 3
        for each in kernel.attached:
            kernel.tell(each, count=each.details.count, missed=10)
        found = parts.details_of(kernel, handle)
        assert (found.kernel_id, found.count, found.missed) == (
            kernel.attached[0].details.kernel_id,
            5,
            30,
        )
        single = kernel.attached[1]
        assert parts.details_of(kernel, single.fd) == single.details
    finally:
        handle.close()
        program.close()
    assert kernel.attached == []
