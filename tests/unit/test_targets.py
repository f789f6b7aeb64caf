"""What the targets that a client names resolve to, and what becomes of each that does not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core.deny import DenyList
from kpmd.core.globs import Glob
from kpmd.core.model import Skipped
from kpmd.core.specs import OnAmbiguous, OnUntraceable, TargetSpec
from kpmd.core.symbols import SymbolIndex
from kpmd.core.targets import MAX_SKIPPED, Resolved, resolve
from kpmd.errors import AddressNotTraceable, Invalid, KpmdError, SymbolNotFound
from tests.fakes.kernel import ADDED, AMBIGUOUS, FUNCTIONS, MODULES, TEXT, symbol_files

READ, WRITE, OPEN = (FUNCTIONS[name][0] for name in ("vfs_read", "vfs_write", "vfs_open"))
FIRST, SECOND = AMBIGUOUS["cleanup"]


def spec(
    symbols: Sequence[str] | None = None,
    addresses: Sequence[int] | None = None,
    cookies: Sequence[int] | None = None,
    **others: Any,
) -> TargetSpec:
    return TargetSpec(symbols, addresses, cookies=cookies, **others)


def index(**options: Any) -> SymbolIndex:
    files = symbol_files(**options)
    return SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)


INDEX = index()
NOTHING = SymbolIndex.build(b"", None, False)


def found(
    wanted: TargetSpec,
    where: SymbolIndex = INDEX,
    *,
    deny: str = "",
    blacklist: Sequence[str] = (),
    lenient: bool = False,
) -> Resolved:
    wanted.check()
    denials = DenyList.parse(deny).denials(where)
    return resolve(wanted, where, denials, blacklist.__contains__, lenient=lenient)


def told(resolved: Resolved) -> list[tuple[str, str]]:
    """What is skipped and why."""
    return [(each.symbol, each.reason) for each in resolved.skipped]


# Symbols


def test_names_become_addresses_in_their_order() -> None:
    resolved = found(spec(["vfs_write", "nf_hook", "vfs_read"], cookies=[1, 2, 3]))
    assert resolved.by_address
    assert resolved.targets.names == ("vfs_write", "nf_hook", "vfs_read")
    assert list(resolved.targets.addresses) == [WRITE, FUNCTIONS["nf_hook"][0], READ]
    assert list(resolved.targets.cookies) == [1, 2, 3]
    assert resolved.targets.modules == {1: "nf_tables"}
    assert len(resolved.targets) == 3
    assert resolved.skipped == ()


def test_without_cookies_they_are_zeros() -> None:
    assert list(found(spec(["vfs_write", "vfs_read"])).targets.cookies) == [0, 0]
    assert list(found(spec(["cleanup", "vfs_read"])).targets.cookies) == [0, 0]
    assert list(found(spec(None, [READ])).targets.cookies) == [0]
    assert list(found(spec(patterns=["vfs_*"])).targets.cookies) == [0, 0, 0]


def test_of_an_ambiguous_name_the_first() -> None:
    resolved = found(spec(["vfs_read", "cleanup", "vfs_write"], cookies=[1, 2, 3]))
    assert list(resolved.targets.addresses) == [READ, FIRST, WRITE]
    assert list(resolved.targets.cookies) == [1, 2, 3]
    (skipped,) = resolved.skipped
    assert (skipped.symbol, skipped.module, skipped.reason) == ("cleanup", None, "ambiguous")
    assert f"0x{FIRST:016x}" in skipped.detail


def test_all_of_an_ambiguous_name_with_its_cookie() -> None:
    wanted = spec(["vfs_read", "cleanup", "vfs_write"], cookies=[1, 2, 3], on_ambiguous="all")
    resolved = found(wanted)
    assert list(resolved.targets.addresses) == [READ, FIRST, SECOND, WRITE]
    assert resolved.targets.names == ("vfs_read", "cleanup", "cleanup", "vfs_write")
    assert list(resolved.targets.cookies) == [1, 2, 2, 3]
    assert resolved.skipped == ()


def test_an_ambiguous_name_as_an_error() -> None:
    with pytest.raises(Invalid) as error:
        found(spec(["vfs_read", "cleanup"], on_ambiguous="error"))
    assert "'cleanup'" in error.value.detail
    assert error.value.fields["symbols"] == ["cleanup"]
    assert error.value.fields["symbols_total"] == 1
    assert list(found(spec(["vfs_read"], on_ambiguous="error")).targets.addresses) == [READ]


def test_all_missing_names_are_told_in_their_order() -> None:
    with pytest.raises(SymbolNotFound) as error:
        found(spec(["z_no", "vfs_read", "a_no", "do_idle_loop"]))
    assert error.value.fields["symbols"] == ["z_no", "a_no", "do_idle_loop"]
    reasons = [each["msg"] for each in error.value.fields["errors"]]
    assert ["does not exist" in each for each in reasons] == [True, True, False]
    assert "the kernel cannot trace it" in reasons[2]


def test_a_blacklisted_function_says_so() -> None:
    with pytest.raises(SymbolNotFound) as error:
        found(spec(["do_idle_loop", "no_such"]), blacklist=["do_idle_loop", "no_such", "vfs_read"])
    first, second = [each["msg"] for each in error.value.fields["errors"]]
    assert "blacklist" in first
    assert "does not exist" in second
    # What can be traced is attached to: the list is about kprobes.
    assert len(found(spec(["vfs_read"]), blacklist=["vfs_read"]).targets) == 1


def test_missing_names_are_skipped_if_asked_for() -> None:
    resolved = found(
        spec(
            ["no_such", "vfs_read", "do_idle_loop", "also_not", "vfs_write"],
            cookies=[1, 2, 3, 4, 5],
            on_untraceable="skip",
        ),
        blacklist=["do_idle_loop"],
    )
    assert resolved.targets.names == ("vfs_read", "vfs_write")
    assert list(resolved.targets.cookies) == [2, 5]
    assert told(resolved) == [
        ("no_such", "unknown"),
        ("do_idle_loop", "blacklisted"),
        ("also_not", "unknown"),
    ]


def test_nothing_left_of_symbols_is_an_error_all_the_same() -> None:
    with pytest.raises(SymbolNotFound) as error:
        found(spec(["no_such", "do_idle_loop"], on_untraceable="skip"))
    assert error.value.fields["symbols"] == ["no_such", "do_idle_loop"]


@pytest.mark.parametrize("on_ambiguous", ["first", "error"])
@pytest.mark.parametrize(
    "names",
    [
        ["vfs_open", "vfs_read", "ksys_read_alias"],
        ["ksys_read_alias", "vfs_open", "vfs_read"],
        ["vfs_read", "vfs_open", "ksys_read_alias"],
    ],
)
def test_two_names_of_one_function_are_one_too_many(
    names: list[str], on_ambiguous: OnAmbiguous
) -> None:
    with pytest.raises(Invalid) as error:
        found(spec(names, on_ambiguous=on_ambiguous))
    at = max(names.index("vfs_read"), names.index("ksys_read_alias"))
    assert error.value.fields["errors"][0]["loc"] == ["symbols", at]


def test_the_place_of_a_repeated_function_counts_what_is_skipped() -> None:
    """``loc`` is a place in what the client sent."""
    wanted = spec(["no_such", "vfs_read", "vfs_open", "ksys_read_alias"], on_untraceable="skip")
    with pytest.raises(Invalid) as error:
        found(wanted)
    assert error.value.fields["errors"][0]["loc"] == ["symbols", 3]
    with pytest.raises(Invalid) as error:
        found(spec(None, [TEXT + 1, READ, READ + 4], on_untraceable="skip"))
    assert error.value.fields["errors"][0]["loc"] == ["addresses", 2]


def test_two_names_of_one_function_are_told_where_addresses_are_hidden() -> None:
    where = index(hidden=True, added=[("spread.isra.0", "")])
    with pytest.raises(Invalid) as error:
        found(spec(["vfs_read", "spread", "spread.isra.0"]), where)
    assert error.value.fields["errors"][0]["loc"] == ["symbols", 2]
    assert "0x0000000000000000" not in error.value.detail


def test_all_of_two_names_that_overlap_has_each_once() -> None:
    where = index(added=[("f.isra.0", ""), ("f.constprop.0", "")])
    wanted = spec(["f", "vfs_read", "f.isra.0"], cookies=[1, 2, 3], on_ambiguous="all")
    resolved = found(wanted, where)
    assert list(resolved.targets.addresses) == [ADDED, ADDED + 0x40, READ]
    assert list(resolved.targets.cookies) == [1, 1, 2]


def test_a_function_that_is_named_itself_is_not_told_as_left_out() -> None:
    where = index(added=[("f.constprop.0", ""), ("f.isra.0", "")])
    resolved = found(spec(["f", "f.isra.0"]), where)
    assert list(resolved.targets.addresses) == [ADDED, ADDED + 0x40]
    assert told(resolved) == []


def test_variants_of_the_compiler_keep_their_own_name() -> None:
    where = index(added=[("spread.isra.0", "")])
    resolved = found(spec(["vfs_read", "spread"]), where)
    assert resolved.targets.names == ("vfs_read", "spread.isra.0")
    assert list(resolved.targets.addresses) == [READ, ADDED]


def test_what_is_attached_to_is_not_skipped_as_well() -> None:
    """Static functions of one name in two files, specialised in the same way."""
    where = index(added=[("f.isra.0", ""), ("f.isra.0", "")])
    resolved = found(spec(["f"]), where)
    assert list(resolved.targets.addresses) == [ADDED]
    assert told(resolved) == [("f.isra.0", "ambiguous")]


def test_names_are_not_globs() -> None:
    for name in ("vfs_*", "vfs_?ead", "nf_hook[nf_tables]", "nf_hook [nf_tables]"):
        with pytest.raises(SymbolNotFound):
            found(spec([name]))


def test_the_deny_list_is_for_patterns_only() -> None:
    assert len(found(spec(["vfs_read"]), deny="vfs_* no\n").targets) == 1
    assert len(found(spec(None, [READ]), deny="vfs_* no\n").targets) == 1


# Addresses


def test_addresses_are_normalised_to_starts() -> None:
    resolved = found(spec(None, [WRITE + 4, OPEN], [9, 8]))
    assert resolved.by_address
    assert list(resolved.targets.addresses) == [WRITE, OPEN]
    assert list(resolved.targets.cookies) == [9, 8]
    assert resolved.targets.names == ("vfs_write", "vfs_open")


@pytest.mark.parametrize("on_ambiguous", ["first", "all", "error"])
def test_two_addresses_of_one_function_are_one_too_many(on_ambiguous: OnAmbiguous) -> None:
    with pytest.raises(Invalid) as error:
        found(spec(None, [WRITE, WRITE + 4], [1, 2], on_ambiguous=on_ambiguous))
    assert error.value.fields["errors"][0]["loc"] == ["addresses", 1]


def test_all_addresses_that_cannot_be_traced_are_told() -> None:
    with pytest.raises(AddressNotTraceable) as error:
        found(spec(None, [TEXT, READ, READ + 1]))
    assert error.value.fields["addresses"] == [f"0x{TEXT:016x}", f"0x{READ + 1:016x}"]
    assert error.value.fields["addresses_total"] == 2


def test_addresses_that_cannot_be_traced_are_skipped_if_asked_for() -> None:
    resolved = found(spec(None, [TEXT, READ, READ + 1, OPEN], [1, 2, 3, 4], on_untraceable="skip"))
    assert list(resolved.targets.addresses) == [READ, OPEN]
    assert list(resolved.targets.cookies) == [2, 4]
    assert told(resolved) == [
        (f"0x{TEXT:016x}", "untraceable"),
        (f"0x{READ + 1:016x}", "untraceable"),
    ]


def test_nothing_left_of_addresses_is_told_as_addresses() -> None:
    with pytest.raises(AddressNotTraceable) as error:
        found(spec(None, [TEXT, READ + 1], on_untraceable="skip"))
    assert error.value.fields["addresses"] == [f"0x{TEXT:016x}", f"0x{READ + 1:016x}"]


@pytest.mark.parametrize("on_ambiguous", ["first", "all", "error"])
def test_an_address_is_never_ambiguous(on_ambiguous: OnAmbiguous) -> None:
    resolved = found(spec(None, [SECOND], on_ambiguous=on_ambiguous))
    assert list(resolved.targets.addresses) == [SECOND]
    assert resolved.targets.names == ("cleanup",)
    assert resolved.skipped == ()


# Patterns


def test_patterns_take_functions_in_the_order_of_their_addresses() -> None:
    resolved = found(spec(patterns=["vfs_w*", "*read", "vfs_*"]))
    assert resolved.targets.names == ("vfs_read", "vfs_write", "vfs_open")
    assert list(resolved.targets.addresses) == [READ, WRITE, OPEN]
    assert resolved.by_address
    assert resolved.skipped == ()


def test_patterns_of_a_module() -> None:
    where = index(added=[("nf_other", ""), ("nf_more", "nf_nat")])
    assert found(spec(patterns=["nf_*"]), where).targets.modules == {1: "nf_tables", 2: "nf_nat"}
    resolved = found(spec(patterns=["nf_*[nf_tables]"]), where)
    assert resolved.targets.names == ("nf_hook",)
    assert found(spec(patterns=["nf_*[nf_*]"]), where).targets.names == ("nf_hook", "nf_more")
    assert found(spec(patterns=["nf_*[vmlinux]"]), where).targets.names == ("nf_other",)
    assert found(spec(patterns=["*[nf_nat]"]), where).targets.names == ("nf_more",)


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(SymbolNotFound) as error:
        found(spec(patterns=["vfs_*", "no_such_*"]))
    assert "'no_such_*'" in error.value.detail
    assert error.value.fields["symbols"] == ["no_such_*"]
    assert "matches no function" in error.value.fields["errors"][0]["msg"]
    with pytest.raises(SymbolNotFound) as error:
        found(spec(patterns=["do_idle*"]))
    assert "none of which the kernel can trace" in error.value.detail
    with pytest.raises(SymbolNotFound) as error:
        found(spec(patterns=["vfs_*[nf_tables]"]))
    assert error.value.fields["symbols"] == ["vfs_*[nf_tables]"]


def test_exclude() -> None:
    resolved = found(spec(patterns=["vfs_*"], exclude=["*_read", "*_write", "matches_nothing"]))
    assert resolved.targets.names == ("vfs_open",)
    assert resolved.skipped == ()
    assert found(spec(patterns=["*"], exclude=["*[vmlinux]"])).targets.names == ("nf_hook",)
    # Another name of vfs_read.
    resolved = found(spec(patterns=["vfs_*"], exclude=["ksys_read_alias"]))
    assert resolved.targets.names == ("vfs_write", "vfs_open")


@pytest.mark.parametrize("exclude", [["*"], ["vfs_*"], ["vfs_r*", "vfs_w*", "vfs_o*"]])
def test_all_excluded(exclude: list[str]) -> None:
    with pytest.raises(SymbolNotFound) as error:
        found(spec(patterns=["vfs_*"], exclude=exclude))
    assert "excluded" in error.value.detail


def test_what_is_denied_is_told_with_its_reason() -> None:
    resolved = found(spec(patterns=["vfs_*", "nf_*"]), deny="*_read too hot\nnf_* in a module\n")
    assert resolved.targets.names == ("vfs_write", "vfs_open")
    assert [(each.symbol, each.module, each.reason) for each in resolved.skipped] == [
        ("vfs_read", None, "denied"),
        ("nf_hook", "nf_tables", "denied"),
    ]
    assert "too hot" in resolved.skipped[0].detail


def test_what_is_excluded_is_not_told_as_denied() -> None:
    wanted = spec(patterns=["vfs_*"], exclude=["*_read"])
    assert found(wanted, deny="*_read too hot\n").skipped == ()


def test_all_denied() -> None:
    with pytest.raises(SymbolNotFound) as error:
        found(spec(patterns=["vfs_*"]), deny="vfs_* too hot\n")
    assert error.value.fields["symbols"] == ["vfs_read", "vfs_write", "vfs_open"]
    assert "too hot" in error.value.fields["errors"][0]["msg"]


@pytest.mark.parametrize(
    ("on_ambiguous", "addresses", "skipped"),
    [
        ("first", [FIRST], [("cleanup", "ambiguous")]),
        ("all", [FIRST, SECOND], []),
    ],
)
def test_ambiguous_names_in_patterns(
    on_ambiguous: OnAmbiguous, addresses: list[int], skipped: list[tuple[str, str]]
) -> None:
    for pattern in ("cleanup", "clean*", "c?eanup[vmlinux]"):
        resolved = found(spec(patterns=[pattern], on_ambiguous=on_ambiguous))
        assert list(resolved.targets.addresses) == addresses
        assert told(resolved) == skipped


def test_ambiguous_names_in_patterns_as_an_error() -> None:
    with pytest.raises(Invalid) as error:
        found(spec(patterns=["*"], on_ambiguous="error"))
    assert error.value.fields["symbols"] == ["cleanup"]
    excluded = spec(patterns=["*"], exclude=["cleanup"], on_ambiguous="error")
    assert len(found(excluded).targets) == len(FUNCTIONS)


def test_a_name_that_is_not_ambiguous_in_its_module() -> None:
    where = index(added=[("vfs_read", "mod")])
    for on_ambiguous in ("first", "all", "error"):
        resolved = found(spec(patterns=["vfs_read[mod]"], on_ambiguous=on_ambiguous), where)
        assert list(resolved.targets.addresses) == [MODULES]
        assert resolved.targets.modules == {0: "mod"}
        assert resolved.skipped == ()


def test_patterns_find_variants_of_the_compiler() -> None:
    where = index(added=[("spread.isra.0", ""), ("split.cold", "")])
    assert found(spec(patterns=["spread"]), where).targets.names == ("spread.isra.0",)
    assert found(spec(patterns=["spr*d"]), where).targets.names == ("spread.isra.0",)
    with pytest.raises(SymbolNotFound):
        found(spec(patterns=["split"]), where)


def test_untraceable_functions_in_patterns() -> None:
    where = index(untraceable=["vfs_hidden", "vfs_black"])
    for on_untraceable in (None, "skip"):
        resolved = found(spec(patterns=["vfs_*"], on_untraceable=on_untraceable), where)
        assert len(resolved.targets) == 3
        # A pattern is about what can be traced; only a dry run tells of all the rest.
        assert resolved.skipped == ()
    with pytest.raises(SymbolNotFound) as error:
        found(spec(patterns=["vfs_*"], on_untraceable="error"), where, blacklist=["vfs_black"])
    assert error.value.fields["symbols"] == ["vfs_hidden", "vfs_black"]
    reasons = [each["msg"] for each in error.value.fields["errors"]]
    assert ["blacklist" in each for each in reasons] == [False, True]
    spared = spec(patterns=["vfs_*"], exclude=["vfs_hidden", "*black"], on_untraceable="error")
    assert len(found(spared, where).targets) == 3


def test_patterns_that_overlap_with_other_spellings() -> None:
    resolved = found(spec(patterns=["vfs_*", "vfs_**", "ksys_read_alias", "vfs_read"]))
    assert resolved.targets.names == ("vfs_read", "vfs_write", "vfs_open")


# Kernels that tell less


def test_hidden_addresses_leave_names_to_the_kernel() -> None:
    where = index(hidden=True)
    resolved = found(spec(["vfs_read", "nf_hook"]), where)
    assert not resolved.by_address
    assert resolved.targets.names == ("vfs_read", "nf_hook")
    assert list(resolved.targets.addresses) == []
    assert resolved.targets.modules == {1: "nf_tables"}
    assert len(resolved.targets) == 2
    with pytest.raises(SymbolNotFound):
        found(spec(["do_idle_loop"]), where)
    resolved = found(spec(None, [1, 2]), where)
    assert resolved.by_address
    assert list(resolved.targets.addresses) == [1, 2]
    resolved = found(spec(patterns=["vfs_*"]), where)
    assert not resolved.by_address
    assert resolved.targets.names == ("vfs_read", "vfs_write", "vfs_open")


def test_no_address_is_made_up_where_they_are_hidden() -> None:
    resolved = found(spec(["cleanup", "vfs_read"]), index(hidden=True))
    assert resolved.targets.names == ("cleanup", "vfs_read")
    (skipped,) = resolved.skipped
    assert skipped.reason == "ambiguous"
    assert "0x0000000000000000" not in skipped.detail


@pytest.mark.parametrize(
    "wanted",
    [
        spec(patterns=["vfs_read[mod]"]),
        spec(patterns=["vfs_*[mod]"]),
        spec(["vfs_read", "vfs_write"], on_ambiguous="all"),
        spec(patterns=["vfs_read"], on_ambiguous="all"),
        spec(patterns=["vfs_read"], exclude=["*[vmlinux]"]),
    ],
    ids=["module", "glob", "all of symbols", "all of patterns", "excluded"],
)
def test_a_name_alone_is_not_given_to_the_kernel_for_another_function(wanted: TargetSpec) -> None:
    """By name it takes the first: the kernel's own vfs_read, and that twice is an ESRCH."""
    where = index(hidden=True, added=[("vfs_read", "mod")])
    try:
        resolved = found(wanted, where)
    except KpmdError:
        return
    targets = resolved.targets
    assert resolved.by_address or not any(
        name == "vfs_read" and targets.modules.get(at) == "mod"
        for at, name in enumerate(targets.names)
    )


