"""The manual pages: one for each command, the daemon's, and nothing that groff complains of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tools.man import commands, page_name

ROOT = Path(__file__).parents[2]


def test_each_command_has_a_page_that_groff_reads(tmp_path: Path) -> None:
    # A process of its own: what sphinx-click uses of Sphinx is deprecated.
    subprocess.run([sys.executable, "-m", "tests.tools.man", tmp_path], check=True, cwd=ROOT)
    pages = sorted(tmp_path.iterdir())
    made = {each.name for each in pages}
    assert {f"{page_name(context)}.1" for context in commands()} <= made
    assert {"kpmd.8", "kpmd.toml.5", "kpmd-policy.toml.5"} <= made
    done = subprocess.run(
        ["groff", "-K", "utf8", "-man", "-ww", "-T", "utf8", *pages], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.returncode == 0
    text = (tmp_path / "kpmctl.1").read_text()
    assert "Exit status" in text
    assert r"\-\-socket" in text
    assert "DESCRIPTION" in (tmp_path / "kpmctl-lease-create.1").read_text()
    assert r"\-\-check\-config" in (tmp_path / "kpmd.8").read_text()
    assert "[administrators]" in (tmp_path / "kpmd-policy.toml.5").read_text()
