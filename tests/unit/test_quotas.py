"""Limits, what is counted against them, and what a refusal says."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.bpf.objects import MapDetails
from kpmd.core.model import Caller
from kpmd.core.quotas import (
    KEPT,
    UNLIMITED,
    Accounts,
    Kept,
    Limits,
    check_targets_per_link,
    exceeded,
)
from kpmd.errors import Quota
from kpmd.runtime.quotas import OPEN, Counters, map_memory

NOTHING = dict.fromkeys(KEPT, 0)
SMALL = Limits(programs=2, links=2, targets=10, map_bytes=1000, leases=1)


def test_whoever_is_not_told_about_has_no_limits() -> None:
    assert Caller(1, 1, 1, admin=True).limits is Limits.unlimited()
    for each in dataclasses.fields(Limits):
        assert getattr(UNLIMITED, each.name) > getattr(Limits(), each.name)


@pytest.mark.parametrize("limit", [*KEPT, *OPEN])
def test_a_refusal_says_which_limit_and_what_to_do(limit: str) -> None:
    assert limit in {each.name for each in dataclasses.fields(Limits)}
    error = exceeded(limit, 7, 7)
    assert error.fields == {"limit": limit, "used": 7, "most": 7}
    assert "you have 7 " in error.detail
    assert f" of 7 ({limit}): " in error.detail
    assert error.detail.endswith(", or ask the administrator")
    more = exceeded(limit, 3, 7, 5)
    assert more.fields == {"limit": limit, "used": 3, "most": 7, "asked": 5}
    assert "5 more are asked for" in more.detail


def test_the_words_of_a_refusal() -> None:
    assert exceeded("links", 256, 256).detail == (
        "you have 256 links of 256 (links): detach some, or ask the administrator"
    )


def test_targets_of_one_link() -> None:
    check_targets_per_link(3, 3)
    with pytest.raises(Quota, match=r"4 targets; 3 are the most \(targets_per_link\)") as caught:
        check_targets_per_link(4, 3)
    assert caught.value.fields == {"limit": "targets_per_link", "used": 0, "most": 3, "asked": 4}


def test_a_claim_counts_until_its_block_ends() -> None:
    accounts = Accounts()
    with accounts.claim(1, SMALL) as claim:
        claim.want("links", 1)
        claim.want("targets", 4)
        assert accounts.used(1) == {**NOTHING, "links": 1, "targets": 4}
        assert accounts.used(2) == NOTHING
        # What is found out later takes the place of what was thought.
        claim.want("targets", 9)
        assert accounts.used(1)["targets"] == 9
        assert claim.room("targets") == 1
        claim.want("targets", 2)
        assert claim.room("targets") == 8
    assert accounts.used(1) == NOTHING


def test_a_claim_that_is_refused_stays_as_it_was() -> None:
    accounts = Accounts()
    with accounts.claim(1, SMALL) as mine, accounts.claim(1, SMALL) as other:
        other.want("targets", 3)
        mine.want("targets", 5)
        with pytest.raises(Quota) as caught:
            mine.want("targets", 8)
        assert caught.value.fields == {"limit": "targets", "used": 3, "most": 10, "asked": 8}
        assert accounts.used(1)["targets"] == 8
        mine.want("targets", 7)
    assert accounts.used(1) == NOTHING


def test_a_limit_that_was_lowered_refuses_only_what_is_new() -> None:
    accounts = Accounts()
    accounts.add(1, "map_bytes", 5000)
    with accounts.claim(1, SMALL) as claim:
        claim.want("map_bytes", 0)
        assert claim.room("map_bytes") == 0
        with pytest.raises(Quota):
            claim.want("map_bytes", 1)
    assert accounts.used(1)["map_bytes"] == 5000


def test_a_look_claims_nothing() -> None:
    accounts = Accounts()
    accounts.add(1, "links", 1)
    accounts.check(1, SMALL, "links", 1)
    with pytest.raises(Quota):
        accounts.check(1, SMALL, "links", 2)
    assert accounts.used(1) == {**NOTHING, "links": 1}


def test_settled_once_whatever_the_end_of_the_request() -> None:
    accounts = Accounts()
    with accounts.claim(1, SMALL) as claim:
        claim.want("links", 2)
        with accounts.settle(claim):
            accounts.add(1, "links", 1)
        assert accounts.used(1)["links"] == 1
    assert accounts.used(1)["links"] == 1


STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(KEPT), st.integers(0, 12), st.booleans()),
    max_size=50,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(STEPS)
def test_nobody_claims_more_than_the_most(steps: list[tuple[int, Kept, int, bool]]) -> None:
    """Against sums; claims 0 and 1 are one user's, 2 and 3 another's."""
    accounts = Accounts()
    claims = [accounts.claim(number // 2, SMALL) for number in range(4)]
    model: list[dict[Kept, int]] = [{} for _ in claims]
    for number, what, wanted, release in steps:
        others = model[number ^ 1].get(what, 0)
        if release:
            claims[number].release()
            model[number].clear()
        elif wanted <= model[number].get(what, 0) or others + wanted <= getattr(SMALL, what):
            claims[number].want(what, wanted)
            model[number][what] = wanted
        else:
            with pytest.raises(Quota):
                claims[number].want(what, wanted)
        for uid in (0, 1):
            for each in KEPT:
                held = sum(model[place].get(each, 0) for place in (2 * uid, 2 * uid + 1))
                assert accounts.used(uid)[each] == held <= getattr(SMALL, each)


def test_a_thread_that_looks_while_it_is_settled_sees_it_once() -> None:
    accounts = Accounts()
    with ThreadPoolExecutor(1) as pool, accounts.claim(1, SMALL) as claim:
        claim.want("links", 2)
        with accounts.settle(claim):
            looking = pool.submit(accounts.used, 1)
            assert not wait([looking], timeout=0.02).done
            accounts.add(1, "links", 2)
        assert looking.result()["links"] == 2


def test_two_threads_that_claim_at_once_have_no_more_than_one_may() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Slow(Limits):
        """Takes its time between the look at what is used and the claim."""

        def __getattribute__(self, name: str) -> object:
            if name == "targets":
                reached.set()
                assert go_on.wait(10)
            return super().__getattribute__(name)

    accounts = Accounts()
    slow, quick = accounts.claim(1, Slow(targets=10)), accounts.claim(1, SMALL)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.want, "targets", 6)
        assert reached.wait(10)
        second = pool.submit(quick.want, "targets", 6)
        assert not wait([second], timeout=0.02).done
        go_on.set()
        first.result()
        with pytest.raises(Quota):
            second.result()
    assert accounts.used(1)["targets"] == 6


def test_what_is_open_is_counted_by_user_and_kind() -> None:
    counters = Counters()
    with ExitStack() as stack:
        stack.enter_context(counters.hold(1, "streams", 2))
        stack.enter_context(counters.hold(1, "streams", 2))
        stack.enter_context(counters.hold(1, "requests", 1))
        stack.enter_context(counters.hold(2, "streams", 1))
        assert counters.usage(1) == {"streams": 2, "requests": 1, "connections": 0}
        with pytest.raises(Quota) as caught, counters.hold(1, "streams", 2):
            pytest.fail("there was no room")
        assert caught.value.fields == {"limit": "streams", "used": 2, "most": 2}
        assert counters.used(1, "streams") == 2
    assert counters.usage(1) == counters.usage(2) == dict.fromkeys(OPEN, 0)


def test_what_is_open_ends_with_an_error_too() -> None:
    counters = Counters()
    with pytest.raises(OSError, match="no"), counters.hold(1, "requests", 1):
        raise OSError("no")
    with counters.hold(1, "requests", 1):
        pass


def test_users_who_have_nothing_take_no_memory() -> None:
    counters, accounts = Counters(), Accounts()
    for uid in range(1000):
        counters.used(uid, "streams")
        accounts.used(uid)
        with counters.hold(uid, "streams", 1), accounts.claim(uid, SMALL) as claim:
            claim.want("links", 1)
    assert not counters._used
    assert not accounts._used


@pytest.mark.parametrize(
    ("type_", "key", "value", "entries", "expected"),
    [
        (2, 4, 4, 100, 100 * (4 + 8)),  # an array
        (6, 4, 4, 100, 100 * (4 + 8 * 3 + 64)),  # per CPU
        (1, 8, 12, 100, 100 * (8 + 16 + 64)),  # a hash
        (27, 0, 0, 65536, 65536),  # a ring buffer
    ],
)
def test_what_maps_weigh(type_: int, key: int, value: int, entries: int, expected: int) -> None:
    details = MapDetails(1, "m", "", type_, key, value, entries)
    assert map_memory(details, 3) == expected
    assert map_memory(details) >= expected // 3