def test_addresses_of_names_that_are_traceable_in_part_are_left_to_the_kernel() -> None:
    """Before 6.5 tracefs tells names only: of two functions of one name it may list one."""
    files = symbol_files(addresses=False)
    assert files.functions is not None
    listed = files.functions.replace(b"cleanup\ncleanup\n", b"cleanup\n")
    where = SymbolIndex.build(files.kallsyms, listed, False)
    resolved = found(spec(None, [SECOND], [7]), where)
    assert resolved.by_address
    assert (list(resolved.targets.addresses), list(resolved.targets.cookies)) == ([SECOND], [7])
    # Others are known, and told apart from what is not traceable.
    assert found(spec(None, [READ]), where).targets.names == ("vfs_read",)
    for addresses in ([READ, READ + 1], [SECOND, READ + 1]):
        with pytest.raises(AddressNotTraceable) as error:
            found(spec(None, addresses), where)
        assert f"0x{READ + 1:016x}" in error.value.fields["addresses"]


def test_without_tracefs_all_is_left_to_the_kernel() -> None:
    resolved = found(spec(["no_such"], cookies=[2**64 - 1]), NOTHING)
    assert not resolved.by_address
    assert resolved.targets.names == ("no_such",)
    assert list(resolved.targets.cookies) == [2**64 - 1]
    assert found(spec(None, [1]), NOTHING).by_address


