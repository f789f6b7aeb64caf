"""Stack traces: addresses to names."""

from __future__ import annotations

import json
import struct

import pytest

from kpmd.core.stacks import StackCodec, TextSymbols

KALLSYMS = b"""\
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000100 t do_idle
ffffffff81000200 D some_data
ffffffff81000300 W weak_one
ffffffff81000300 T strong_one
ffffffff81000400 T last_one
ffffffffc0002000 t in_beta\t[beta]
ffffffffc0000010 T first_alpha\t[alpha]
ffffffffc0000000 t init_alpha\t[alpha]
"""


@pytest.fixture(scope="module")
def symbols() -> TextSymbols:
    return TextSymbols(KALLSYMS)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (0xFFFFFFFF81000000, ("_stext", 0, None)),
        (0xFFFFFFFF810000FF, ("_stext", 0xFF, None)),
        (0xFFFFFFFF81000100, ("do_idle", 0, None)),
        (0xFFFFFFFF81000204, ("do_idle", 0x104, None)),
        (0xFFFFFFFF81000301, ("weak_one", 1, None)),
        (0xFFFFFFFF81000400 + (256 << 10), ("last_one", 256 << 10, None)),
        (0xFFFFFFFF81000401 + (256 << 10), None),
        (0xFFFFFFFFC0000005, ("init_alpha", 5, "alpha")),
        (0xFFFFFFFFC0000011, ("first_alpha", 1, "alpha")),
        (0xFFFFFFFFC0002000, ("in_beta", 0, "beta")),
        (0xFFFFFFFFFFFFFFFF, None),
        (0xFFFFFFFF80FFFFFF, None),
        (0x7FFF12345678, None),
        (0, None),
    ],
)
def test_find(
    symbols: TextSymbols, address: int, expected: tuple[str, int, str | None] | None
) -> None:
    assert symbols.find(address) == expected


@pytest.mark.parametrize("text", [b"", b"0000000000000000 T hidden\n0000000000000000 t two\n"])
def test_nothing_is_known(text: bytes) -> None:
    assert TextSymbols(text).find(0xFFFFFFFF81000000) is None
    assert TextSymbols(text).find(10) is None


def decoded(codec: StackCodec, rows: bytes, stride: int, before: int = 0) -> list[list[object]]:
    return [
        json.loads(text)["frames"] for text in codec.rows(rows, before, stride, stride - before)
    ]


def test_traces_end_at_the_first_zero(symbols: TextSymbols) -> None:
    codec = StackCodec(False, lambda: symbols)
    rows = struct.pack("<3Q", 0xFFFFFFFF81000101, 0, 0xFFFFFFFF81000301) + bytes(24)
    assert decoded(codec, rows, 24) == [
        [
            {
                "address": "0xffffffff81000101",
                "symbol": "do_idle",
                "offset": 1,
                "module": None,
            }
        ],
        [],
    ]
    full = struct.pack("<2Q", 1, 2)
    assert [len(frames) for frames in decoded(codec, full * 3, 16)] == [2, 2, 2]
    # Values that are no whole number of addresses: what is left over is none.
    assert [len(frames) for frames in decoded(codec, full[:12] * 2, 12)] == [1, 1]


def test_without_symbols_there_are_addresses() -> None:
    (frames,) = decoded(StackCodec(False, None), struct.pack("<Q", 0xFFFFFFFF81000101), 8)
    assert frames == [
        {"address": "0xffffffff81000101", "symbol": None, "offset": None, "module": None}
    ]


def test_frames_by_build_id(symbols: TextSymbols) -> None:
    """Struct bpf_stack_build_id: by file, by address where the file was not there, and the end."""
    build_id = bytes(range(20))
    raw = (
        struct.pack("<i20sQ", 1, build_id, 0x1234)
        + struct.pack("<i20sQ", 2, bytes(20), 0x7F0012345678)
        + bytes(32)
        + struct.pack("<i20sQ", 1, build_id, 1)
    )
    (frames,) = decoded(StackCodec(True, lambda: symbols), raw, len(raw))
    nothing = {"symbol": None, "module": None}
    assert frames == [
        {"address": None, "offset": 0x1234, "build_id": build_id.hex(), **nothing},
        {"address": "0x00007f0012345678", "offset": None, **nothing},
    ]
