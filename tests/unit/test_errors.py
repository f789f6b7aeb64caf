"""Kinds and statuses: the table that clients are written against."""

from __future__ import annotations

import errno

import pytest

from kpmd import errors
from kpmd.errors import (
    AddressNotTraceable,
    Invalid,
    KernelError,
    KpmdError,
    SymbolNotFound,
    VerifierRejected,
    errno_name,
)

TABLE = {
    "malformed": 400,
    "invalid": 422,
    "bad-object": 422,
    "verifier-rejected": 422,
    "symbol-not-found": 422,
    "address-not-traceable": 422,
    "wrong-attach-type": 422,
    "forbidden": 403,
    "not-found": 404,
    "conflict": 409,
    "gone": 410,
    "too-large": 413,
    "quota": 429,
    "not-supported": 501,
    "shutting-down": 503,
    "kernel": 500,
}

#: What every HTTP service has beside them.
OTHERS = {"internal": 500, "method-not-allowed": 405, "timeout": 408}

CLASSES: list[type[KpmdError]] = [
    each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, KpmdError)
]


def test_the_table() -> None:
    assert {each.kind: each.status for each in CLASSES} == {**TABLE, **OTHERS}


def test_titles_are_told_apart() -> None:
    titles = {each.kind: each.title for each in CLASSES}
    assert len(set(titles.values())) == len(titles)


def test_a_problem_document() -> None:
    assert errors.Conflict("why", needs="this", errno=None).problem() == {
        "type": "urn:kpmd:error:conflict",
        "title": "In use",
        "status": 409,
        "detail": "why",
        "kind": "conflict",
        "needs": "this",
    }


def test_a_field_that_is_wrong() -> None:
    problem = Invalid.at(["a", 3], "must not be").problem()
    assert problem["detail"] == "a.3: must not be"
    assert problem["errors"] == [{"loc": ["a", 3], "msg": "must not be"}]


@pytest.mark.parametrize("count", [0, 1, 100, 101, 5000])
def test_symbols_are_cut_to_a_hundred(count: int) -> None:
    names = [f"f{number}" for number in range(count)]
    problem = SymbolNotFound("why", names, ["because"] * count).problem()
    assert problem["symbols"] == names[:100]
    assert problem["symbols_total"] == count
    assert len(problem["errors"]) == min(count, 100)


@pytest.mark.parametrize("count", [0, 1, 100, 101])
def test_addresses_are_cut_to_a_hundred(count: int) -> None:
    problem = AddressNotTraceable("why", [2**64 - 1] * count).problem()
    if count:
        assert problem["addresses"] == ["0xffffffffffffffff"] * min(count, 100)
        assert problem["addresses_total"] == count
    else:
        assert "addresses" not in problem
        assert "addresses_total" not in problem


def test_the_verifiers_log() -> None:
    problem = VerifierRejected("why", "words", True, errno="EACCES").problem()
    assert (problem["verifier_log"], problem["verifier_log_truncated"]) == ("words", True)
    assert problem["errno"] == "EACCES"


@pytest.mark.parametrize(
    ("number", "name"),
    [(errno.EPERM, "EPERM"), (524, "ENOTSUPP"), (512, "ERESTARTSYS"), (9999, "errno 9999")],
)
def test_errnos_by_name(number: int, name: str) -> None:
    assert errno_name(number) == name
    assert KernelError("why", number).problem()["errno"] == name
