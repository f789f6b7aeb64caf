"""``python -m tests.packages.later OLD.deb NEW.deb``: the same package in a later version.

Prints the version. To upgrade to; the daemon in it tells the later version as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kpmd import __version__

LATER = f"{__version__}+later"


def main() -> None:
    """Unpack, count up the version, and pack."""
    old, new = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        run("dpkg-deb", "--raw-extract", old, folder)
        change(Path(folder, "DEBIAN/control"), r"(?m)^Version: .*$", f"Version: {LATER}")
        own = Path(folder, "usr/lib/kpmd/kpmd/__init__.py")
        change(own, r"(?m)^__version__ = .*$", f'__version__ = "{LATER}"')
        # Hardly packed: for once, and in a slow machine.
        run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", folder, new)
    print(LATER)


def change(path: Path, pattern: str, text: str) -> None:
    """Replace what the pattern fits, in a file in which it does so once."""
    changed, times = re.subn(pattern, text, path.read_text(encoding="utf-8"))
    assert times == 1, path
    path.write_text(changed, encoding="utf-8")


def run(*command: str) -> None:
    """Run a program that must succeed."""
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
