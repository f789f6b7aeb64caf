"""The distribution of the client alone: what is in it, and that it needs no more than it says."""

from __future__ import annotations

import email
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import kpmd
from tests.dist.conftest import Built
from tests.unit.test_client import ROOT, always, http, scripted

#: What comes with the dependencies that it names, and theirs.
PACKAGES = ("click", "h11", "rich", "markdown_it", "mdurl", "pygments")

#: Modules that only extras make work.
EXTRAS = ("kpmd.kpmctl.dashboard", "kpmd.kpmctl.top_")


@pytest.fixture(scope="module")
def wheel(built: Built) -> Path:
    return built.client


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The ``sys.path`` of who installed it, without the standard library."""
    here, needed = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("needed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(here)
    for name in PACKAGES:
        (needed / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    return [str(here), str(needed)]


def python(path: list[str], code: str) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-W",
            "error",
            "-c",
            f"import sys; sys.path[:0] = {path}\n{code}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        told = {
            Path(each).name: archive.read(each).decode() for each in names if "dist-info" in each
        }
    files = [each for each in names if "dist-info" not in each]
    assert {"kpmd/__init__.py", "kpmd/py.typed", "kpmd/client/aio.py"} < set(files)
    assert not [each for each in files if each.endswith((".pyc", ".o", ".c"))]
    assert {"/".join(each.split("/")[:2]) for each in files} == {
        "kpmd/__init__.py",
        "kpmd/client",
        "kpmd/kpmctl",
        "kpmd/py.typed",
    }
    assert "kpmctl = kpmd.kpmctl.__main__:main" in told["entry_points.txt"]
    assert "Apache License" in told["LICENSE"]
    metadata = email.message_from_string(told["METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("kpmd-client", kpmd.__version__)
    needs = [each for each in metadata.get_all("Requires-Dist", []) if "extra" not in each]
    assert sorted(each.partition(">")[0] for each in needs) == ["click", "h11", "rich"]


def test_its_versions_are_those_of_kpmd() -> None:
    import tomllib

    ours, theirs = (
        tomllib.loads((ROOT / each / "pyproject.toml").read_text())["project"]
        for each in ("deploy/client", ".")
    )
    extras = [each for many in ours["optional-dependencies"].values() for each in many]
    assert {*ours["dependencies"], *extras} < set(theirs["dependencies"])
    assert ours["requires-python"] == theirs["requires-python"]
    assert ours["scripts"].items() <= theirs["scripts"].items()


def test_it_runs_with_nothing_else(installed: list[str]) -> None:
    for arguments, told in ((["--version"], kpmd.__version__), (["--help"], "Programs and links:")):
        code = f"sys.argv[1:] = {arguments}\nfrom kpmd.kpmctl.__main__ import main\nmain()"
        assert told in python(installed, code)
    link = {"id": "lnk-1", "count": 1}
    with scripted(always(http(link))) as server:
        code = (
            "import asyncio, kpmd.client\n"
            f"path = {server.path!r}\n"
            "with kpmd.client.Client(path) as client: print(client.link('lnk-1')['count'])\n"
            "async def main():\n"
            "    async with kpmd.client.AsyncClient(path) as client:\n"
            "        print((await client.link('lnk-1'))['count'])\n"
            "asyncio.run(main())\n"
        )
        assert python(installed, code) == "1\n1\n"


def test_every_module_can_be_imported(installed: list[str]) -> None:
    """But for those that an extra is for; nothing else than what is named is there to be found."""
    modules = [
        ".".join(each.relative_to(installed[0]).with_suffix("").parts).removesuffix(".__init__")
        for each in sorted((Path(installed[0]) / "kpmd" / "client").rglob("*.py"))
        if each.name != "__main__.py"
    ]
    wanted = [each for each in modules if not each.startswith(EXTRAS)]
    assert "kpmd.client.aio" in wanted
    python(installed, f"import importlib\nfor each in {wanted}: importlib.import_module(each)")
