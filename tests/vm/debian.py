"""Makes the Debian that guests with a real systemd run, and keeps it in the cache."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.vm import sources
from tests.vm.errors import VmError
from tests.vm.kernels import checked, locked, say


@dataclass(frozen=True)
class System:
    """What decides a root folder's content; the first suite is the release itself."""

    suites: tuple[str, ...]
    packages: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name it has in the cache: what is made otherwise is another one."""
        return f"{self.suites[0]}-{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"


def _system(release: str, *packages: str) -> System:
    return System(
        suites=(release, f"{release}-updates", f"{release}-security"),
        packages=(
            "systemd",
            "systemd-sysv",
            "dbus",
            "python3",  # also for the libraries that an interpreter from elsewhere is linked with
            "libbpf1",
            "procps",
            "kmod",
            "bpftool",
            *packages,
        ),
        # Nobody reads these in the guest: half of the size and of the time.
        options=(
            "--variant=minbase",
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")),
        ),
    )


#: By the number of the release. Debian 12's has all that the project's own Python takes.
SYSTEMS = {
    "12": _system("bookworm"),
    # What Debian 12's has through other packages.
    "13": _system("trixie", "libstdc++6"),
}
DEFAULT = "12"


def cached(system: System, cache: Path) -> Path | None:
    """Return the root folder if it was made already."""
    folder = _folder(system, cache)
    return folder if folder.is_dir() else None


def make(system: System, cache: Path, *, refresh: bool = False) -> Path:
    """Return the root folder, from the cache or made of the Debian archive's packages."""
    found = None if refresh else cached(system, cache)
    if found:
        return found
    if os.geteuid() != 0:
        raise VmError("only root can make a Debian with users of its own; use sudo")
    with locked(cache / f"{system.key}.lock"):
        # Another process may have made it while this one waited for the lock.
        found = None if refresh else cached(system, cache)
        if found:
            return found
        # Nobody else makes this one now, so these are from processes that were killed.
        for leftover in cache.glob(f"make-{system.key}-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=f"make-{system.key}-", dir=cache) as text:
            return _make_in(system, cache, Path(text))


def _folder(system: System, cache: Path) -> Path:
    return cache / "systems" / system.key


def _make_in(system: System, cache: Path, work: Path) -> Path:
    say(f"making a Debian ({system.suites[0]}) with systemd: half a minute")
    listed = work / "sources.list"
    listed.write_text(sources.sources_list(sources.mirror(), system.suites), encoding="utf-8")
    root = work / "root"
    checked(command(system, root, listed))
    final = _folder(system, cache)
    # It holds programs that make their caller root (su): nobody else may reach them out here.
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if final.exists():
        final.rename(work / "old")
    root.rename(final)
    return final


def command(system: System, root: Path, sources_list: Path) -> list[str]:
    """Return the command that makes the root folder."""
    return [
        # What it mounts in the folder (this machine's /sys among it) is seen by nobody else, and
        # gone with it when it is killed: the folder may then be removed.
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        f"--include={','.join(system.packages)}",
        *system.options,
        system.suites[0],
        str(root),
        str(sources_list),
    ]
