"""Checks of what a client asks for, and what its targets resolve to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core.model import Attach, Lifetime, LinkKind
from kpmd.core.specs import MAX_TARGETS, LinkSpec, check_kind
from kpmd.core.symbols import SymbolIndex
from kpmd.core.targets import Unresolved, resolve
from kpmd.errors import AddressNotTraceable, Invalid, WrongAttachType
from tests.fakes.kernel import AMBIGUOUS, FUNCTIONS, TEXT, symbol_files

READ, WRITE, OPEN = (FUNCTIONS[name][0] for name in ("vfs_read", "vfs_write", "vfs_open"))


def spec(
    symbols: Sequence[str] | None = None,
    addresses: Sequence[int] | None = None,
    cookies: Sequence[int] | None = None,
) -> LinkSpec:
    return LinkSpec("prg", "kprobe", symbols, addresses, cookies, {}, Lifetime("process"))


def index(**options: Any) -> SymbolIndex:
    files = symbol_files(**options)
    return SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (spec(), "give symbols or addresses"),
        (spec(cookies=[1]), "give symbols or addresses"),
        (spec(["a"], [1]), "not both"),
        (spec([], []), "not both"),
        (spec(["a"], [1], [1, 2, 3]), "not both"),
        (spec([]), "symbols: must not be empty"),
        (spec(None, []), "addresses: must not be empty"),
        (spec([], cookies=[1]), "symbols: must not be empty"),
        (spec(["a", "a"], cookies=[1]), "cookies: has 1 entries for 2 symbols"),
        (spec(None, [1, 2], []), "cookies: has 0 entries for 2 addresses"),
        (spec(["a\0"]), "symbols.0: has a NUL"),
        (spec(["a", ""]), "symbols.1: must not be empty"),
        (spec(["a" * 512]), "symbols.0: is longer"),
        (spec(["\u4e2d" * 171]), "symbols.0: is longer"),
        (spec(["a", "b", "a"]), "symbols.2: a stands at 0 already"),
        (spec(None, [5, 5]), "addresses.1: 0x0000000000000005 stands at 0 already"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_reference_librarys_order(
    wrong: LinkSpec, said: str
) -> None:
    with pytest.raises(Invalid) as error:
        wrong.check()
    assert said in error.value.detail


@pytest.mark.parametrize("count", [MAX_TARGETS, MAX_TARGETS + 1])
def test_the_most_targets(count: int) -> None:
    many = spec(None, range(count))
    if count <= MAX_TARGETS:
        many.check()
    else:
        with pytest.raises(Invalid):
            many.check()


@pytest.mark.parametrize(
    "good",
    [spec(["a"]), spec(["a" * 511]), spec(["\u4e2d" * 170]), spec(None, [0, 2**64 - 1], [0, 0])],
)
def test_what_makes_sense_passes(good: LinkSpec) -> None:
    good.check()


@pytest.mark.parametrize("attach", ["kprobe_multi", "kprobe_session"])
@pytest.mark.parametrize("kind", ["kprobe", "kretprobe", "session"])
def test_kinds(attach: Attach, kind: LinkKind) -> None:
    if (attach == "kprobe_session") == (kind == "session"):
        check_kind(attach, kind)
    else:
        with pytest.raises(WrongAttachType):
            check_kind(attach, kind)


def test_names_become_addresses_in_their_order() -> None:
    found = resolve(spec(["vfs_write", "nf_hook", "vfs_read"], cookies=[1, 2, 3]), index())
    assert found.by_address
    assert found.targets.names == ("vfs_write", "nf_hook", "vfs_read")
    assert list(found.targets.addresses) == [WRITE, FUNCTIONS["nf_hook"][0], READ]
    assert list(found.targets.cookies) == [1, 2, 3]
    assert found.targets.modules == {1: "nf_tables"}
    assert len(found.targets) == 3


def test_without_cookies_they_are_zeros() -> None:
    assert list(resolve(spec(["vfs_write", "vfs_read"]), index()).targets.cookies) == [0, 0]


def test_of_an_ambiguous_name_the_first() -> None:
    found = resolve(spec(["cleanup"]), index())
    assert list(found.targets.addresses) == [AMBIGUOUS["cleanup"][0]]


def test_all_missing_names_are_told_in_their_order() -> None:
    with pytest.raises(Unresolved) as error:
        resolve(spec(["z_no", "vfs_read", "a_no", "do_idle_loop"]), index())
    assert error.value.names == ["z_no", "a_no", "do_idle_loop"]


def test_two_names_of_one_function_are_one_too_many() -> None:
    with pytest.raises(Invalid) as error:
        resolve(spec(["vfs_read", "vfs_open", "ksys_read_alias"]), index())
    assert error.value.fields["errors"][0]["loc"] == ["symbols", 2]


def test_addresses_are_normalised_to_starts() -> None:
    found = resolve(spec(None, [WRITE + 4, OPEN], [9, 8]), index())
    assert found.by_address
    assert list(found.targets.addresses) == [WRITE, OPEN]
    assert list(found.targets.cookies) == [9, 8]
    assert found.targets.names == ("vfs_write", "vfs_open")


def test_two_addresses_of_one_function_are_one_too_many() -> None:
    with pytest.raises(Invalid) as error:
        resolve(spec(None, [WRITE, WRITE + 4]), index())
    assert error.value.fields["errors"][0]["loc"] == ["addresses", 1]


def test_all_addresses_that_cannot_be_traced_are_told() -> None:
    with pytest.raises(AddressNotTraceable) as error:
        resolve(spec(None, [TEXT, READ, READ + 1]), index())
    assert error.value.fields["addresses"] == [f"0x{TEXT:016x}", f"0x{READ + 1:016x}"]
    assert error.value.fields["addresses_total"] == 2


def test_hidden_addresses_leave_names_to_the_kernel() -> None:
    found = resolve(spec(["vfs_read", "nf_hook"]), index(hidden=True))
    assert not found.by_address
    assert found.targets.names == ("vfs_read", "nf_hook")
    assert list(found.targets.addresses) == []
    assert found.targets.modules == {1: "nf_tables"}
    assert len(found.targets) == 2
    with pytest.raises(Unresolved):
        resolve(spec(["do_idle_loop"]), index(hidden=True))
    found = resolve(spec(None, [1, 2]), index(hidden=True))
    assert found.by_address
    assert list(found.targets.addresses) == [1, 2]


def test_without_tracefs_all_is_left_to_the_kernel() -> None:
    nothing = SymbolIndex.build(b"", None, False)
    found = resolve(spec(["no_such"], cookies=[2**64 - 1]), nothing)
    assert not found.by_address
    assert found.targets.names == ("no_such",)
    assert list(found.targets.cookies) == [2**64 - 1]
    assert resolve(spec(None, [1]), nothing).by_address


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(FUNCTIONS)), unique=True, min_size=1).flatmap(
        lambda names: st.tuples(
            st.just(names),
            st.lists(st.integers(0, 2**64 - 1), min_size=len(names), max_size=len(names)),
        )
    ),
    st.booleans(),
)
def test_each_target_keeps_its_cookie(asked: tuple[list[str], list[int]], by_address: bool) -> None:
    names, cookies = asked
    addresses = [FUNCTIONS[name][0] + FUNCTIONS[name][1] for name in names]
    wanted = spec(None, addresses, cookies) if by_address else spec(names, None, cookies)
    wanted.check()
    targets = resolve(wanted, index()).targets
    assert list(targets.names) == names
    assert list(targets.addresses) == [FUNCTIONS[name][0] for name in names]
    assert list(targets.cookies) == cookies
    for position, name in enumerate(names):
        assert targets.modules.get(position, "") == FUNCTIONS[name][2]
