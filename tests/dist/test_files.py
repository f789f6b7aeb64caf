"""What is in sdist and wheels, what they say of themselves, and that it is always the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from trove_classifiers import classifiers

import kpmd
from tests.dist.conftest import Built
from tests.tools.dist import ROOT, build, tracked
from tests.tools.locked import pins

#: What kpmd cannot do without and no import would miss.
NEEDED = {
    "kpmd/builtin/count.bpf.c",
    "kpmd/builtin/count.bpf.o",
    "kpmd/builtin/LICENSE",
    "kpmd/deny.txt",
    "kpmd/kpmctl/dashboard/page.html",
    "kpmd/py.typed",
}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Metadata:
    """What is wrong in itself raises."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name))


def test_nothing_else_is_given_out(built: Built) -> None:
    assert built.files == {
        each.name for each in (built.sdist, built.wheel, built.client, built.sbom)
    }
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=built.folder, check=True)
    assert len((built.folder / "SHA256SUMS").read_text().splitlines()) == len(built.files)


def test_the_sdist_is_the_project(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    top = built.sdist.name.removesuffix(".tar.gz")
    assert {each.name for each in members} == {f"{top}/{each}" for each in [*tracked(), "PKG-INFO"]}
    assert {(each.uid, each.gid, each.uname) for each in members} == {(0, 0, "")}


def test_the_wheel_is_the_package(built: Built) -> None:
    found = names(built.wheel)
    package = {each for each in found if each.startswith("kpmd/")}
    assert package == {each for each in tracked() if each.startswith("kpmd/")}
    assert package >= NEEDED
    stem = f"kpmd-{kpmd.__version__}"
    assert {each for each in found if each.startswith(f"{stem}.data/")} == {
        f"{stem}.data/data/share/kpmd/{each.removeprefix('deploy/')}"
        for each in ("deploy/kpmd.toml", "deploy/policy.toml", *tracked())
        if each.startswith(("systemd/", "deploy/kpmd.toml", "deploy/policy.toml"))
    }
    assert {
        f"{stem}.dist-info/licenses/{each}" for each in ("LICENSE", "kpmd/builtin/LICENSE")
    } < found


def test_metadata(built: Built) -> None:
    ours, client = metadata(built.wheel), metadata(built.client)
    assert (ours.name, client.name) == ("kpmd", "kpmd-client")
    assert ours.license_expression == "Apache-2.0 AND GPL-2.0-only"  # the BPF programs
    assert client.license_expression == "Apache-2.0"
    for each in (ours, client):
        assert str(each.version) == kpmd.__version__
        assert str(each.requires_python) == ">=3.11"
        assert each.description_content_type == "text/markdown"
        assert each.summary
        assert each.description
        assert each.license_files
        assert set(each.classifiers or []) <= classifiers
        # Nothing that cannot be had from the same index.
        assert [need for need in each.requires_dist or [] if need.url] == []


def test_the_same_from_the_sdist(
    built: Built, unpacked: Path, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    """By another user, elsewhere, later: files are of another time, mode and folder."""
    subprocess.run(
        [
            *(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel"),
            *("--outdir", tmp_path, unpacked),
        ],
        cwd="/",
        env=elsewhere,
        umask=0o077,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert {each.name: digest(each) for each in tmp_path.iterdir()} == {
        each.name: digest(each) for each in (built.sdist, built.wheel)
    }


def test_what_pip_makes_of_the_sdist(
    built: Built, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--wheel-dir", tmp_path, built.sdist),
        ],
        env=elsewhere,
        umask=0o077,
        check=True,
    )
    assert digest(tmp_path / built.wheel.name) == digest(built.wheel)


def test_the_client_from_the_sdist(built: Built, unpacked: Path, tmp_path: Path) -> None:
    build(unpacked / "deploy" / "client", tmp_path, "--wheel")
    assert digest(tmp_path / built.client.name) == digest(built.client)


def test_the_sbom(built: Built, unpacked: Path, elsewhere: dict[str, str]) -> None:
    text = built.sbom.read_text()
    again = subprocess.run(
        [sys.executable, "-m", "tests.tools.sbom", "requirements.txt"],
        cwd=unpacked,
        env=elsewhere,
        umask=0o077,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert again.stdout == text
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == kpmd.__version__
    locked = pins(ROOT / "requirements.txt")
    found = {each["purl"]: each for each in bill["components"]}
    assert found.keys() == {f"pkg:pypi/{name}@{pin.version}" for name, pin in locked.items()}
    for name, pin in locked.items():
        component = found[f"pkg:pypi/{name}@{pin.version}"]
        hashes = [
            each["content"]
            for reference in component["externalReferences"]
            for each in reference.get("hashes", [])
        ]
        assert hashes == pin.hashes
        assert hashes
        assert component["licenses"], name
    needs = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    ours = needs[bill["metadata"]["component"]["bom-ref"]]
    direct = {each.partition("==")[0].lower().replace("_", "-") for each in ours}
    assert direct == {
        each.name for each in metadata(built.wheel).requires_dist or [] if not each.marker
    }
