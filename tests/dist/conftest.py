"""What is built, once for all tests, and what is installed from it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import kpmd
from tests.tools.dist import ROOT, distribute, environment

#: As `pip install` of somebody else has it: nothing of this process's environment.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


class Built:
    """The files that `make dist` makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {each.name for each in distribute(folder)}
        stem = f"kpmd-{kpmd.__version__}"
        self.sdist = folder / f"{stem}.tar.gz"
        self.wheel = folder / f"{stem}-py3-none-any.whl"
        self.sbom = folder / f"{stem}.cdx.json"
        self.client = folder / f"kpmd_client-{kpmd.__version__}-py3-none-any.whl"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("dist") / "dist")


@pytest.fixture(scope="session")
def unpacked(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist's folder, as a careful user unpacks it: nobody else can read it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built.sdist) as archive:
        archive.extractall(folder, filter="data")
    made = folder / built.sdist.name.removesuffix(".tar.gz")
    for each in made.rglob("*"):
        each.chmod(each.stat().st_mode & 0o700)
    return made


@pytest.fixture(scope="session")
def elsewhere() -> dict[str, str]:
    """An environment unlike that of `make dist`, but for the time that is in what it builds."""
    epoch = environment()["SOURCE_DATE_EPOCH"]
    return CLEAN | {"SOURCE_DATE_EPOCH": epoch, "TZ": "Pacific/Chatham", "LC_ALL": "C"}


def pip(python: Path, *arguments: str | Path) -> None:
    done = subprocess.run(
        [python, "-m", "pip", *arguments], capture_output=True, text=True, env=CLEAN
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def bin(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: A001
    """The commands of an environment where kpmd was installed from its wheel, as it is locked."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip(python, "install", "--no-compile", "--require-hashes", "-r", ROOT / "requirements.txt")
    pip(python, "install", "--no-index", built.wheel)  # all that it names is there
    pip(python, "check")
    return python.parent