@pytest.mark.parametrize("lenient", [False, True])
def test_without_tracefs_there_are_no_patterns(lenient: bool) -> None:
    with pytest.raises(Invalid) as error:
        found(spec(patterns=["vfs_*"]), NOTHING, lenient=lenient)
    assert error.value.fields["errors"][0]["loc"] == ["patterns"]


# Lenient, for dry runs


def test_lenient_tells_what_would_be_an_error() -> None:
    resolved = found(spec(["no_such", "vfs_read", "do_idle_loop"]), lenient=True)
    assert resolved.targets.names == ("vfs_read",)
    assert told(resolved) == [("no_such", "unknown"), ("do_idle_loop", "untraceable")]
    resolved = found(spec(None, [TEXT, READ]), lenient=True)
    assert list(resolved.targets.addresses) == [READ]
    assert told(resolved) == [(f"0x{TEXT:016x}", "untraceable")]
    resolved = found(spec(["cleanup", "vfs_read"], on_ambiguous="error"), lenient=True)
    assert resolved.targets.names == ("vfs_read",)
    assert told(resolved) == [("cleanup", "ambiguous")]
    resolved = found(
        spec(patterns=["clean*", "vfs_r*"], on_ambiguous="error"), deny="vfs_read x\n", lenient=True
    )
    assert len(resolved.targets) == 0
    assert sorted(told(resolved)) == [("cleanup", "ambiguous"), ("vfs_read", "denied")]


