"""The symbol index, made of text as kernels write it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core.globs import Glob
from kpmd.core.symbols import Function, SymbolIndex, blacklist
from tests.fakes.kernel import ALIASES, AMBIGUOUS, FUNCTIONS, TEXT, UNTRACEABLE, symbol_files

KALLSYMS = b"""\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 t __pfx_first
ffffffff81000010 T first
ffffffff81000010 t first_alias
ffffffff81000040 t twice
ffffffff81000080 t twice
ffffffff810000c0 W weak
ffffffff81000100 T endbr
ffffffff81000140 T untraceable
ffffffff81000150 t untraceable_too
ffffffff81000160 t __pfx_untraceable_too
ffffffff81000180 t special.isra.0
ffffffff810001c0 t split
ffffffff81000200 t split.cold
ffffffff81000240 t part.part.0
ffffffff82000000 D some_data
ffffffffc0000000 t in_module\t[mod_a]
ffffffffc0000040 t twice\t[mod_b]
ffffffffc0000080 t __pfx_x\t[mod_b]
ffffffffc00000c0 t in_module_alone\t[mod_b]
"""

WITH_ADDRESSES = b"""\
ffffffff81000010 first
ffffffff81000044 twice
ffffffff81000084 twice
ffffffff810000c8 weak
ffffffff81000104 endbr
ffffffff81000184 special.isra.0
ffffffff810001c4 split
ffffffff81000200 split.cold
ffffffff81000240 part.part.0
ffffffffc0000004 in_module [mod_a]
ffffffffc0000044 twice [mod_b]
"""

NAMES = b"".join(line.partition(b" ")[2] for line in WITH_ADDRESSES.splitlines(keepends=True))

COUNT = 11

#: All addresses zeros, as the kernel writes them where it hides them.
HIDDEN = b"".join(b"0" * 16 + line[16:] for line in KALLSYMS.splitlines(keepends=True))


@pytest.fixture(scope="module")
def index() -> SymbolIndex:
    return SymbolIndex.build(KALLSYMS, WITH_ADDRESSES, True)


def addresses(index: SymbolIndex, name: str, module: str | None = None) -> list[int]:
    found = index.find(name, Glob.parse(f"{name}[{module}]") if module else None)
    return [index.addresses[position] for position in found]


def names(index: SymbolIndex, glob: str) -> list[str]:
    return [index.names[position] for position in index.glob(Glob.parse(glob))]


def name_at(index: SymbolIndex, address: int) -> str | None:
    position = index.at(address)
    return None if position is None else index.names[position]


# Functions


def test_one_function(index: SymbolIndex) -> None:
    assert len(index) == COUNT
    assert index.has_addresses
    assert index.knows_traceable
    (position,) = index.find("endbr")
    found = index.function(position)
    assert (found.symbol, found.module, found.address) == ("endbr", None, 0xFFFFFFFF81000100)
    assert not found.ambiguous
    (position,) = index.find("in_module")
    assert index.module(position) == "mod_a"
    assert index.function(position).module == "mod_a"
    assert index.addresses[position] == 0xFFFFFFFFC0000000


def test_positions_are_the_order_of_tracefs(index: SymbolIndex) -> None:
    assert index.names == [
        "first",
        "twice",
        "twice",
        "weak",
        "endbr",
        "special.isra.0",
        "split",
        "split.cold",
        "part.part.0",
        "in_module",
        "twice",
    ]


def test_an_address_is_the_start_and_not_the_traceable_place(index: SymbolIndex) -> None:
    """By the place behind its ENDBR, a function's program would read cookie 0."""
    assert addresses(index, "weak") == [0xFFFFFFFF810000C0]
    assert addresses(index, "first") == [0xFFFFFFFF81000010]
    assert addresses(index, "endbr") == [0xFFFFFFFF81000100]


# Names


def test_an_ambiguous_name_has_the_kernels_own_functions_first(index: SymbolIndex) -> None:
    found = [index.function(position) for position in index.find("twice")]
    assert [(each.address, each.module) for each in found] == [
        (0xFFFFFFFF81000040, None),
        (0xFFFFFFFF81000080, None),
        (0xFFFFFFFFC0000040, "mod_b"),
    ]
    assert all(each.ambiguous for each in found)
    assert index.repeated == {"twice": index.find("twice")}


