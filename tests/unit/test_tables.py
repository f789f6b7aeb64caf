"""Columns out of the text of kallsyms and tracefs, against a reader that takes line by line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core import tables
from kpmd.core.tables import Table, kallsyms_table, tracefs_table

Row = tuple[str, int, str]


def rows(table: Table) -> list[Row]:
    """A table line by line; fails where its columns do not fit together."""
    names = list(table.names())
    assert table.modules[0] == ""
    assert len(set(table.modules)) == len(table.modules)
    assert table.text() == "\n".join(names)
    modules = [table.modules[each] for each in table.module_of]
    return list(zip(names, table.addresses, modules, strict=True))


def kallsyms(lines: list[tuple[int, str, str, str]]) -> bytes:
    """As the kernel writes it."""
    return "".join(
        f"{address:016x} {kind} {name}" + (f"\t[{module}]" if module else "") + "\n"
        for address, kind, name, module in lines
    ).encode()


def tracefs(lines: list[Row], with_addresses: bool) -> bytes:
    """As the kernel writes it."""
    return "".join(
        (f"{address:016x} " if with_addresses else "")
        + name
        + (f" [{module}]" if module else "")
        + "\n"
        for name, address, module in lines
    ).encode()


KALLSYMS = b"""\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000010 t first
ffffffff81000040 W weak
ffffffff81000050 w weaker
ffffffff81000060 D some_data
ffffffff81000060 b some_bss
ffffffff81000070 V weak_object
ffffffff81000080 t last.isra.0
ffffffffc0000000 t in_module\t[mod_a]
ffffffffc0000020 d data_of_module\t[mod_a]
ffffffffc0000040 T other\t[mod-b]
ffffffffc0000080 t again\t[mod_a]
ffffffffc0000100 t bpf_prog_6deef7357e7b4530\t[bpf]
"""


def test_functions_of_kallsyms() -> None:
    assert rows(kallsyms_table(KALLSYMS)) == [
        ("_stext", 0xFFFFFFFF81000000, ""),
        ("first", 0xFFFFFFFF81000010, ""),
        ("weak", 0xFFFFFFFF81000040, ""),
        ("weaker", 0xFFFFFFFF81000050, ""),
        ("last.isra.0", 0xFFFFFFFF81000080, ""),
        ("in_module", 0xFFFFFFFFC0000000, "mod_a"),
        ("other", 0xFFFFFFFFC0000040, "mod-b"),
        ("again", 0xFFFFFFFFC0000080, "mod_a"),
        ("bpf_prog_6deef7357e7b4530", 0xFFFFFFFFC0000100, "bpf"),
    ]


def test_the_kernels_own_behind_a_module() -> None:
    text = b"ffffffffc0000000 t in_module\t[mod]\nffffffffc0000040 T own\n"
    assert rows(kallsyms_table(text)) == [
        ("in_module", 0xFFFFFFFFC0000000, "mod"),
        ("own", 0xFFFFFFFFC0000040, ""),
    ]


def test_tracefs_with_addresses() -> None:
    text = (
        b"ffffffff81000014 first\nffffffff81000044 weak\n"
        b"ffffffffc0000004 in_module [mod_a]\nffffffffc0000044 other [mod-b]\n"
    )
    assert rows(tracefs_table(text, True)) == [
        ("first", 0xFFFFFFFF81000014, ""),
        ("weak", 0xFFFFFFFF81000044, ""),
        ("in_module", 0xFFFFFFFFC0000004, "mod_a"),
        ("other", 0xFFFFFFFFC0000044, "mod-b"),
    ]


def test_tracefs_without_addresses() -> None:
    text = b"first\n__ftrace_invalid_address___16\nin_module [mod_a]\nother [mod-b]\n"
    assert rows(tracefs_table(text, False)) == [
        ("first", 0, ""),
        ("__ftrace_invalid_address___16", 0, ""),
        ("in_module", 0, "mod_a"),
        ("other", 0, "mod-b"),
    ]


@pytest.mark.parametrize("text", [b"", b"\n", b"\n\n"])
def test_nothing(text: bytes) -> None:
    for table in (kallsyms_table(text), tracefs_table(text, True), tracefs_table(text, False)):
        assert rows(table) == []
        assert table.text() == ""


def test_no_function_at_all() -> None:
    assert rows(kallsyms_table(b"ffffffff81000000 D data\nffffffffc0000000 d more\t[mod]\n")) == []


def test_only_modules() -> None:
    assert rows(kallsyms_table(b"ffffffffc0000000 t f\t[mod]\n")) == [
        ("f", 0xFFFFFFFFC0000000, "mod")
    ]
    assert rows(tracefs_table(b"f [mod]\n", False)) == [("f", 0, "mod")]


def test_the_last_line_may_lack_its_end() -> None:
    assert rows(kallsyms_table(KALLSYMS.rstrip())) == rows(kallsyms_table(KALLSYMS))
    assert rows(tracefs_table(b"first", False)) == [("first", 0, "")]
    assert rows(tracefs_table(b"ffffffffc0000004 f [mod]", True)) == [
        ("f", 0xFFFFFFFFC0000004, "mod")
    ]


def test_empty_lines_and_short_ones_among_modules_are_passed_over() -> None:
    module = b"ffffffffc0000000 t in_module\t[mod]\n"
    text = KALLSYMS + b"\n" + b"ffffffffc0000200 t\n" + b"garbage\n" + module
    assert rows(kallsyms_table(text)) == [
        *rows(kallsyms_table(KALLSYMS)),
        ("in_module", 0xFFFFFFFFC0000000, "mod"),
    ]
    listed = b"ffffffffc0000004 f [mod]\n\nffffffffc0000044\nffffffffc0000084 g [mod]\n"
    assert [name for name, _, _ in rows(tracefs_table(listed, True))] == ["f", "g"]


@pytest.mark.parametrize("word", [b"0", b"ff", b"00000000", b"c0008000"])
def test_addresses_of_another_width(word: bytes) -> None:
    """As on 32-bit machines, or where a kernel leaves the zeros out."""
    text = word + b" T f\n" + b"ffffffff81000000 T g\n"
    assert rows(kallsyms_table(text)) == [("f", int(word, 16), ""), ("g", 0xFFFFFFFF81000000, "")]


def test_upper_case_addresses() -> None:
    assert rows(kallsyms_table(b"FFFFFFFF81000ABC T f\n")) == [("f", 0xFFFFFFFF81000ABC, "")]


def test_the_longest_name_of_a_kernel() -> None:
    name = "x" * 511
    assert rows(tracefs_table(name.encode() + b"\n", False)) == [(name, 0, "")]


def own(count: int) -> list[tuple[int, str, str, str]]:
    return [
        (0xFFFFFFFF81000000 + number * 16, "tTDdwW"[number % 6], f"name_{number:x}", "")
        for number in range(count)
    ]


def expected(lines: list[tuple[int, str, str, str]]) -> list[Row]:
    return [(name, address, module) for address, kind, name, module in lines if kind in ("tTwW")]


def test_more_than_one_piece() -> None:
    """Two megabytes of the kernel's own and one of modules."""
    lines = own(60_000)
    of_modules = [
        (address + (1 << 28), kind, f"m{name}", f"mod_{number % 100}")
        for number, (address, kind, name, _) in enumerate(lines[:30_000])
    ]
    text = kallsyms(lines + of_modules)
    assert len(text) > 5 * tables._PIECE
    assert rows(kallsyms_table(text)) == expected(lines + of_modules)