@pytest.mark.parametrize(
    "wanted",
    [
        spec(["no_such"]),
        spec(None, [1]),
        spec(patterns=["no_such*"]),
        spec(patterns=["vfs_*"], exclude=["*"]),
    ],
)
def test_lenient_may_find_nothing(wanted: TargetSpec) -> None:
    assert len(found(wanted, lenient=True).targets) == 0


def test_lenient_tells_what_a_pattern_cannot_trace() -> None:
    where = index(untraceable=["vfs_hidden", "vfs_black", "vfs_out"])
    wanted = spec(patterns=["vfs_*"], exclude=["*_out"])
    resolved = found(wanted, where, blacklist=["vfs_black"], lenient=True)
    assert told(resolved) == [("vfs_hidden", "untraceable"), ("vfs_black", "blacklisted")]


# Properties

NAMES = ["a", "b", "f.isra.0", "f.constprop.0", "g.isra.0"]
ABSENT = ["no_such", "dark", "black", "f.cold"]
EVERY = [*NAMES, *ABSENT, "f", "g", "also_a"]

#: Lines of tracefs's list: names may stand several times, and in modules.
LISTS = st.tuples(
    st.lists(st.tuples(st.sampled_from(NAMES), st.just("")), min_size=2, max_size=6),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["m1", "m2"])), max_size=4),
).map(lambda both: [*both[0], *both[1]])

