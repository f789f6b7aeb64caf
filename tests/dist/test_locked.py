"""The lists of licences, and what is made of a lock file for the tools that check it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.tools.dist import ROOT
from tests.tools.locked import Pin, environment, pins

LOCKS = sorted(each.name for each in ROOT.glob("requirements*.txt"))


@pytest.mark.parametrize("name", LOCKS)
def test_all_that_a_lock_file_names_is_there(name: str, tmp_path: Path) -> None:
    found = pins(ROOT / name)
    lines = (ROOT / name).read_text().splitlines()
    assert len(found) == len([each for each in lines if each[:1].isalnum()]) > 20
    assert sum(len(each.hashes) for each in found.values()) == len(
        [each for each in lines if "--hash=" in each]
    )
    environment(tmp_path, found)
    assert len(list(tmp_path.glob("lib/*/site-packages/*.dist-info/METADATA"))) == len(found)


@pytest.mark.parametrize("other", ["pytest", "no-such-package"])
def test_what_is_not_installed_as_locked(other: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{other} is .*: make setup"):
        environment(tmp_path, {"packaging": Pin(version("packaging"), []), other: Pin("0.1", [])})


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: Apache-2.0 AND MIT", True),
        ("License-Expression: GPL-3.0-or-later", False),
        ("License-Expression: MIT AND GPL-3.0-only", False),
        ("Classifier: License :: OSI Approved :: GNU General Public License (GPL)", False),
        ("Summary: says nothing of a licence", False),
    ],
)
def test_licences_of_what_kpmd_runs_with(field: str, allowed: bool, tmp_path: Path) -> None:
    environment(tmp_path, {})
    (there,) = tmp_path.glob("lib/*/site-packages")
    info = there / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: other\nVersion: 1.0\n{field}\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "pip-licenses", "--python", tmp_path / "bin" / "python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == allowed, done.stdout
    assert "other" in (done.stdout if allowed else done.stderr)