@pytest.mark.parametrize("piece", [1, 2, 7, 33, 34, 35, 36, 64, 1000])
def test_wherever_the_border_of_a_piece_falls(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(tables, "_PIECE", piece)
    assert len(rows(kallsyms_table(KALLSYMS))) == 9
    lines = own(40)
    assert rows(kallsyms_table(kallsyms(lines))) == expected(lines)
    listed = [*expected(lines), ("f", 0xFFFFFFFFC0000000, "mod"), ("g", 0xFFFFFFFFC0000040, "mod")]
    assert rows(tracefs_table(tracefs(listed, True), True)) == listed
    assert rows(tracefs_table(tracefs(listed, False), False)) == [
        (name, 0, module) for name, _, module in listed
    ]


def naive_kallsyms(text: bytes) -> list[Row]:
    """Line by line."""
    found = []
    for line in text.decode().splitlines():
        address, kind, name, *module = line.split()
        if kind in "tTwW":
            found.append((name, int(address, 16), module[0][1:-1] if module else ""))
    return found


NAMES = st.text("abcxyz_.$0", min_size=1, max_size=8)
MODULES = st.sampled_from(["mod_a", "mod-b", "bpf", "__builtin__ftrace"])
ADDRESSES = st.one_of(st.just(0), st.integers(0, 2**64 - 1))
KINDS = st.sampled_from("tTwWdDbBrRAVv?")


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(ADDRESSES, KINDS, NAMES, st.just(""))),
    st.lists(st.tuples(ADDRESSES, KINDS, NAMES, st.one_of(MODULES, st.just("")))),
    st.integers(1, 200),
)
def test_any_kallsyms_is_read_as_line_by_line(
    first: list[tuple[int, str, str, str]], then: list[tuple[int, str, str, str]], piece: int
) -> None:
    text = kallsyms(first + then)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_PIECE", piece)
        assert rows(kallsyms_table(text)) == naive_kallsyms(text)


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(NAMES, ADDRESSES, st.just(""))),
    st.lists(st.tuples(NAMES, ADDRESSES, st.one_of(MODULES, st.just("")))),
    st.booleans(),
    st.integers(1, 200),
)
def test_any_list_of_tracefs_is_read_as_line_by_line(
    first: list[Row], then: list[Row], with_addresses: bool, piece: int
) -> None:
    lines = first + then
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_PIECE", piece)
        found = rows(tracefs_table(tracefs(lines, with_addresses), with_addresses))
    assert found == [
        (name, address if with_addresses else 0, module) for name, address, module in lines
    ]
