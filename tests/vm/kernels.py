"""The table of known kernels, the cache they live in, and how they get there."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm import sources
from tests.vm.errors import VmError
from tests.vm.image import extract_vmlinux


@dataclass(frozen=True)
class Kernel:
    """A kernel by the name it has on the command line.

    ``pattern`` is matched against package names and its one group is the kernel's release;
    ``extra`` are further packages to unpack, named with that release.
    """

    name: str
    suites: tuple[str, ...]
    pattern: str
    extra: tuple[str, ...] = ()


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "6.12",
            ("bookworm-security",),
            r"linux-image-(6\.12\.\d+\+deb\d+-cloud-amd64)",
        ),
        Kernel(
            "6.1",
            ("bookworm", "bookworm-updates", "bookworm-security"),
            r"linux-image-(6\.1\.0-\d+-cloud-amd64)",
        ),
        Kernel(
            "5.10",
            ("bullseye", "bullseye-updates", "bullseye-security"),
            r"linux-image-(5\.10\.0-\d+-cloud-amd64)",
        ),
        # Backports move on: what is asked for as 7.3 is the newest 7.x they have.
        Kernel(
            "7.3",
            ("trixie-backports",),
            r"linux-binary-(7\.\d+\.\d+\+deb\d+-cloud-amd64)",
            ("linux-modules-{release}",),
        ),
    )
}


@dataclass(frozen=True)
class Cached:
    """A kernel in the cache, ready to boot."""

    folder: Path
    release: str

    @property
    def vmlinux(self) -> Path:
        """The uncompressed kernel, an ELF file."""
        return self.folder / "vmlinux"

    @property
    def modules(self) -> Path:
        """What the guest sees as /lib/modules/RELEASE."""
        return self.folder / "modules" / self.release


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where kernels are kept."""
    own = environ.get("KPMD_VM_CACHE")
    if own:
        return Path(own).absolute()
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kpmd-vm"


def newest(names: Iterable[str], pattern: str) -> tuple[str, str] | None:
    """Return the newest (package, release) of those that match, by the numbers in the release."""
    found = [(match[0], match[1]) for name in names if (match := re.fullmatch(pattern, name))]
    if not found:
        return None
    return max(found, key=lambda item: [int(digits) for digits in re.findall(r"\d+", item[1])])


def cached(kernel: Kernel, cache: Path) -> Cached | None:
    """Return the kernel if it was fetched already."""
    folder = cache / "kernels" / kernel.name
    try:
        release = (folder / "release").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    return Cached(folder, release)


def fetch(kernel: Kernel, cache: Path, *, refresh: bool = False) -> Cached:
    """Return the kernel, from the cache or from the Debian archive."""
    found = None if refresh else cached(kernel, cache)
    if found:
        return found
    with locked(cache / f"{kernel.name}.lock"):
        # Another process may have fetched it while this one waited for the lock.
        found = None if refresh else cached(kernel, cache)
        if found:
            return found
        # Nobody else fetches this kernel now, so these are from fetches that were killed.
        for leftover in cache.glob(f"fetch-{kernel.name}-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=f"fetch-{kernel.name}-", dir=cache) as text:
            return _fetch_into(kernel, cache, Path(text))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file (made if missing) for the time of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _fetch_into(kernel: Kernel, cache: Path, work: Path) -> Cached:
    apt = _Apt(work, sources.sources_list(sources.mirror(), kernel.suites))
    say(f"looking for kernel {kernel.name}")
    apt.update()
    choice = newest(apt.package_names(), kernel.pattern)
    if choice is None:
        raise VmError(f"no package like {kernel.pattern} in {', '.join(kernel.suites)}")
    package, release = choice
    packages = [package, *(name.format(release=release) for name in kernel.extra)]
    say(f"fetching {' '.join(packages)}")
    tree = work / "tree"
    apt.unpack(packages, tree)

    # Packages differ in where things lie: lib or usr/lib, /boot or beside the modules.
    modules = _one(tree, (f"usr/lib/modules/{release}", f"lib/modules/{release}"))
    vmlinuz = _one(tree, (f"boot/vmlinuz-{release}", f"usr/lib/modules/{release}/vmlinuz"))
    ready = work / "ready"
    (ready / "modules").mkdir(parents=True)
    (ready / "vmlinux").write_bytes(extract_vmlinux(vmlinuz.read_bytes()))
    modules.rename(ready / "modules" / release)
    # depmod wants to find lib/modules/RELEASE below the folder that it is given.
    (work / "depmod" / "lib").mkdir(parents=True)
    (work / "depmod" / "lib" / "modules").symlink_to(ready / "modules")
    checked(["depmod", "-b", str(work / "depmod"), release])
    for parent in (ready, ready / "modules"):
        parent.chmod(0o755)
    (ready / "release").write_text(release + "\n", encoding="ascii")

    final = cache / "kernels" / kernel.name
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(work / "old")
    ready.rename(final)
    return Cached(final, release)


def say(text: str) -> None:
    """Tell what takes a while."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


def _one(tree: Path, candidates: Iterable[str]) -> Path:
    tried = [tree / candidate for candidate in candidates]
    for path in tried:
        if path.exists():
            return path
    raise VmError(f"the package has none of {', '.join(str(path) for path in tried)}")


class _Apt:
    """apt with lists and caches of its own: the machine's are neither needed nor touched."""

    def __init__(self, work: Path, sources_list: str) -> None:
        self._work = work
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (work / name).mkdir(parents=True)
        (work / "sources.list").write_text(sources_list, encoding="utf-8")
        self._options = [
            f"-oDir::Etc::SourceList={work}/sources.list",
            "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={work}/lists",
            "-oDir::State::status=/dev/null",
            f"-oDir::Cache={work}/cache",
            "-oAPT::Architecture=amd64",
            "-oAPT::Architectures=amd64",
            "-oAcquire::Languages=none",
            # apt's own user can't reach a cache below a private home.
            "-oAPT::Sandbox::User=root",
        ]

    def update(self) -> None:
        """Read the suites' lists of packages."""
        checked(["apt-get", *self._options, "-qq", "--error-on=any", "update"])

    def package_names(self) -> list[str]:
        """Return the names of all packages in the lists."""
        return checked(["apt-cache", *self._options, "pkgnames"]).split()

    def unpack(self, packages: Sequence[str], tree: Path) -> None:
        """Download the packages and unpack them over each other."""
        debs = self._work / "debs"
        checked(["apt-get", *self._options, "-qq", "download", *packages], cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            checked(["dpkg", "-x", str(deb), str(tree)])


def checked(command: Sequence[str], cwd: Path | None = None) -> str:
    """Run a program; return what it printed, or raise what it says is wrong."""
    try:
        done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise VmError(f"{command[0]} is missing; `make setup-vm` installs it") from error
    if done.returncode:
        raise VmError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout
