"""``python -m tests.cluster.objects``: the objects of deploy/kubernetes, in build/cluster.

For tests in a VM, which has no time for kubectl; and the seccomp profile of the runtimes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import tools

PROJECT = Path(__file__).resolve().parents[2]
KUSTOMIZATIONS = PROJECT / "deploy" / "kubernetes"
BUILT = PROJECT / "build" / "cluster"
OBJECTS, PROFILE = BUILT / "objects.yaml", BUILT / "seccomp.json"


def kustomize(name: str) -> list[Any]:
    """The objects that kubectl makes of a folder of deploy/kubernetes."""
    done = subprocess.run(
        [str(tools.kubectl()), "kustomize", str(KUSTOMIZATIONS / name)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return list(yaml.safe_load_all(done.stdout))


def of_kind(kind: str) -> list[Any]:
    """Of what ``main`` has written."""
    found = yaml.safe_load_all(OBJECTS.read_text(encoding="utf-8"))
    return [each for each in found if each["kind"] == kind]


def main() -> None:
    """Write both."""
    BUILT.mkdir(parents=True, exist_ok=True)
    made = [*kustomize("overlay-example"), *kustomize("client-example")]
    OBJECTS.write_text(yaml.safe_dump_all(made), encoding="utf-8")
    shutil.copy(tools.seccomp_profile(), PROFILE)


if __name__ == "__main__":
    main()
