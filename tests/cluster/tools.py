"""What image and tests take of Debian 13: the image's base, kubectl, the runtimes' seccomp profile.

Debian 12's kubectl is too old for what the objects are written in, and its profile for CAP_BPF.
"""

from __future__ import annotations

from pathlib import Path

from tests.vm import debian
from tests.vm.kernels import cache_folder

_SUITES = ("trixie", "trixie-updates", "trixie-security")

#: As debian:trixie-slim, and all that kpmd's package depends on: nothing is downloaded while the
#: image is built.
BASE = debian.System(
    suites=_SUITES,
    packages=(
        "python3",
        "libbpf1",
        "libseccomp2",
        "systemd-standalone-sysusers",
        "systemd-standalone-tmpfiles",
    ),
    options=(
        "--variant=minbase",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")),
    ),
)

#: Unpacked, and not installed: what is run of it finds this machine's libraries.
TOOLS = debian.System(
    suites=_SUITES,
    packages=("kubectl", "golang-github-containers-common"),
    options=("--variant=extract",),
)


def base() -> Path:
    """The root folder that the image begins with; made, where it is not in the cache."""
    return debian.make(BASE, cache_folder())


def kubectl() -> Path:
    """The program."""
    return debian.make(TOOLS, cache_folder()) / "usr/bin/kubectl"


def seccomp_profile() -> Path:
    """What Podman and CRI-O take for ``RuntimeDefault``; containerd's differs in nothing here."""
    return debian.make(TOOLS, cache_folder()) / "usr/share/containers/seccomp.json"