def test_modules_come_last_where_they_lie_below_the_kernel() -> None:
    """As on arm64: the kernel still meets its own functions first."""
    kallsyms = b"ffff800080001000 T twice\nffff800000001000 t twice\t[mod]\n"
    listed = b"ffff800080001000 twice\nffff800000001000 twice [mod]\n"
    index = SymbolIndex.build(kallsyms, listed, True)
    assert [index.module(each) for each in index.find("twice")] == [None, "mod"]
    assert index.first(["twice"]) == [index.find("twice")[0]]
    assert name_at(index, 0xFFFF800000001000) == "twice"


def test_first_is_what_the_kernel_takes(index: SymbolIndex) -> None:
    asked = ["twice", "no_such", "endbr", "first_alias", "special", "in_module", ""]
    assert index.first(asked) == [1, None, 4, 0, None, 9, None]
    assert index.first([]) == []
    assert index.first(["first"] * 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "name",
    ["untraceable", "some_data", "fir", "firs", "first2", "", "\u00e9", "first\ntwice", "first*"],
)
def test_what_cannot_be_traced_is_not_found(index: SymbolIndex, name: str) -> None:
    assert index.find(name) == []


def test_find_in_a_module(index: SymbolIndex) -> None:
    assert addresses(index, "twice", "mod_b") == [0xFFFFFFFFC0000040]
    assert addresses(index, "twice", "vmlinux") == [0xFFFFFFFF81000040, 0xFFFFFFFF81000080]
    assert addresses(index, "twice", "*") == addresses(index, "twice")
    assert addresses(index, "twice", "mod_a") == []
    assert addresses(index, "in_module", "vmlinux") == []
    assert addresses(index, "first_alias", "vmlinux") == [0xFFFFFFFF81000010]
    assert addresses(index, "first_alias", "mod_a") == []


def test_modules_of_some_positions(index: SymbolIndex) -> None:
    assert index.modules([0, 9, 3, 10]) == {1: "mod_a", 3: "mod_b"}
    assert index.modules([]) == {}
    own = SymbolIndex.build(b"ffffffff81000010 T first\n", b"ffffffff81000010 first\n", True)
    assert own.modules([0]) == {}


def test_an_alias_is_the_function_that_tracefs_lists(index: SymbolIndex) -> None:
    assert index.find("first_alias") == index.find("first")
    assert name_at(index, 0xFFFFFFFF81000010) == "first"


def test_a_name_of_its_own_comes_before_the_variant_of_another() -> None:
    kallsyms = b"ffffffff81000000 t f\nffffffff81000040 t f.isra.0\n"
    index = SymbolIndex.build(kallsyms, b"ffffffff81000000 f\nffffffff81000040 f.isra.0\n", True)
    assert addresses(index, "f") == [0xFFFFFFFF81000000]


@pytest.mark.parametrize(
    "suffix",
    [".llvm.7123", ".constprop.0", ".isra.0", ".isra.0.llvm.1", ".constprop.0.isra.0", ".isra.1"],
)
def test_a_variant_of_the_compilers_is_found_by_the_name_in_the_source(suffix: str) -> None:
    kallsyms = f"ffffffff81000000 t f{suffix}\n".encode()
    index = SymbolIndex.build(kallsyms, f"ffffffff81000000 f{suffix}\n".encode(), True)
    assert addresses(index, "f") == [0xFFFFFFFF81000000]
    assert addresses(index, f"f{suffix}") == [0xFFFFFFFF81000000]
    assert names(index, "f") == [f"f{suffix}"]
    assert names(index, "?") == [f"f{suffix}"]
    assert not index.function(0).ambiguous


@pytest.mark.parametrize("suffix", [".cold", ".part.0", ".cold.3", ".0", ".israel", ".llvmx"])
def test_a_piece_of_a_function_is_not_the_function(suffix: str) -> None:
    kallsyms = f"ffffffff81000000 t f{suffix}\n".encode()
    index = SymbolIndex.build(kallsyms, f"ffffffff81000000 f{suffix}\n".encode(), True)
    assert index.find("f") == []
    assert addresses(index, f"f{suffix}") == [0xFFFFFFFF81000000]
    assert names(index, "?") == []


def test_several_variants_of_one_name() -> None:
    kallsyms = b"".join(
        f"ffffffff8100{number:04x} t {name}\n".encode()
        for number, name in ((0, "f.isra.0"), (0x40, "f.constprop.0"), (0x80, "g.isra.0"))
    )
    listed = b"".join(line[:17] + line[19:] for line in kallsyms.splitlines(keepends=True))
    index = SymbolIndex.build(kallsyms, listed, True)
    assert addresses(index, "f") == [0xFFFFFFFF81000000, 0xFFFFFFFF81000040]
    assert index.repeated == {}


def test_variants_of_one_full_name_are_each_found_once() -> None:
    """Static functions of one name in two files, specialised in the same way."""
    kallsyms = b"ffffffff81000000 t f.isra.0\nffffffff81000040 t f.isra.0\n"
    listed = b"ffffffff81000000 f.isra.0\nffffffff81000040 f.isra.0\n"
    index = SymbolIndex.build(kallsyms, listed, True)
    assert index.find("f.isra.0") == [0, 1]
    assert index.find("f") == [0, 1]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("untraceable", "untraceable"),
        ("untraceable_too", "untraceable"),
        ("in_module_alone", "untraceable"),
        ("__pfx_first", "untraceable"),
        ("__pfx_no_such", "unknown"),
        ("untraceable_", "unknown"),
        ("ntraceable", "unknown"),
        ("no_such", "unknown"),
        ("", "unknown"),
        ("\u00e9", "unknown"),
        ("untraceable\nuntraceable_too", "unknown"),
    ],
)
def test_why_a_name_is_absent(index: SymbolIndex, name: str, why: str) -> None:
    assert index.find(name) == []
    assert index.absence(name) == why


# Addresses


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
        (0xFFFFFFFF8100000F, None),
        (0, None),
        (4, None),
        (2**64 - 1, None),
    ],
)
def test_by_address(index: SymbolIndex, address: int, name: str | None) -> None:
    """The start, or the traceable place that tracefs tells; nothing between or behind."""
    assert name_at(index, address) == name
    if name is not None:
        position = index.at(address)
        assert position is not None
        assert index.addresses[position] == address & ~0xF


def test_a_place_far_from_any_start_has_no_address() -> None:
    listed = WITH_ADDRESSES + b"ffffffffc0000154 strange [mod_b]\n"
    index = SymbolIndex.build(KALLSYMS, listed, True)
    assert addresses(index, "strange") == [0]
    assert not index.has_addresses
    assert name_at(index, 0xFFFFFFFFC0000154) is None
    assert addresses(index, "first") == [0xFFFFFFFF81000010]


# Globs


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("first", ["first"]),
        ("first_alias", ["first"]),
        ("first_a*", ["first"]),
        ("first_a*[mod_a]", []),
        ("f*", ["first"]),
        ("twice", ["twice"] * 3),
        ("tw*", ["twice"] * 3),
        ("tw*[mod_b]", ["twice"]),
        ("*[mod_a]", ["in_module"]),
        ("*[mod_?]", ["in_module", "twice"]),
        ("*[no_such]", []),
        ("special", ["special.isra.0"]),
        ("special.isra.?", ["special.isra.0"]),
        ("spe*al", ["special.isra.0"]),
        ("split*", ["split", "split.cold"]),
        ("no_such*", []),
        ("no_such", []),
        ("untraceable*", []),
        ("*first*", ["first"]),
        ("?????", ["first", "twice", "twice", "endbr", "split", "twice"]),
    ],
)
def test_globs(index: SymbolIndex, glob: str, expected: list[str]) -> None:
    """In the order of positions, each function once."""
    assert names(index, glob) == expected
    found = index.glob(Glob.parse(glob))
    assert found == sorted(set(found))


def test_all_functions(index: SymbolIndex) -> None:
    assert index.glob(Glob.parse("*")) == list(range(COUNT))
    assert index.glob(Glob.parse("**")) == list(range(COUNT))
    assert index.glob(Glob.parse("*[vmlinux]")) == list(range(9))
    assert index.glob(Glob.parse("?*")) == list(range(COUNT))


@pytest.mark.parametrize("glob", ["many_*", "*9", "many_?99??", "*_1*2*"])
def test_globs_over_more_text_than_is_looked_through_at_once(glob: str) -> None:
    files = symbol_files(many=40_000, untraceable=[f"many_no_{each}" for each in range(20_000)])
    assert files.functions is not None
    index = SymbolIndex.build(files.kallsyms, files.functions, True)
    parsed = Glob.parse(glob)
    assert index.glob(parsed) == [
        position for position, name in enumerate(index.names) if parsed.matches_name(name)
    ]
    assert index.untraceable(parsed) == [
        name
        for name in (*UNTRACEABLE, *(f"many_no_{each}" for each in range(20_000)))
        if parsed.matches_name(name)
    ]


@settings(derandomize=True, database=None, deadline=None)
@given(st.text("abt*?", min_size=1, max_size=5), st.sampled_from(["", "[vmlinux]", "[m*]"]))
def test_a_glob_finds_what_matches_function_by_function(name: str, module: str) -> None:
    listed = ["a", "ab", "abt", "b", "ab", "bat [mod]", "ab [mod]", "tab [other]"]
    index = SymbolIndex.build(b"", "".join(f"{line}\n" for line in listed).encode(), False)
    glob = Glob.parse(name + module)
    matching = [
        position
        for position in range(len(index))
        if glob.matches(index.names[position], index.module(position))
    ]
    assert index.glob(glob) == matching


def test_untraceable_functions_that_match(index: SymbolIndex) -> None:
    def found(text: str) -> list[str]:
        return index.untraceable(Glob.parse(text))

    assert found("untr*") == ["untraceable", "untraceable_too"]
    assert found("untraceable") == ["untraceable"]
    assert found("untr*[vmlinux]") == ["untraceable", "untraceable_too"]
    assert found("untr*[mod_a]") == []
    assert found("no_such*") == []
    # Neither what is traceable, nor another name of such, nor the padding in front of a function.
    assert found("*") == ["_stext", "untraceable", "untraceable_too", "in_module_alone"]


# Pages


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "glob", ["*", "tw*", "*[mod_?]", "no_such*", "split*", "first*", "*[vmlinux]"]
)
def test_pages_are_the_whole_in_pieces(index: SymbolIndex, glob: str, limit: int) -> None:
    parsed = Glob.parse(glob)
    known = [index.function(position) for position in range(COUNT)]
    whole = [
        (each.symbol, each.module, each.address)
        for each in [*known, Function("first_alias", None, 0xFFFFFFFF81000010, False)]
        if parsed.matches(each.symbol, each.module)
    ]
    found: list[Function] = []
    after: int | None = 0
    while after is not None:
        page, after = index.page(parsed, after, limit)
        assert len(page) <= limit
        # There is a next page only where something is on it.
        assert page or not found
        found += [index.function(position) for position in page]
    assert [(each.symbol, each.module, each.address) for each in found] == whole


def test_a_page_behind_the_end(index: SymbolIndex) -> None:
    assert index.page(Glob.parse("*"), COUNT + 1, 10) == ([], None)
    assert index.page(Glob.parse("*"), 2**62, 10) == ([], None)


@pytest.mark.parametrize("glob", ["special", "spe*al", "first_alias", "first_a*", "tw*"])
def test_a_page_has_what_a_link_by_that_pattern_has(index: SymbolIndex, glob: str) -> None:
    parsed = Glob.parse(glob)
    found, _ = index.page(parsed, 0, 10)
    linked = index.glob(parsed)
    assert {index.function(each).address for each in found} == {
        index.addresses[each] for each in linked
    }


# Kernels that tell less


def test_names_only_before_6_5() -> None:
    index = SymbolIndex.build(KALLSYMS, NAMES, False)
    assert len(index) == COUNT
    assert addresses(index, "endbr") == [0xFFFFFFFF81000100]
    assert addresses(index, "twice") == [
        0xFFFFFFFF81000040,
        0xFFFFFFFF81000080,
        0xFFFFFFFFC0000040,
    ]
    assert index.has_addresses
    # Where the traceable place lies, nobody tells.
    assert name_at(index, 0xFFFFFFFF81000100) == "endbr"
    assert name_at(index, 0xFFFFFFFF81000104) is None
    assert index.absence("untraceable") == "untraceable"


def test_names_only_where_a_name_is_traceable_in_part() -> None:
    """Which of the two it is, nobody tells: the kernel must be asked by name."""
    index = SymbolIndex.build(KALLSYMS, NAMES.replace(b"twice\ntwice\n", b"twice\n"), False)
    assert addresses(index, "twice") == [0, 0xFFFFFFFFC0000040]
    assert not index.has_addresses
    assert addresses(index, "first") == [0xFFFFFFFF81000010]


