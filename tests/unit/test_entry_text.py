"""Entries as JSON and as bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpmd.api.entry_text import EntryText, octets
from kpmd.bpf.maps import Chunk, Layout
from kpmd.errors import TooLarge


@st.composite
def chunks(draw: st.DrawFn) -> tuple[Layout, list[tuple[bytes, list[bytes]]], Chunk]:
    """A layout, entries of that, and the two of them as the kernel gives them."""
    key_size, value_size = draw(st.integers(1, 24)), draw(st.integers(1, 90))
    percpu = draw(st.booleans())
    copies = draw(st.integers(1, 5)) if percpu else 1
    stride = (value_size + 7) & ~7 if percpu else value_size
    layout = Layout(key_size, value_size, stride, copies, percpu)
    key = st.binary(min_size=key_size, max_size=key_size)
    value = st.binary(min_size=value_size, max_size=value_size)
    values = st.lists(value, min_size=copies, max_size=copies)
    entries = draw(st.lists(st.tuples(key, values), max_size=6))
    raw = (b"".join(each for each, _ in entries), b"".join(layout.join(v) for _, v in entries))
    return layout, entries, Chunk(memoryview(raw[0]), memoryview(raw[1]), len(entries), None)


@given(chunks())
def test_octets(made: Any) -> None:
    layout, entries, chunk = made
    assert octets(layout, chunk) == b"".join(key + b"".join(values) for key, values in entries)


class Numbers:
    """Decodes to the sum of the bytes that count, and tells where it looked."""

    def longest(self, length: int) -> int:
        return 3 * length

    def rows(
        self, rows: bytes | memoryview, before: int, stride: int, length: int | None = None
    ) -> list[str]:
        assert length is not None
        assert len(rows) % stride == 0
        return [str(sum(rows[at : at + length])) for at in range(before, len(rows), stride)]


@given(chunks(), st.booleans(), st.booleans())
def test_texts(made: Any, key: bool, value: bool) -> None:
    layout, entries, chunk = made
    text = EntryText(layout, Numbers() if key else None, Numbers() if value else None)
    expected = []
    for each, values in entries:
        shown: list[Any] = [one.hex() for one in values]
        sums: list[Any] = [sum(one) for one in values]
        entry: dict[str, Any] = {
            "key": each.hex(),
            "value": shown if layout.percpu else shown[0],
        }
        decoded: dict[str, Any] = {"key": sum(each)} if key else {}
        if value:
            decoded["value"] = sums if layout.percpu else sums[0]
        if decoded:
            entry["decoded"] = decoded
        expected.append(entry)
    assert [json.loads(each) for each in text.texts(chunk)] == expected


class Long:
    """Decodes each byte to a thousand letters."""

    def longest(self, length: int) -> int:
        return 2 + 1000 * length

    def rows(
        self, rows: bytes | memoryview, before: int, stride: int, length: int | None = None
    ) -> list[str]:
        return ['"%s"' % ("x" * 1000 * stride)] * (len(rows) // stride)


def test_what_decodes_to_much_is_refused() -> None:
    layout = Layout(8, 8, 8, 1, False)
    text = EntryText(layout, None, Long())
    data = memoryview(bytes(8 * 4096))
    assert text.limit(4096) < 300
    with pytest.raises(TooLarge, match="decode=false"):
        text.texts(Chunk(data, data, 4096, None))
    assert EntryText(layout).limit(4096) == 4096


def test_one_value() -> None:
    layout = Layout(0, 2, 2, 1, False)
    assert EntryText(layout).value(b"\1\2") == '{"value":"0102"}'
    assert EntryText(layout, None, Numbers()).limit(5) == 5
