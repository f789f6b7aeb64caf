"""Which rule is a user's, and what it lets them attach to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.core.deny import DenyList
from kpmd.core.globs import Glob
from kpmd.core.model import Caller
from kpmd.core.policy import (
    NO_RULE,
    RIGHTS,
    Fence,
    Functions,
    Helpers,
    Policy,
    Right,
    Rule,
    check_right,
)
from kpmd.core.specs import TargetSpec
from kpmd.core.symbols import SymbolIndex
from kpmd.core.targets import Resolved, resolve
from kpmd.errors import Forbidden
from kpmd.runtime.policies import rights_of
from tests.fakes.kernel import AMBIGUOUS, FUNCTIONS, symbol_files

DENY = DenyList.parse("vfs_write it hurts\n")


def rule(name: str = "one", **fields: Any) -> Rule:
    return Rule(name, Helpers(frozenset()), frozenset(), **fields)


def functions(
    allow: Sequence[str] = ("*",), deny: Sequence[str] = (), *, risky: bool = False
) -> Functions:
    return Functions(tuple(map(Glob.parse, allow)), tuple(map(Glob.parse, deny)), risky)


def index(**options: Any) -> SymbolIndex:
    files = symbol_files(**options)
    return SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)


INDEX = index()


def found(
    which: Functions,
    *,
    where: SymbolIndex = INDEX,
    lenient: bool = False,
    **targets: Any,
) -> Resolved:
    denials = DENY.denials(where)
    fence = Fence(rule(functions=which), where, DENY)
    spec = TargetSpec(**targets)
    spec.check()
    return resolve(spec, where, denials, lambda name: False, lenient=lenient, fence=fence)


def refused(which: Functions, **targets: Any) -> Forbidden:
    with pytest.raises(Forbidden) as caught:
        found(which, **targets)
    return caught.value


class TestRules:
    def test_the_first_that_fits_counts(self) -> None:
        policy = Policy(
            (
                rule("user", users=frozenset({7})),
                rule("group", groups=frozenset({70, 71})),
                rule("rest", everyone=True),
            )
        )

        def name(uid: int, *groups: int) -> str:
            fitting = policy.rule_for(uid, groups)
            assert fitting is not None
            return fitting.name

        assert name(7, 70) == "user"
        assert name(8, 5, 71) == "group"
        assert name(8, 72) == "rest"

    def test_no_rule_is_about_whom_none_fits(self) -> None:
        policy = Policy((rule(users=frozenset({7})),))
        assert policy.rule_for(8, [7]) is None

    def test_uid_and_gid_are_not_mixed_up(self) -> None:
        policy = Policy((rule(groups=frozenset({7})),))
        assert policy.rule_for(7, [8]) is None

    def test_root_is_an_administrator_and_a_group_can_be(self) -> None:
        policy = Policy(admin_groups=frozenset({50}))
        assert policy.is_admin(0, [])
        assert policy.is_admin(1000, [50, 1000])
        assert not policy.is_admin(50, [51])

    @given(st.sets(st.sampled_from(RIGHTS)), st.sampled_from(RIGHTS))
    def test_a_rule_grants_what_it_names_and_nothing_else(
        self, granted: set[Right], asked: Right
    ) -> None:
        made = rule("watchers", rights=frozenset(granted))
        if asked in granted:
            assert check_right(made, asked) is made
        else:
            with pytest.raises(Forbidden, match="watchers") as caught:
                check_right(made, asked)
            assert caught.value.fields["rule"] == "watchers"

    def test_without_a_rule_nothing_is_granted(self) -> None:
        with pytest.raises(Forbidden) as caught:
            check_right(None, "attach")
        assert caught.value.fields["rule"] == NO_RULE


class TestFunctions:
    def test_what_is_allowed_and_not_denied_is_attached_to(self) -> None:
        made = found(functions(["vfs_*"], ["vfs_open"]), symbols=["vfs_read"])
        assert made.targets.names == ("vfs_read",)

    @pytest.mark.parametrize(
        ("allow", "deny"), [(["tcp_*"], []), (["*"], ["vfs_*"]), (["vfs_*"], ["*_read"]), ([], [])]
    )
    def test_what_is_not_is_refused_by_name(self, allow: list[str], deny: list[str]) -> None:
        error = refused(functions(allow, deny), symbols=["vfs_read"])
        assert error.fields["rule"] == "one"
        assert error.fields["symbols"] == ["vfs_read"]
        assert error.fields["symbols_total"] == 1

    def test_and_by_address(self) -> None:
        error = refused(functions(deny=["vfs_read"]), addresses=[FUNCTIONS["vfs_read"][0]])
        assert error.fields["symbols"] == ["vfs_read"]

    def test_one_among_many_refuses_all(self) -> None:
        error = refused(functions(deny=["vfs_open"]), symbols=["vfs_read", "vfs_open"])
        assert error.fields["symbols"] == ["vfs_open"]

    def test_patterns_leave_it_out_and_say_so(self) -> None:
        made = found(functions(deny=["vfs_open"]), patterns=["vfs_*"])
        assert "vfs_read" in made.targets.names
        assert "vfs_open" not in made.targets.names
        assert ("vfs_open", "forbidden") in [(e.symbol, e.reason) for e in made.skipped]

    def test_patterns_that_leave_nothing_are_refused(self) -> None:
        error = refused(functions(["tcp_*"]), patterns=["vfs_*"])
        assert error.fields["rule"] == "one"
        assert "vfs_read" in error.fields["symbols"]

    def test_symbols_can_be_skipped_too(self) -> None:
        made = found(
            functions(deny=["vfs_open"]),
            symbols=["vfs_read", "vfs_open"],
            cookies=[1, 2],
            on_untraceable="skip",
        )
        assert made.targets.names == ("vfs_read",)
        assert list(made.targets.cookies) == [1]

    def test_a_dry_run_tells_each(self) -> None:
        made = found(functions(["tcp_*"]), symbols=["vfs_read", "vfs_open"], lenient=True)
        assert [(each.symbol, each.reason) for each in made.skipped] == [
            ("vfs_read", "forbidden"),
            ("vfs_open", "forbidden"),
        ]
        assert len(made.targets) == 0

    def test_what_is_risky_is_refused_by_name_unless_the_rule_says_so(self) -> None:
        error = refused(functions(), symbols=["vfs_write"])
        assert "it hurts" in error.detail
        assert found(functions(risky=True), symbols=["vfs_write"]).targets.names == ("vfs_write",)

    def test_every_function_of_a_name_counts(self) -> None:
        names = list(AMBIGUOUS)
        error = refused(functions(deny=names), symbols=names[:1], on_ambiguous="all")
        assert error.fields["symbols_total"] == 2

    def test_addresses_that_the_index_does_not_know_are_refused(self) -> None:
        hidden = index(hidden=True)
        error = refused(functions(), where=hidden, addresses=[0xFFFFFFFF81000010])
        assert "symbols" in error.detail

    def test_names_are_checked_also_where_the_kernel_tells_nothing(self) -> None:
        nothing = SymbolIndex.build(b"", None, False)
        error = refused(functions(["vfs_*"]), where=nothing, symbols=["vfs_read", "tcp_close"])
        assert error.fields["symbols"] == ["tcp_close"]
        made = found(functions(["vfs_*"]), where=nothing, symbols=["vfs_read"])
        assert made.targets.names == ("vfs_read",)
        error = refused(functions(), where=nothing, symbols=["vfs_read", "vfs_write"])
        assert error.fields["symbols"] == ["vfs_write"]
        assert found(functions(risky=True), where=nothing, symbols=["vfs_write"]).targets.names


@given(
    st.lists(st.sampled_from(["*", "vfs_*", "tcp_*", "*_read", "nft_*[nf_tables]"]), max_size=3),
    st.lists(st.sampled_from(["vfs_open", "*_write", "*[vmlinux]", "tcp_?lose"]), max_size=2),
    st.booleans(),
)
def test_patterns_and_names_agree(allow: list[str], deny: list[str], risky: bool) -> None:
    """Whatever a pattern attaches to may be asked for by name, and nothing else."""
    which = functions(allow, deny, risky=risky)
    denials = DENY.denials(INDEX)
    fence = Fence(rule(functions=which), INDEX, DENY)
    outside = fence.refused(range(len(INDEX)))
    for position, name in enumerate(INDEX.names):
        by_globs = which.refusal(name, INDEX.module(position)) is None
        on_list = position in denials and not risky
        assert (position not in outside) == (by_globs and not on_list)


def test_without_a_rule_no_instructions_have_rights() -> None:
    """Whoever got so far without one must not be taken for somebody who may do everything."""
    caller = Caller(uid=1000, gid=1000, pid=1, admin=False)
    for builtin in (True, False):
        with pytest.raises(Forbidden):
            rights_of(caller, builtin=builtin, map_bytes=1)