def test_names_only_and_a_module_that_shares_a_name_with_another() -> None:
    kallsyms = b"ffffffffc0000000 t f\t[mod_a]\nffffffffc0000040 t f\t[mod_b]\n"
    index = SymbolIndex.build(kallsyms, b"f [mod_b]\nf [mod_a]\n", False)
    assert addresses(index, "f", "mod_a") == [0xFFFFFFFFC0000000]
    assert addresses(index, "f", "mod_b") == [0xFFFFFFFFC0000040]


@pytest.mark.parametrize(("functions", "given"), [(WITH_ADDRESSES, True), (NAMES, False)])
def test_hidden_kallsyms(functions: bytes, given: bool) -> None:
    index = SymbolIndex.build(HIDDEN, functions, given)
    assert index.knows_traceable
    assert not index.has_addresses
    assert len(index) == COUNT
    assert addresses(index, "endbr") == [0]
    assert [index.module(each) for each in index.find("in_module")] == ["mod_a"]
    assert addresses(index, "special") == [0]
    assert index.find("untraceable") == []
    assert index.absence("untraceable") == "untraceable"
    assert index.at(0) is None
    assert index.at(0xFFFFFFFF81000104) is None


@pytest.mark.parametrize("kallsyms", [KALLSYMS, HIDDEN, b""])
def test_without_tracefs_nothing_is_known(kallsyms: bytes) -> None:
    index = SymbolIndex.build(kallsyms, None, False)
    assert not index.knows_traceable
    assert not index.has_addresses
    assert len(index) == 0
    assert index.find("first") == []
    assert index.first(["first"]) == [None]
    assert index.at(0xFFFFFFFF81000010) is None
    assert index.glob(Glob.parse("*")) == []
    assert index.page(Glob.parse("*"), 0, 10) == ([], None)


def test_empty_files() -> None:
    index = SymbolIndex.build(b"", b"", True)
    assert len(index) == 0
    assert index.names == []
    assert index.find("first") == []
    assert index.find("") == []
    assert index.glob(Glob.parse("*")) == []
    assert index.glob(Glob.parse("?*")) == []
    assert index.untraceable(Glob.parse("?*")) == []
    assert index.absence("first") == "unknown"


# The kernel's blacklist


def test_blacklist() -> None:
    text = (
        b"0xffffffff81000140-0xffffffff81000150\tuntraceable\n"
        b"0xffffffff81000150-0xffffffff81000160\tasm_exc_debug\n"
        b"0x0000000000000000-0x0000000000000000\tirq_entries_start\n"
    )
    assert blacklist(text) == {"untraceable", "asm_exc_debug", "irq_entries_start"}
    assert blacklist(b"") == frozenset()
    assert "na\ufffd" in blacklist(b"0x0-0x0\tna\xff\n")


# Cost


def test_absence_does_not_cost_a_look_through_all_names() -> None:
    """A request can have a million names that are not there, and ``*`` meets all that cannot be
    traced: each look must take microseconds.
    """
    untraceable = [f"a_function_that_is_not_traceable_{number}" for number in range(100_000)]
    files = symbol_files(untraceable=untraceable)
    assert files.functions is not None
    index = SymbolIndex.build(files.kallsyms, files.functions, True)
    before = time.process_time()
    for number in range(1000):
        assert index.absence(f"no_such_{number}") == "unknown"
    for name in untraceable[-1000:]:
        assert index.absence(name) == "untraceable"
    assert time.process_time() - before < 0.3


def test_the_fake_kernels_own_files() -> None:
    files = symbol_files()
    index = SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)
    for name, (address, delta, module) in FUNCTIONS.items():
        (found,) = index.find(name)
        assert (index.addresses[found], index.module(found) or "") == (address, module)
        assert index.at(address + delta) == found
    assert addresses(index, "cleanup") == list(AMBIGUOUS["cleanup"])
    assert addresses(index, "ksys_read_alias") == [ALIASES["ksys_read_alias"]]
    for name, address in UNTRACEABLE.items():
        assert index.find(name) == []
        assert index.at(address) is None
    assert index.at(TEXT) is None