ON_AMBIGUOUS = st.sampled_from(["first", "all", "error"])
ON_UNTRACEABLE = st.sampled_from([None, "error", "skip"])
DENY = st.sampled_from(["", "a no\n", "a[m1] no\nb no\n", "*[m2] no\n", "* no\n"])


def small(listed: Sequence[tuple[str, str]], hidden: bool) -> SymbolIndex:
    kallsyms, functions = "", ""
    for number, (name, module) in enumerate(listed):
        address = (MODULES if module else TEXT) + 64 * number
        suffix = f"\t[{module}]" if module else ""
        kallsyms += f"{0 if hidden else address:016x} t {name}{suffix}\n"
        if name == "a" and not module and "also_a" not in kallsyms:
            kallsyms += f"{0 if hidden else address:016x} t also_a\n"
        functions += f"{address + 4:016x} {name}" + (f" [{module}]" if module else "") + "\n"
    own = "".join(
        f"{0 if hidden else TEXT + 0x9000 + 64 * at:016x} t {name}\n"
        for at, name in enumerate(ABSENT[1:])
    )
    return SymbolIndex.build((own + kallsyms).encode(), functions.encode(), True)


def counted(skipped: Sequence[Skipped]) -> Counter[tuple[str, str | None]]:
    return Counter((each.symbol, each.module) for each in skipped)


