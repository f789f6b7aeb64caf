"""Compiles Python files before a boot: the guest can't write, and compiling there is slow."""

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.vm.kernels import locked

#: Tests that run in guests. pytest compiles them in a way of its own, and keeps that.
_TESTS = ("tests/kernel", "tests/systemd")


def precompile(project: Path, cache: Path) -> None:
    """Compile the project's files, and its packages' when these changed since the last time."""
    python = project / ".venv" / "bin" / "python"
    if not python.exists():
        return
    own = [project / name for name in ("kpmd", "tests")]
    _compile(python, [folder for folder in own if folder.is_dir()])
    _rewrite(python, project)
    packages = sorted((project / ".venv").glob("lib/python3*/site-packages"))
    key = hashlib.sha256(os.fsencode(project)).hexdigest()[:16]
    stamp = cache / "compiled" / key
    with locked(cache / "compiled" / f"{key}.lock"):
        state = _state(packages)
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == state:
            return
        _compile(python, packages)
        stamp.write_text(_state(packages), encoding="utf-8")


def _rewrite(python: Path, project: Path) -> None:
    """Let pytest collect the tests, if one of them was changed since it last did."""
    folders = [project / name for name in _TESTS]
    if all(map(_is_rewritten, (path for folder in folders for path in folder.glob("test_*.py")))):
        return
    # Not the folders' own plugins: they end the run outside of a guest.
    command = [str(python), "-m", "pytest", "--collect-only", "--noconftest", *map(str, folders)]
    _quietly(command, cwd=project, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})


def _is_rewritten(source: Path) -> bool:
    kept = source.parent.glob(f"__pycache__/{source.stem}.*-pytest-*.pyc")
    return any(path.stat().st_mtime_ns > source.stat().st_mtime_ns for path in kept)


def _compile(python: Path, folders: list[Path]) -> None:
    _quietly([str(python), "-m", "compileall", "-q", "-j", "0", *map(str, folders)])


def _quietly(command: list[str], **options: Any) -> None:
    # Files that don't compile (a package's templates, work in progress) are the command's affair.
    subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, **options
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
