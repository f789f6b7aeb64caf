"""``make dist``: sdist, wheels, SBOM and their checksums, in a folder that is made anew.

Of the files that git knows and no others, by way of a copy; their time is that of the last commit,
or SOURCE_DATE_EPOCH. Takes no network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kpmd import __version__
from tests.tools.sbom import sbom

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> str:
    """What a git command prints of this project."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def tracked() -> list[str]:
    """The project's files, by their paths."""
    return [each for each in git("ls-files", "-z").split("\0") if each]


def environment() -> dict[str, str]:
    """That of builds: this process's, with the time that is in what they make."""
    return {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip(), **os.environ}


def build(project: Path, folder: Path, *options: str) -> None:
    """``python -m build`` with these options and the tools of this virtual environment."""
    subprocess.run(
        [
            *(sys.executable, "-m", "build", "--no-isolation", *options),
            *("--outdir", folder, project),
        ],
        check=True,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )


def distribute(folder: Path) -> list[Path]:
    """Build everything that is given out; returns the files."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="kpmd-dist-") as scratch:
        tree = Path(scratch)
        for name in tracked():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        build(tree, folder)  # the wheel out of the sdist
        build(tree / "deploy" / "client", folder, "--wheel")
    bill = folder / f"kpmd-{__version__}.cdx.json"
    bill.write_text(sbom(ROOT, ROOT / "requirements.txt", environment()))
    made = sorted(folder.iterdir())
    sums = [f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n" for each in made]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return made


if __name__ == "__main__":
    if changed := git("status", "--porcelain"):
        print(f"dist: not what is committed:\n{changed}", end="", file=sys.stderr)
    for each in distribute(Path(sys.argv[1]).absolute()):
        print(f"{each.stat().st_size:9} {each.name}")