@settings(derandomize=True, database=None, deadline=None, max_examples=600)
@given(
    LISTS,
    st.lists(st.sampled_from(EVERY), unique=True, min_size=1),
    ON_AMBIGUOUS,
    ON_UNTRACEABLE,
    st.booleans(),
)
def test_every_function_of_a_name_is_a_target_or_skipped(
    listed: list[tuple[str, str]],
    names: list[str],
    on_ambiguous: OnAmbiguous,
    on_untraceable: OnUntraceable | None,
    lenient: bool,
) -> None:
    where = small(listed, hidden=False)
    wanted = spec(names, on_ambiguous=on_ambiguous, on_untraceable=on_untraceable)
    if not where.knows_traceable:
        return
    meant = [where.find(name) for name in names]
    several = [name for name, positions in zip(names, meant, strict=True) if len(positions) > 1]
    try:
        resolved = found(wanted, where, blacklist=["black"], lenient=lenient)
    except Invalid:
        flat = [position for positions in meant for position in positions]
        overlap = len(set(flat)) < len(flat)
        assert overlap or (several and on_ambiguous == "error" and not lenient)
        return
    except SymbolNotFound:
        assert not lenient
        assert not all(meant)
        assert not wanted.skips or not any(meant)
        return
    addresses = list(resolved.targets.addresses)
    assert len(set(addresses)) == len(addresses) == len(resolved.targets.names)
    taken = [where.at(address) for address in addresses]
    # What is absent is skipped as what it was asked for, with the reason of each.
    absent = {name for name, positions in zip(names, meant, strict=True) if not positions}
    reasons = {each.symbol: each.reason for each in resolved.skipped if each.symbol in absent}
    assert reasons == {
        name: {"no_such": "unknown", "black": "blacklisted"}.get(
            name, "untraceable" if name in ABSENT else "unknown"
        )
        for name in absent
    }
    others = [each for each in resolved.skipped if each.symbol not in absent]
    assert {each.reason for each in others} <= {"ambiguous"}
    if on_ambiguous == "error":
        assert [each.symbol for each in others] == several
        left = {at for positions in meant if len(positions) < 2 for at in positions}
        assert set(taken) == left
        return
    assert set(taken) == {
        at for positions in meant for at in (positions if on_ambiguous == "all" else positions[:1])
    }
    # None of those that are targets is told as skipped, and all the others are.
    expected = Counter(
        (where.names[at], where.module(at))
        for at in (at for positions in meant for at in positions)
        if on_ambiguous == "first" and at not in taken
    )
    assert set(counted(others)) == set(expected)
    assert all(counted(others)[each] <= expected[each] for each in expected)


