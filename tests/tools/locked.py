"""A virtual environment with what a lock file names and nothing else, for tools that look at one.

Only the packages' metadata is in it, linked from the environment that this runs in: that takes no
network, and a moment. ``python -m tests.tools.locked FOLDER LOCK [--without LOCK]``.
"""

from __future__ import annotations

import argparse
import re
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?P<rest>(?:.*\\\n)*.*)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


class Pin(NamedTuple):
    """A package as a lock file has it; ``hashes``: of each file that may be installed for it."""

    version: str
    hashes: list[str]


def pins(lock: Path) -> dict[str, Pin]:
    """What a lock file (pip-compile's, with hashes) names."""
    found = _PIN.finditer(lock.read_text(encoding="utf-8"))
    return {each["name"]: Pin(each["version"], _HASH.findall(each["rest"])) for each in found}


def environment(folder: Path, packages: dict[str, Pin]) -> None:
    """Make the environment, in place of what is there.

    Raises ValueError for a package that is not installed as it is locked.
    """
    venv.create(folder, clear=True, symlinks=True)
    there = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for name, pin in packages.items():
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise ValueError(f"{name} is locked and not installed: make setup") from None
        if found.version != pin.version:
            raise ValueError(f"{name} is {found.version}, and locked {pin.version}: make setup")
        told = next(each for each in found.files or [] if each.match("*.dist-info/METADATA"))
        info = Path(str(told.locate())).parent
        (there / info.name).symlink_to(info)


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--without", type=Path, help="leave out what this lock file names, too")
    given = parser.parse_args()
    wanted = pins(given.lock)
    for name in pins(given.without) if given.without else {}:
        wanted.pop(name, None)
    try:
        environment(given.folder, wanted)
    except ValueError as error:
        sys.exit(f"{given.lock}: {error}")


if __name__ == "__main__":
    main()
