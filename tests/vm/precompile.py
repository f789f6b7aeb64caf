"""Compiles Python files before a boot: the guest can't write, and compiling there is slow."""

import hashlib
import os
import subprocess
from pathlib import Path

from tests.vm.kernels import locked


def precompile(project: Path, cache: Path) -> None:
    """Compile the project's files, and its packages' when these changed since the last time."""
    python = project / ".venv" / "bin" / "python"
    if not python.exists():
        return
    own = [project / name for name in ("kpmd", "tests")]
    _compile(python, [folder for folder in own if folder.is_dir()])
    packages = sorted((project / ".venv").glob("lib/python3*/site-packages"))
    key = hashlib.sha256(os.fsencode(project)).hexdigest()[:16]
    stamp = cache / "compiled" / key
    with locked(cache / "compiled" / f"{key}.lock"):
        state = _state(packages)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == state:
            return
        _compile(python, packages)
        stamp.write_text(_state(packages), encoding="utf-8")


def _compile(python: Path, folders: list[Path]) -> None:
    # Files that don't compile (a package's templates, work in progress) are the command's affair.
    subprocess.run(
        [str(python), "-m", "compileall", "-q", "-j", "0", *map(str, folders)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def _state(packages: list[Path]) -> str:
    """Describe what is installed: every installation adds or changes an entry of a folder."""
    lines = []
    for folder in packages:
        lines.append(f"{folder} {folder.stat().st_mtime_ns}")
        lines += [
            f"{entry.name} {entry.stat().st_mtime_ns}"
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            if entry.name.endswith(".dist-info")
        ]
    return "\n".join(lines)