GLOBS = st.sampled_from(
    [
        "a",
        "b",
        "f",
        "also_a",
        "*",
        "?",
        "f*",
        "*.isra.0",
        "*[m1]",
        "*[vmlinux]",
        "?[m*]",
        "a[m2]",
        "dark",
        "d*",
        "no_such*",
    ]
)


@settings(derandomize=True, database=None, deadline=None, max_examples=600)
@given(
    LISTS,
    st.lists(GLOBS, unique=True, min_size=1, max_size=4),
    st.lists(GLOBS, max_size=2),
    ON_AMBIGUOUS,
    DENY,
    st.booleans(),
)
def test_every_function_that_a_pattern_matches_is_a_target_skipped_or_excluded(
    listed: list[tuple[str, str]],
    patterns: list[str],
    exclude: list[str],
    on_ambiguous: OnAmbiguous,
    deny: str,
    lenient: bool,
) -> None:
    where = small(listed, hidden=False)
    if not where.knows_traceable:
        return
    wanted = spec(patterns=patterns, exclude=exclude, on_ambiguous=on_ambiguous)
    excluded = {at for text in exclude for at in where.glob(Glob.parse(text))}
    each_matches = [set(where.glob(Glob.parse(text))) for text in patterns]
    meant = set().union(*each_matches) - excluded
    denied = meant & DenyList.parse(deny).denials(where).keys()
    left = meant - denied
    names = Counter(where.names[at] for at in left)
    several = {name for name, count in names.items() if count > 1}
    try:
        resolved = found(wanted, where, deny=deny, lenient=lenient)
    except Invalid:
        assert on_ambiguous == "error"
        assert several
        assert not lenient
        return
    except SymbolNotFound:
        assert not lenient
        assert not all(each_matches) or not left
        return
    taken = [where.at(address) for address in resolved.targets.addresses]
    assert taken == sorted({at for at in taken if at is not None})
    assert set(taken) <= left
    skipped = [each for each in resolved.skipped if each.reason in ("denied", "ambiguous")]
    if not lenient:
        assert skipped == list(resolved.skipped)
    of_denied = Counter((where.names[at], where.module(at)) for at in denied)
    assert counted([each for each in skipped if each.reason == "denied"]) == of_denied
    ambiguous = [each for each in skipped if each.reason == "ambiguous"]
    if on_ambiguous == "error":
        assert {each.symbol for each in ambiguous} == several
        assert set(taken) == {at for at in left if where.names[at] not in several}
    else:
        missing = Counter((where.names[at], where.module(at)) for at in left - set(taken))
        assert counted(ambiguous) == missing
        if on_ambiguous == "all":
            assert not ambiguous
        else:
            firsts = {name: min(at for at in left if where.names[at] == name) for name in names}
            assert set(taken) == set(firsts.values())


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(
    LISTS,
    st.lists(
        st.tuples(st.integers(-1, 10), st.sampled_from([0, 4, 1, 8])), unique=True, min_size=1
    ),
    ON_UNTRACEABLE,
    st.booleans(),
)
def test_every_address_is_a_target_or_skipped(
    listed: list[tuple[str, str]],
    asked: list[tuple[int, int]],
    on_untraceable: OnUntraceable | None,
    lenient: bool,
) -> None:
    where = small(listed, hidden=False)
    if not where.knows_traceable:
        return
    starts = list(where.addresses)
    addresses = [
        (starts[number] if 0 <= number < len(starts) else TEXT + 0x8000 + 64 * number) + behind
        for number, behind in asked
    ]
    cookies = list(range(1, len(addresses) + 1))
    wanted = spec(None, addresses, cookies, on_untraceable=on_untraceable)
    there = [where.at(address) for address in addresses]
    known = [at for at in there if at is not None]
    try:
        resolved = found(wanted, where, lenient=lenient)
    except Invalid:
        assert len(set(addresses)) < len(addresses) or len(set(known)) < len(known)
        return
    except KpmdError:
        assert not lenient
        assert None in there
        assert not wanted.skips or not known
        return
    assert list(resolved.targets.addresses) == [starts[at] for at in known]
    assert list(resolved.targets.cookies) == [
        cookie for cookie, at in zip(cookies, there, strict=True) if at is not None
    ]
    assert [each.symbol for each in resolved.skipped] == [
        f"0x{address:016x}" for address, at in zip(addresses, there, strict=True) if at is None
    ]


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(FUNCTIONS)), unique=True, min_size=1).flatmap(
        lambda names: st.tuples(
            st.just(names),
            st.lists(st.integers(0, 2**64 - 1), min_size=len(names), max_size=len(names)),
        )
    ),
    st.booleans(),
    st.booleans(),
)
def test_each_target_keeps_its_cookie(
    asked: tuple[list[str], list[int]], by_address: bool, slow: bool
) -> None:
    """Also where a name is ambiguous or missing, which is not resolved in one go."""
    names, cookies = asked
    addresses = [FUNCTIONS[name][0] + FUNCTIONS[name][1] for name in names]
    more = [TEXT + 1] if by_address else ["no_such"]
    wanted = spec(
        None if by_address else [*more * slow, *names],
        [*more * slow, *addresses] if by_address else None,
        [77] * slow + cookies,
        on_untraceable="skip",
    )
    targets = found(wanted).targets
    assert list(targets.names) == names
    assert list(targets.addresses) == [FUNCTIONS[name][0] for name in names]
    assert list(targets.cookies) == cookies
    for position, name in enumerate(names):
        assert targets.modules.get(position, "") == FUNCTIONS[name][2]


