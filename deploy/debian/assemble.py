"""``python deploy/debian/assemble.py FOLDER``: what the Debian package is built of.

Makes FOLDER anew, a source tree for ``dpkg-buildpackage``: kpmd and the Python packages that the
lock file names, once for each of Debian's Pythons and merged into one tree; manual pages,
completions, units, and ``debian/``. Only this downloads anything.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import licences

from kpmd import __version__

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]

#: With OpenTelemetry, which is optional: there is no network to install it from later.
LOCK = PROJECT / "requirements-tracing.txt"
#: Those of Debian 12 and 13.
PYTHONS = ("3.11", "3.13")
#: As pip knows what runs with glibc 2.36, Debian 12's.
PLATFORMS = tuple(f"manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014", "2010", "1"))
#: How pip installed a wheel, and which: different for each Python, and of no use to Debian's.
_PIPS = ("RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json")
#: What only compilers and type checkers read.
_SOURCES = (".c", ".h", ".pxd", ".pxi", ".pyi", ".pyx", ".typed")


def main() -> None:
    """Make the folder."""
    if (newest := changelog("Version")) != __version__:
        raise ValueError(f"{HERE}/changelog begins with {newest}, and kpmd is {__version__}")
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        trees = [installed(python, Path(scratch, python)) for python in PYTHONS]
        bundled = target / "python"
        notices = licences.paragraphs(trees[0])
        merge(trees, bundled)
    # With the sources of its BPF programs, as their licence wants.
    ignored = shutil.ignore_patterns("__pycache__", "py.typed")
    shutil.copytree(PROJECT / "kpmd", bundled / "kpmd", ignore=ignored)
    (target / "deploy").mkdir()
    for name in ("kpmd.toml", "policy.toml"):
        shutil.copy(PROJECT / "deploy" / name, target / "deploy" / name)
    run("-m", "tests.tools.man", str(target / "man"))
    completions(target / "completions")
    packaging(target / "debian", notices)


def installed(python: str, tree: Path) -> Path:
    """The locked wheels for a Python, in a folder; each is checked against the lock file."""
    wheels = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    wheels += [f"--platform={platform}" for platform in PLATFORMS]
    run(
        *("-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--require-hashes"),
        *(*wheels, f"--target={tree}", f"--requirement={LOCK}"),
    )
    return tree


def merge(trees: list[Path], target: Path) -> None:
    """Copy the trees into one. Raises ValueError where two disagree about a file."""
    seen: set[Path] = set()
    for tree in trees:
        for path in sorted(files(tree)):
            place = target / path.relative_to(tree)
            if place in seen and not filecmp.cmp(path, place, shallow=False):
                raise ValueError(f"{path.relative_to(tree)} is not the same for {PYTHONS}")
            seen.add(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)  # some are executable, for no reason


def files(tree: Path) -> Iterator[Path]:
    """All files below a folder that are of use in the package."""
    for path in tree.rglob("*"):
        # pip's scripts; and lists of what wheels have compiled in, with their dates and random ids.
        left_out = path.parent.name == "sboms" or path.parent == tree / "bin"
        if path.is_file() and not (left_out or path.name in _PIPS or path.suffix in _SOURCES):
            yield path


def completions(folder: Path) -> None:
    """What each shell reads, by the name that it looks for."""
    folder.mkdir()
    for shell, name in (("bash", "kpmctl"), ("zsh", "_kpmctl"), ("fish", "kpmctl.fish")):
        (folder / name).write_text(run("-m", "kpmd.kpmctl", "completion", shell), encoding="utf-8")


def packaging(debian: Path, notices: str) -> None:
    """The folder ``debian``: what lies beside this file, the units, and the licences."""
    debian.mkdir()
    for path in HERE.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            shutil.copytree(path, debian / path.name)
        elif path.is_file() and path.suffix != ".py":
            shutil.copy(path, debian / path.name)
    # By debhelper's names. Not kpmd.tmpfiles: it makes /etc/kpmd/policy.toml, here a conffile.
    for unit in ("kpmd.service", "kpmd.socket", "kpmd.sysusers"):
        shutil.copy(PROJECT / "systemd" / unit, debian / unit)
    with (debian / "copyright").open("a", encoding="utf-8") as file:
        file.write(notices)


def run(*arguments: str) -> str:
    """Run this Python in the project; what it printed."""
    # The date on manual pages is the changelog's, and so is the same for each build.
    date = f"SOURCE_DATE_EPOCH={changelog('Timestamp')}"
    return output("env", date, sys.executable, *arguments)


def changelog(field: str) -> str:
    """What the newest entry of the package's changelog says."""
    return output("dpkg-parsechangelog", f"-l{HERE}/changelog", f"-S{field}").strip()


def output(*command: str) -> str:
    """Run a program that must succeed, in the project; what it printed."""
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
