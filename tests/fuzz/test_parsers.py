"""Parsers of what others wrote: whatever it is, they give a value or the one error they name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from kpmd.api import paging, problem
from kpmd.api.app import routes
from kpmd.api.body import parse
from kpmd.api.fields import U64, Base64, Labels, NumberOrBytes
from kpmd.core import carried
from kpmd.core.deny import DenyList, DenyListError
from kpmd.core.globs import Glob, GlobError
from kpmd.errors import Invalid, Malformed
from tests.fuzz.background import examples
from tests.unit.test_carried import RECORDS

BODIES: list[type[BaseModel]] = sorted(
    {route.body for route in routes() if route.body is not None}, key=lambda each: each.__name__
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


def _read(model: type[BaseModel], raw: bytes) -> BaseModel | None:
    """What ``parse`` makes of a body; None where it is refused as it may be."""
    try:
        return parse(model, raw)
    except (Malformed, Invalid):
        return None
    except ValidationError as error:
        told = problem.from_validation(error).problem()
        assert told["status"] == 422
        assert len(json.dumps(told)) < 100_000
        return None


@pytest.mark.parametrize("model", BODIES)
def test_bodies_of_any_bytes(model: type[BaseModel]) -> None:
    @examples(40)
    @given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
    def check(raw: bytes) -> None:
        _read(model, raw)

    check()


@pytest.mark.parametrize("model", BODIES)
def test_bodies_with_any_fields(model: type[BaseModel]) -> None:
    """Whatever stands in the fields that there are."""
    fields = st.fixed_dictionaries({}, optional=dict.fromkeys(model.model_fields, VALUES))

    @examples(50)
    @given(fields)
    def check(body: dict[str, Any]) -> None:
        _read(model, json.dumps(body).encode())

    check()


_U64: TypeAdapter[int] = TypeAdapter(U64)


@examples(100)
@given(st.integers(0, 2**64 - 1), st.sampled_from([str, hex, lambda n: hex(n).upper(), int]))
def test_64_bits_are_kept(number: int, form: Any) -> None:
    assert _U64.validate_python(form(number)) == number


@examples(166)
@given(st.text(max_size=30) | SCALARS | st.from_regex(r"[-+ ]?(0[xXoObB])?[0-9a-fA-F_]+[ \n]?"))
def test_what_is_no_64_bits(value: Any) -> None:
    try:
        number = _U64.validate_python(value)
    except ValidationError:
        return
    assert 0 <= number < 2**64
    assert isinstance(value, (int, str))
    if isinstance(value, str):
        assert value.isascii()
        assert value.isalnum()


@examples(66)
@given(st.binary(max_size=200), st.integers(0, 80))
def test_base64_is_kept(data: bytes, width: int) -> None:
    text = base64.b64encode(data).decode()
    broken = (
        "\n".join(text[at : at + width] for at in range(0, len(text), width)) if width else text
    )
    kinds: tuple[Any, ...] = (Base64, NumberOrBytes)
    for kind in kinds:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        assert adapter.validate_python(broken) == data


@pytest.mark.parametrize("kind", [Base64, NumberOrBytes, Labels])
def test_fields_of_any_value(kind: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    @examples(66)
    @given(VALUES)
    def check(value: Any) -> None:
        try:
            adapter.validate_python(value)
        except ValidationError:
            return

    check()


@examples(100)
@given(st.text(max_size=30) | st.integers().map(str), st.integers(1, 1000), st.integers(0, 10**6))
def test_cursors(after: str, limit: int, total: int) -> None:
    try:
        places, following = paging.span(after, limit, total)
    except Invalid:
        return
    assert len(places) <= limit
    assert not places or 0 <= places[0] <= places[-1] < total
    if following is not None:
        assert paging.position(following) == places[-1] + 1


@examples(100)
@given(st.text(max_size=200) | st.text("ab*?[]!^-\\: \t\n#", max_size=60))
def test_deny_lists(text: str) -> None:
    try:
        found = DenyList.parse(text)
    except DenyListError:
        return
    assert all(line.reason for line in found.lines)
    found.reason("vfs_read")


@examples(100)
@given(st.text(max_size=100) | st.text("ab*?[]!^-\\:", max_size=40))
def test_globs(text: str) -> None:
    try:
        glob = Glob.parse(text)
    except GlobError:
        return
    glob.matches("vfs_read", None)
    assert Glob.parse(str(glob)) == glob


@examples(66)
@given(RECORDS, st.data())
def test_carried_state_with_something_changed(record: Any, data: st.DataObject) -> None:
    """Of an entry in the FD store that is damaged, or of another kpmd: no other error comes."""
    head = carried.head(record)
    body = json.loads(carried.body(record))
    for part in (head, body):
        if part and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(part)))
            if data.draw(st.booleans()):
                part[name] = data.draw(VALUES)
            else:
                del part[name]
    raw = bytearray(json.dumps(body).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(raw)))
        raw[place : place + 2] = data.draw(st.binary(max_size=3))
    try:
        found = carried.read(head, bytes(raw))
    except carried.Unreadable:
        return
    assert type(found.record) is type(record)
    # What was read is as good as any other: it can be carried on.
    assert carried.body(found.record)
    assert json.dumps(carried.head(found.record))
