"""``python -m tests.cluster.image``: the container image, in build/image, without a registry.

The base is a Debian of the archive's packages in place of the registry's; the steps are those of
``deploy/Containerfile``. Makes ``kpmd.tar`` (an OCI archive: `podman load`, `ctr images import`),
and for the tests ``root``, the image's root folder, and ``config.json``, how it is run.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kpmd import __version__
from tests.cluster import tools

PROJECT = Path(__file__).resolve().parents[2]
IMAGE = PROJECT / "build" / "image"
ROOT, CONFIG, ARCHIVE = IMAGE / "root", IMAGE / "config.json", IMAGE / "kpmd.tar"

_DEB = f"build/deb/kpmd_{__version__}_amd64.deb"
_NAME = f"localhost/kpmd:{__version__}"


class Buildah:
    """buildah with a storage of its own, without a daemon and without a network."""

    def __init__(self, work: Path) -> None:
        self._command = [
            *("unshare", "--net", "buildah", "--storage-driver", "vfs"),
            *("--root", str(work / "storage"), "--runroot", str(work / "run")),
        ]

    def __call__(self, *arguments: str) -> str:
        """Run it; returns what it prints."""
        done = subprocess.run(
            [*self._command, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=PROJECT
        )
        return done.stdout.strip()


def build(work: Path) -> None:
    """Make the image of the package that `make deb` made, and what the tests take of it."""
    buildah = Buildah(work)
    base = work / "base.tar"
    # Where this machine has its packages from is nobody else's.
    out = ("--exclude=./etc/apt/sources.list", "--exclude=./etc/apt/sources.list.d/*")
    subprocess.run(["tar", "-C", str(tools.base()), *out, "-cf", str(base), "."], check=True)
    begun = buildah("from", "scratch")
    buildah("add", begun, str(base), "/")
    buildah("commit", "--quiet", "--rm", begun, "kpmd-base")
    base.unlink()
    buildah(
        *("build", "--isolation", "chroot", "--file", "deploy/Containerfile", "--tag", _NAME),
        *("--build-arg", "BASE=localhost/kpmd-base", "--build-arg", f"VERSION={__version__}"),
        *("--build-arg", f"DEB={_DEB}", "."),
    )
    for each in (ROOT, ARCHIVE):
        subprocess.run(["rm", "-rf", str(each)], check=True)
    IMAGE.mkdir(parents=True, exist_ok=True)
    buildah("push", "--quiet", _NAME, f"oci-archive:{ARCHIVE}:{_NAME}")
    inspected: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", _NAME))
    CONFIG.write_text(json.dumps(inspected["OCIv1"]["config"], indent=1), encoding="utf-8")
    running = buildah("from", _NAME)
    subprocess.run(["cp", "-a", buildah("mount", running), str(ROOT)], check=True)
    buildah("rm", running)


def main() -> None:
    """Build in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kpmd-image-") as work:
        build(Path(work))
    print(f"{ARCHIVE.relative_to(PROJECT)}: {ARCHIVE.stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
