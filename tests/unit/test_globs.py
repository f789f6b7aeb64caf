"""Globs over names: what they match, what is none, and what a hostile one costs."""

from __future__ import annotations

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmd.core.globs import MAX_GLOB, Glob, GlobError

#: Few letters, so that patterns and names meet often; and those that mean something to others.
NAMES = st.text("ab_.$", min_size=1, max_size=12)
GLOBS = st.text("ab_.$*?", min_size=1, max_size=12)
#: What would mean something in a regular expression or to fnmatch, and means itself here.
STRANGE = st.text("a*?.+^$|(){}\\!-~,", min_size=1, max_size=8)


def as_fnmatch(glob: str) -> re.Pattern[str]:
    """What Python's own globs make of ``*`` and ``?``; all else stands for itself."""
    return re.compile(fnmatch.translate(glob.replace("[", "[[]")))


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(GLOBS, NAMES)
def test_it_matches_what_fnmatch_matches(text: str, name: str) -> None:
    expected = as_fnmatch(text).fullmatch(name) is not None
    assert Glob.parse(text).matches_name(name) is expected


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(STRANGE, st.text("a.+^$|(){}\\!-~,", min_size=1, max_size=8))
def test_nothing_but_star_and_question_mark_means_anything(text: str, name: str) -> None:
    expected = as_fnmatch(text).fullmatch(name) is not None
    assert Glob.parse(text).matches_name(name) is expected


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(GLOBS, st.lists(NAMES, max_size=20))
def test_in_a_text_of_names_it_finds_those_that_match(text: str, names: list[str]) -> None:
    glob = Glob.parse(text)
    listed = "\n" + "".join(f"{name}\n" for name in names)
    assert glob.in_text.findall(listed) == [name for name in names if glob.matches_name(name)]


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("vfs_read", ["vfs_read"], ["vfs_reads", "avfs_read", "vfs_", "VFS_READ"]),
        ("vfs_*", ["vfs_", "vfs_read"], ["vfs", "xvfs_read"]),
        ("*read", ["read", "vfs_read"], ["vfs_reads"]),
        ("v?s_*", ["vfs_read", "vvs_"], ["vs_read", "vffs_read"]),
        ("*", ["a", "a.isra.0"], []),
        ("?", ["a"], ["ab"]),
        ("??*", ["ab", "abc"], ["a"]),
        ("*?", ["a", "ab"], []),
        ("a*b*c", ["abc", "axbxc", "abcbc"], ["ac", "acb", "abcb"]),
        ("*ab*ab", ["abab", "xabyab"], ["ab", "aab"]),
        ("a.b", ["a.b"], ["axb"]),
        ("**a**", ["a", "bab"], ["b"]),
    ],
)
def test_examples(text: str, yes: list[str], no: list[str]) -> None:
    glob = Glob.parse(text)
    assert [name for name in yes if not glob.matches_name(name)] == []
    assert [name for name in no if glob.matches_name(name)] == []


@pytest.mark.parametrize(
    ("text", "name", "module"),
    [
        ("nft_*", "nft_*", None),
        ("nft_*[nf_tables]", "nft_*", "nf_tables"),
        ("nft_* [nf_tables]", "nft_*", "nf_tables"),
        ("nft_*   [nf_tables]", "nft_*", "nf_tables"),
        ("*[nf_*]", "*", "nf_*"),
        ("x[vmlinux]", "x", "vmlinux"),
        ("x[__builtin__kprobes]", "x", "__builtin__kprobes"),
        ("***", "*", None),
    ],
)
def test_a_module_stands_in_brackets(text: str, name: str, module: str | None) -> None:
    assert Glob.parse(text) == Glob(name, module)


@pytest.mark.parametrize(
    ("text", "own", "nft", "other"),
    [
        ("*", True, True, True),
        ("*[*]", True, True, True),
        ("*[vmlinux]", True, False, False),
        ("*[nf_tables]", False, True, False),
        ("*[nf_*]", False, True, True),
        ("*[nf_?ables]", False, True, False),
        ("*[vm*]", True, False, False),
        ("*[nf]", False, False, False),
    ],
)
def test_which_modules_match(text: str, own: bool, nft: bool, other: bool) -> None:
    glob = Glob.parse(text)
    assert glob.matches("f", None) is own
    assert glob.matches("f", "nf_tables") is nft
    assert glob.matches("f", "nf_conntrack") is other


def test_name_and_module_must_both_match() -> None:
    glob = Glob.parse("nft_*[nf_tables]")
    assert glob.matches("nft_a", "nf_tables")
    assert not glob.matches("nf_a", "nf_tables")
    assert not glob.matches("nft_a", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " a",
        "a b",
        "[",
        "]",
        "[a]",
        "a[",
        "a]",
        "a[]",
        "a[b",
        "a[b]c",
        "a[b][c]",
        "a[b c]",
        "a[[b]]",
        "[ab]*",
        "a\n",
        "a\nb",
        "a\tb",
        "a\t[b]",
        "a\0",
        "\x7f",
        "\u00e9*",
        "\u2217",
        "a[\u00e9]",
        "*" * (MAX_GLOB + 1),
        "a" * 10_000,
    ],
)
def test_what_is_no_glob(text: str) -> None:
    with pytest.raises(GlobError) as error:
        Glob.parse(text)
    assert str(error.value)
    # The message says what is wrong and leaves out what came: that can be long, or not for a log.
    assert len(str(error.value)) < 100


def test_the_longest_glob() -> None:
    name, module = "a" * 511, "m" * 64
    assert Glob.parse(f"{name}[{module}]").matches(name, module)


@pytest.mark.parametrize(
    ("text", "literal"),
    [("a", True), ("a.b[m*]", True), ("a*", False), ("?", False), ("a?b", False)],
)
def test_literal(text: str, literal: bool) -> None:
    assert Glob.parse(text).literal is literal


HOSTILE = {
    "stars and a letter": "*a" * 280 + "*b",
    "stars and pairs": "*aa" * 190 + "*b",
    "questions between stars": "*?" * 280 + "b",
    "a long tail": "*" + "a" * 500 + "b",
    "a long middle": "*" + "a" * 400 + "*" + "a" * 100 + "b",
    "questions at the end": "*" + "?" * 500 + "b",
    "questions in the middle": "*" + "?a" * 250 + "*b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_glob_costs_no_more_than_its_length(text: str) -> None:
    """Backtracking through the stars would take longer than the universe has."""
    glob = Glob.parse(text)
    names = ["a" * 511, "a" * 510 + "c", "ab" * 255, "a" * 255 + "b" + "a" * 255]
    listed = "\n" + "".join(f"{name}\n" for name in names * 20)
    before = time.process_time()
    for name in names:
        assert glob.matches_name(name) is (as_naive(text, name))
    glob.in_text.findall(listed)
    assert time.process_time() - before < 3


def as_naive(glob: str, name: str) -> bool:
    """The textbook's table: whether each beginning of the glob matches each of the name."""
    row = [True] + [False] * len(name)
    for letter in glob:
        if letter == "*":
            for at in range(1, len(row)):
                row[at] = row[at] or row[at - 1]
        else:
            row = [False] + [
                before and letter in ("?", there) for before, there in zip(row, name, strict=False)
            ]
    return row[-1]


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.text("ab*?", min_size=1, max_size=60), st.text("ab", min_size=1, max_size=100))
def test_long_globs_match_as_the_table_says(text: str, name: str) -> None:
    assert Glob.parse(text).matches_name(name) is as_naive(text, name)