# Cost


def many_untraceable() -> SymbolIndex:
    return index(untraceable=[f"not_to_be_traced_on_this_kernel_{at}" for at in range(60_000)])


def test_names_that_are_not_there_do_not_cost_a_look_through_all() -> None:
    """2^20 of them fit into one request."""
    where = many_untraceable()
    wanted = spec(["vfs_read", *(f"no_such_{at}" for at in range(2000))], on_untraceable="skip")
    before = time.process_time()
    assert len(found(wanted, where).skipped) == 2000
    assert time.process_time() - before < 0.3


def test_a_dry_run_of_everything_takes_no_minute() -> None:
    where = many_untraceable()
    before = time.process_time()
    wanted = spec(patterns=["*_1???", "vfs_*"])
    assert len(found(wanted, where, lenient=True).skipped) == 1000
    assert time.process_time() - before < 0.3


@pytest.mark.parametrize("lenient", [False, True])
def test_a_million_names_that_are_not_there_are_not_all_told(lenient: bool) -> None:
    """What is skipped is kept with the link, and told: there is a bound to it."""
    wanted = TargetSpec(
        symbols=[f"no_such_{number}" for number in range(MAX_SKIPPED + 1)], on_untraceable="skip"
    )
    with pytest.raises(Invalid) as error:
        resolve(
            wanted,
            SymbolIndex.build(b"", b"vfs_read\n", False),
            {},
            frozenset().__contains__,
            lenient=lenient,
        )
    assert str(MAX_SKIPPED) in error.value.detail
