"""Checks of what a client asks for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kpmd.core.globs import MAX_GLOB
from kpmd.core.model import Attach, LinkKind
from kpmd.core.specs import (
    MAX_GLOBS,
    MAX_TARGETS,
    OnUntraceable,
    TargetSpec,
    check_globs,
    check_kind,
)
from kpmd.errors import Invalid, WrongAttachType


def spec(
    symbols: Sequence[str] | None = None,
    addresses: Sequence[int] | None = None,
    cookies: Sequence[int] | None = None,
    patterns: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> TargetSpec:
    return TargetSpec(symbols, addresses, patterns, exclude, cookies)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (spec(), "give symbols, addresses or patterns"),
        (spec(cookies=[1]), "give symbols, addresses or patterns"),
        (spec(exclude=["a"]), "give symbols, addresses or patterns"),
        (spec(["a"], [1]), "give only one"),
        (spec(["a"], patterns=["a"]), "give only one"),
        (spec(None, [1], patterns=["a"]), "give only one"),
        (spec(["a"], [1], patterns=["a"]), "give only one"),
        (spec([], []), "give only one"),
        (spec([], patterns=[]), "give only one"),
        (spec(["a"], [1], [1, 2, 3]), "give only one"),
        (spec([]), "symbols: must not be empty"),
        (spec(None, []), "addresses: must not be empty"),
        (spec(patterns=[]), "patterns: must not be empty"),
        (spec([], cookies=[1]), "symbols: must not be empty"),
        (spec(["a", "a"], cookies=[1]), "cookies: has 1 entries for 2 symbols"),
        (spec(None, [1, 2], []), "cookies: has 0 entries for 2 addresses"),
        (spec(patterns=["a"], cookies=[1]), "cookies: need to know their functions"),
        (spec(patterns=["a"], cookies=[]), "cookies: need to know their functions"),
        (spec(["a"], exclude=["b"]), "exclude: goes with patterns"),
        (spec(None, [1], exclude=["b"]), "exclude: goes with patterns"),
        (spec(["a\0"]), "symbols.0: has a NUL"),
        (spec(["a", ""]), "symbols.1: must not be empty"),
        (spec(["a" * 512]), "symbols.0: is longer"),
        (spec(["a" * 10_000]), "symbols.0: is longer"),
        (spec(["\u4e2d" * 171]), "symbols.0: is longer"),
        (spec(["a", "b", "a"]), "symbols.2: a stands at 0 already"),
        (spec(None, [5, 5]), "addresses.1: 0x0000000000000005 stands at 0 already"),
        (spec(patterns=["a*", "b", "a*"]), "patterns.2: a* stands at 0 already"),
        (spec(patterns=["a", ""]), "patterns.1: must not be empty"),
        (spec(patterns=["a", "b]"]), "patterns.1: must be NAME or NAME[MODULE]"),
        (spec(patterns=["a", "\u00e9"]), "patterns.1: has characters"),
        (spec(patterns=["a\0"]), "patterns.0: has characters"),
        (spec(patterns=["a" * 10_000]), f"patterns.0: has 10000 characters; {MAX_GLOB} are"),
        (spec(patterns=["a"], exclude=["b", "["]), "exclude.1: must be NAME or NAME[MODULE]"),
        (spec(patterns=["a"], exclude=["*" * 10_000]), "exclude.0: has 10000 characters"),
        (spec(patterns=[f"a{each}" for each in range(MAX_GLOBS + 1)]), "patterns: has 257"),
        (
            spec(patterns=["a"], exclude=[f"a{each}" for each in range(MAX_GLOBS + 1)]),
            "exclude: has 257",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_reference_librarys_order(
    wrong: TargetSpec, said: str
) -> None:
    with pytest.raises(Invalid) as error:
        wrong.check()
    assert said in error.value.detail
    # What a client sent comes back in part at the most.
    assert len(error.value.detail) < 300


@pytest.mark.parametrize("which", ["symbols", "addresses", "patterns", "cookies", "exclude"])
def test_the_field_that_is_wrong_is_named(which: str) -> None:
    wrong = {
        "symbols": spec(["a", ""]),
        "addresses": spec(None, []),
        "patterns": spec(patterns=["["]),
        "cookies": spec(["a"], cookies=[]),
        "exclude": spec(patterns=["a"], exclude=["["]),
    }[which]
    with pytest.raises(Invalid) as error:
        wrong.check()
    assert error.value.fields["errors"][0]["loc"][0] == which


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
    [
        spec(["a"]),
        spec(["a" * 511]),
        spec(["\u4e2d" * 170]),
        spec(["a*", "a[b]", "a b"]),  # names that no kernel has are not found, but no nonsense
        spec(None, [0, 2**64 - 1], [0, 0]),
        spec(patterns=["*"]),
        spec(patterns=["a", "a*", "a?", "a[m]"], exclude=["a", "a"]),
        spec(patterns=["a" * 511 + "[" + "m" * 64 + "]"]),
        spec(
            patterns=[f"a{each}" for each in range(MAX_GLOBS)],
            exclude=[f"a{each}" for each in range(MAX_GLOBS)],
        ),
    ],
)
def test_what_makes_sense_passes(good: TargetSpec) -> None:
    good.check()


@pytest.mark.parametrize(
    ("given", "which"),
    [
        (spec(["a"]), "symbols"),
        (spec([]), "symbols"),
        (spec(None, [1]), "addresses"),
        (spec(None, []), "addresses"),
        (spec(patterns=["a"]), "patterns"),
    ],
)
def test_which_field_names_the_targets(given: TargetSpec, which: str) -> None:
    assert given.which == which
    assert list(given.given) == list(getattr(given, which))


@pytest.mark.parametrize(
    ("on_untraceable", "by_name", "by_pattern"),
    [(None, False, True), ("error", False, False), ("skip", True, True)],
)
def test_what_is_skipped_by_default(
    on_untraceable: OnUntraceable | None, by_name: bool, by_pattern: bool
) -> None:
    assert TargetSpec(["a"], on_untraceable=on_untraceable).skips is by_name
    assert TargetSpec(None, [1], on_untraceable=on_untraceable).skips is by_name
    assert TargetSpec(patterns=["a"], on_untraceable=on_untraceable).skips is by_pattern


def test_globs_are_read_in_their_order() -> None:
    assert [(each.name, each.module) for each in check_globs("pattern", ["a*", "b[m]"])] == [
        ("a*", None),
        ("b", "m"),
    ]
    with pytest.raises(Invalid) as error:
        check_globs("pattern", ["a*", "b[m]x"])
    assert error.value.fields["errors"][0]["loc"] == ["pattern", 1]


@pytest.mark.parametrize("attach", ["kprobe_multi", "kprobe_session"])
@pytest.mark.parametrize("kind", ["kprobe", "kretprobe", "session"])
def test_kinds(attach: Attach, kind: LinkKind) -> None:
    if (attach == "kprobe_session") == (kind == "session"):
        check_kind(attach, kind)
    else:
        with pytest.raises(WrongAttachType):
            check_kind(attach, kind)
