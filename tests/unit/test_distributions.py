"""The table of distributions: what it calls booted is what the tests boot, and expect."""

from __future__ import annotations

from tests.docs.pages import ROOT
from tests.kernel.conftest import EXPECTED
from tests.vm.kernels import KERNELS


def _rows() -> list[list[str]]:
    text = (ROOT / "docs/reference/distributions.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_booted_row_is_a_kernel_of_the_matrix() -> None:
    booted = {row[1]: row for row in _rows() if row[-1] == "booted"}
    assert set(booted) == set(KERNELS) == set(EXPECTED)
    for kernel, row in booted.items():
        version = tuple(int(part) for part in kernel.split("."))
        assert row[2].startswith("yes") is EXPECTED[kernel], row
        assert (row[3] == "yes") is (EXPECTED[kernel] and version >= (6, 10)), row


def test_each_row_says_how_it_is_known() -> None:
    kernels = [row for row in _rows() if len(row) == 7][1:]
    assert len(kernels) > 8
    for row in kernels:
        known = row[-1] or "not checked"
        assert known in ("booted", "config", "version", "not checked"), row
        assert known != "not checked" or row[1] == known, row
