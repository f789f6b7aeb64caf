"""Plans what the guest sees of this machine's folders.

The guest's root is this machine's, but three things must differ without changing this machine:
folders that only root may enter (a private home holding the project or its Python) must let
``nobody`` through, the kernel's modules must stand in /lib/modules, and the guest's own tmpfs
mounts must not hide a project that lies below one of them.  The first two are mounts in a
private mount namespace (see ``launch.py``), the last one is done by the guest.

A guest with a root of its own (``systemd.py``) sees this machine's root beside it, arranged in the
same way, and takes from there what ``inside`` names.
"""

import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.vm.errors import VmError

HIDDEN = ("/tmp", "/run", "/dev/shm", "/var/tmp")
# Folders of the system itself ("" is the root), but for those below /usr that are people's.
_SYSTEM = ("", "usr", "bin", "sbin", "lib", "lib64", "etc")
_NOT_SYSTEM = ("local", "src")


@dataclass(frozen=True)
class Step:
    """One mount or link to make, in order; ``do`` is "tmpfs", "bind" or "link"."""

    do: str
    path: str
    source: str = ""

    def plain(self) -> dict[str, str]:
        """Return it as the launcher reads it."""
        return asdict(self)


@dataclass(frozen=True)
class Route:
    """Where a path leads: the real folder, and the symbolic links met on the way."""

    real: str
    links: tuple[tuple[str, str], ...]


def route(path: str) -> Route:
    """Follow a path one part at a time."""
    links: list[tuple[str, str]] = []
    todo = [part for part in reversed(path.split("/")) if part]
    real = "/"
    while todo:
        part = todo.pop()
        if part == "..":
            real = os.path.dirname(real)
        elif part != ".":
            here = os.path.join(real, part)
            if not os.path.islink(here):
                real = here
                continue
            if len(links) > 40:
                raise VmError(f"{path} has too many symbolic links")
            target = os.readlink(here)
            links.append((here, target))
            real = "/" if target.startswith("/") else real
            todo += [part for part in reversed(target.split("/")) if part]
    return Route(real, tuple(links))


@dataclass
class _Plan:
    """Collects the steps; a path is covered when the guest can't see this machine's there."""

    steps: list[Step] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)

    def is_covered(self, path: str) -> bool:
        while path != "/":
            if path in self.shown:
                return False
            if path in self.covered:
                return True
            path = os.path.dirname(path)
        return False

    def lead_to(self, path: str) -> None:
        """Make all folders above a path passable."""
        for above in _above(path):
            if above in self.shown or self.is_covered(above) or _has_mode(above, 0o001):
                continue
            if any(_is_below(above, shown) for shown in self.shown):
                self.open(above)  # inside something that must stay whole
            else:
                self.steps.append(Step("tmpfs", above))
                self.covered.add(above)

    def show(self, folder: str) -> None:
        """Make a folder and what is in it reachable."""
        self.lead_to(folder)
        if folder in self.shown:
            return
        if not _has_mode(folder, 0o005):
            self.open(folder)
        elif self.is_covered(folder):
            self.steps.append(Step("bind", folder, folder))
        self.shown.add(folder)

    def open(self, folder: str) -> None:
        """Replace a folder by one that all may enter, with the same things in it."""
        self.steps.append(Step("tmpfs", folder))
        for child in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if child.is_symlink():
                self.steps.append(Step("link", child.path, os.readlink(child.path)))
            elif child.is_dir() or child.is_file():
                self.steps.append(Step("bind", child.path, child.path))
        self.shown.add(folder)

    def link(self, path: str, target: str) -> None:
        """Make a symbolic link reachable."""
        self.lead_to(path)
        step = Step("link", path, target)
        if self.is_covered(path) and step not in self.steps:
            self.steps.append(step)


def _above(path: str) -> list[str]:
    parents = [str(parent) for parent in Path(path).parents]
    return parents[-2::-1]  # from the top down, without "/"


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _has_mode(path: str, bits: int) -> bool:
    return stat.S_IMODE(os.stat(path).st_mode) & bits == bits


def plan(folders: Iterable[str], modules: str, release: str, lib: str = "/lib") -> list[Step]:
    """Return the mounts to make on this machine (in a namespace of their own).

    ``folders`` must be reachable by all; ``modules`` is shown as ``lib``/modules/RELEASE.
    """
    made = _Plan()
    routes = [route(folder) for folder in folders]
    for real in sorted({way.real for way in routes}):
        made.show(real)
    for way in routes:
        for path, target in way.links:
            made.link(path, target)
    place = f"{route(lib).real}/modules"
    if os.path.isdir(place):
        made.steps.append(Step("tmpfs", place))
    else:
        # Nothing to mount on, and nothing may be made on this machine.
        made.open(os.path.dirname(place))
    made.steps.append(Step("bind", f"{place}/{release}", modules))
    return made.steps


def hidden(folders: Iterable[str]) -> list[str]:
    """Return those (real) folders that the guest's own tmpfs mounts would hide, topmost only."""
    below = sorted(
        {
            way.real
            for way in map(route, folders)
            if any(_is_below(way.real, place) for place in HIDDEN)
        }
    )
    return [path for path in below if not any(_is_below(path, other) for other in below)]


def inside(folders: Iterable[str]) -> list[Step]:
    """Return the steps by which a guest with a root of its own shows these folders in it.

    The system's own folders are left out (the interpreter may be /usr/bin's): they are the guest's.
    """
    routes = [route(folder) for folder in folders]
    real = sorted({way.real for way in routes if not _is_system(way.real)})
    top = [path for path in real if not any(_is_below(path, other) for other in real)]
    links = {link: None for way in routes for link in way.links}
    return [
        *(Step("bind", path, path) for path in top),
        *(Step("link", path, target) for path, target in links if not _is_system(path)),
    ]


def check_python(project: Path, root: Path) -> None:
    """Make sure that the project's interpreter, where it is the system's, is in this root too."""
    python = os.path.realpath(project / ".venv" / "bin" / "python")
    if _is_system(python) and not os.path.exists(f"{root}{python}"):
        raise VmError(
            f"the virtual environment's Python is this machine's {python}, which the guest's "
            f"Debian does not have; make {project / '.venv'} with one that lies outside of /usr"
        )


def _is_system(path: str) -> bool:
    first, second = [*path.split("/")[1:], ""][:2]
    return first in _SYSTEM and not (first == "usr" and second in _NOT_SYSTEM)


def needed_folders(project: Path) -> list[str]:
    """Return the folders that running the project's Python takes."""
    return [str(project), *_python_folders(project / ".venv" / "bin" / "python")]


def _python_folders(python: Path) -> Iterator[str]:
    if not os.path.lexists(python):
        return
    yield str(python.parent)
    link = str(python)
    # A virtual environment's python is a chain of links, and each must be passable.
    for _ in range(40):
        if not os.path.islink(link):
            break
        link = os.path.join(os.path.dirname(link), os.readlink(link))
        yield os.path.dirname(link)
    done = subprocess.run(
        [str(python), "-Ic", "import sys; print(sys.base_prefix)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise VmError(f"{python} does not run:\n{done.stderr.rstrip()}")
    yield done.stdout.rstrip("\n")
