"""The symbol index, made of text as kernels write it."""

from __future__ import annotations

import pytest

from kpmd.core.symbols import SymbolIndex, names_in
from tests.fakes.kernel import ALIASES, AMBIGUOUS, FUNCTIONS, TEXT, UNTRACEABLE, symbol_files

KALLSYMS = b"""\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000010 T first
ffffffff81000010 t first_alias
ffffffff81000040 t twice
ffffffff81000080 t twice
ffffffff810000c0 W weak
ffffffff81000100 T endbr
ffffffff81000140 T untraceable
ffffffff82000000 D some_data
ffffffffc0000000 t in_module\t[mod_a]
ffffffffc0000040 t twice\t[mod_b]
ffffffffc0000080 t __pfx_x\t[mod_b]
"""

WITH_ADDRESSES = b"""\
ffffffff81000010 first
ffffffff81000044 twice
ffffffff81000084 twice
ffffffff810000c8 weak
ffffffff81000104 endbr
ffffffffc0000004 in_module [mod_a]
ffffffffc0000044 twice [mod_b]
"""

NAMES = b"""\
first
twice
twice
weak
endbr
in_module [mod_a]
twice [mod_b]
"""


def test_with_addresses() -> None:
    index = SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True)
    assert len(index) == 7
    assert index.has_addresses
    assert index.knows_traceable
    (found,) = index.find("endbr")
    assert (found.symbol, found.module, found.address) == ("endbr", None, 0xFFFFFFFF81000100)
    assert not found.ambiguous
    (found,) = index.find("in_module")
    assert (found.module, found.address) == ("mod_a", 0xFFFFFFFFC0000000)
    assert [each.address for each in index.find("weak")] == [0xFFFFFFFF810000C0]


def test_an_ambiguous_name_has_the_kernels_own_functions_first() -> None:
    index = SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True)
    found = index.find("twice")
    assert [(each.address, each.module) for each in found] == [
        (0xFFFFFFFF81000040, None),
        (0xFFFFFFFF81000080, None),
        (0xFFFFFFFFC0000040, "mod_b"),
    ]
    assert all(each.ambiguous for each in found)


def test_modules_come_last_where_they_lie_below_the_kernel() -> None:
    """As on arm64: the kernel still meets its own functions first."""
    kallsyms = b"ffff800000001000 t twice\t[mod]\nffff800080001000 T twice\n"
    listed = b"ffff800000001000 twice [mod]\nffff800080001000 twice\n"
    found = SymbolIndex.build(kallsyms, listed, True).find("twice")
    assert [each.module for each in found] == [None, "mod"]


@pytest.mark.parametrize(
    "name", ["untraceable", "some_data", "fir", "firs", "first2", "", "\u00e9"]
)
def test_what_cannot_be_traced_is_not_found(name: str) -> None:
    assert SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True).find(name) == []


def test_an_alias_is_found_under_its_own_name() -> None:
    index = SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True)
    (found,) = index.find("first_alias")
    assert (found.symbol, found.address, found.ambiguous) == (
        "first_alias",
        0xFFFFFFFF81000010,
        False,
    )
    at = index.at(0xFFFFFFFF81000010)
    assert at is not None
    assert at.symbol == "first"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFFFFFFF81000010, "first"),
        (0xFFFFFFFF81000014, None),
        (0xFFFFFFFF81000100, "endbr"),
        (0xFFFFFFFF81000104, "endbr"),
        (0xFFFFFFFF81000101, None),
        (0xFFFFFFFF81000108, None),
        (0xFFFFFFFF810000C8, "weak"),
        (0xFFFFFFFF810000C4, None),
        (0xFFFFFFFF81000140, None),
        (0xFFFFFFFFC0000044, "twice"),
        (0, None),
        (4, None),
        (2**64 - 1, None),
    ],
)
def test_by_address(address: int, name: str | None) -> None:
    """The start, or the traceable place that tracefs tells; nothing between or behind."""
    found = SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True).at(address)
    assert (found.symbol if found else None) == name
    if found:
        assert found.address == address & ~0xF


def test_a_place_far_from_any_start_is_left_out() -> None:
    listed = WITH_ADDRESSES + b"ffffffff81000154 strange\n0000000000000020 stranger\n"
    index = SymbolIndex.build(KALLSYMS, listed, True)
    assert index.find("strange") == []
    assert index.find("stranger") == []
    assert index.find("first")


def test_names_only_before_6_5() -> None:
    index = SymbolIndex.build(KALLSYMS, NAMES, False)
    assert len(index) == 7
    (found,) = index.find("endbr")
    assert found.address == 0xFFFFFFFF81000100
    assert [each.address for each in index.find("twice")] == [
        0xFFFFFFFF81000040,
        0xFFFFFFFF81000080,
        0xFFFFFFFFC0000040,
    ]
    assert index.has_addresses


def test_names_only_where_a_name_is_traceable_in_part() -> None:
    """Which of the two it is, nobody tells: the kernel must be asked by name."""
    index = SymbolIndex.build(KALLSYMS, NAMES.replace(b"twice\ntwice\n", b"twice\n"), False)
    assert [each.address for each in index.find("twice")] == [0, 0xFFFFFFFFC0000040]
    assert not index.has_addresses
    assert [each.address for each in index.find("first")] == [0xFFFFFFFF81000010]


@pytest.mark.parametrize(("functions", "addresses"), [(WITH_ADDRESSES, True), (NAMES, False)])
def test_hidden_kallsyms(functions: bytes, addresses: bool) -> None:
    hidden = b"\n".join(b"0" * 16 + line[16:] for line in KALLSYMS.splitlines()) + b"\n"
    index = SymbolIndex.build(hidden, functions, addresses)
    assert index.knows_traceable
    assert not index.has_addresses
    assert len(index) == 7
    assert [each.address for each in index.find("endbr")] == [0]
    assert [each.module for each in index.find("in_module")] == ["mod_a"]
    assert index.find("untraceable") == []
    assert index.at(0) is None
    assert index.at(0xFFFFFFFF81000104) is None


@pytest.mark.parametrize("kallsyms", [KALLSYMS, b""])
def test_without_tracefs_nothing_is_known(kallsyms: bytes) -> None:
    index = SymbolIndex.build(kallsyms, None, False)
    assert not index.knows_traceable
    assert not index.has_addresses
    assert index.find("first") == []
    assert index.at(0xFFFFFFFF81000010) is None


def test_empty_files() -> None:
    index = SymbolIndex.build(b"", b"", True)
    assert len(index) == 0
    assert index.find("first") == []
    assert list(index) == []


def test_iteration_is_by_name() -> None:
    names = [each.symbol for each in SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True)]
    assert names == sorted(names)
    assert len(names) == 7


def test_lines_of_another_form_are_passed_over() -> None:
    text = KALLSYMS + b"garbage\nffffffff81000200 T\n" + b"\xff\xfe\n"
    index = SymbolIndex.build(text, WITH_ADDRESSES + b"garbage\nzz first\n", True)
    assert len(index) == 7


def test_names_in() -> None:
    asked = {"first", "some_data", "in_module", "no_such", "fir", "mod_a", "", "\u00e9"}
    assert names_in(KALLSYMS, asked) == {"first", "some_data", "in_module"}
    assert names_in(b"", asked) == set()


def test_the_fake_kernels_own_files() -> None:
    files = symbol_files()
    index = SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)
    for name, (address, delta, module) in FUNCTIONS.items():
        (found,) = index.find(name)
        assert (found.address, found.module or "") == (address, module)
        assert index.at(address + delta) == found
    assert [each.address for each in index.find("cleanup")] == list(AMBIGUOUS["cleanup"])
    assert index.find("ksys_read_alias")[0].address == ALIASES["ksys_read_alias"]
    for name, address in UNTRACEABLE.items():
        assert index.find(name) == []
        assert index.at(address) is None
    assert index.at(TEXT) is None
