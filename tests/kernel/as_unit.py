"""``python -m tests.kernel.as_unit USER COMMAND…``: starts the daemon as kpmd.service does.

As a user without privileges, with the unit's capabilities, and with root's files open. Replaces
this process, so that its number stays.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from kpmd.bpf import tracefs

UNIT = Path(__file__).parents[2] / "systemd" / "kpmd.service"

#: SD_LISTEN_FDS_START (sd_listen_fds(3)).
_FIRST_PASSED = 3


def capabilities() -> list[str]:
    """Those that the unit gives, as setpriv(1) names them."""
    (line,) = re.findall(r"^AmbientCapabilities=(.*)$", UNIT.read_text(), re.MULTILINE)
    return [name.removeprefix("CAP_").lower() for name in line.split()]


def main() -> None:
    """Open the files, become the user, and run the command."""
    user, *command = sys.argv[1:]
    opened: dict[str, int] = {}
    for name in tracefs.PATHS:
        try:
            with tracefs.open_first(name) as file:
                opened[f"file-{name}"] = os.dup(file.fileno())
        except OSError:
            continue  # not every kernel has all of them
    for place, fd in enumerate(sorted(opened.values()), _FIRST_PASSED):
        os.dup2(fd, place)
        os.set_inheritable(place, True)
    names = sorted(opened, key=lambda name: opened[name])
    kept = ",".join(f"+{name}" for name in capabilities())
    privileges = [
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
        "--no-new-privs",
        f"--inh-caps=-all,{kept}",
        f"--ambient-caps=-all,{kept}",
        f"--bounding-set=-all,{kept}",
    ]
    environ = {
        **os.environ,
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(names)),
        "LISTEN_FDNAMES": ":".join(names),
    }
    os.execvpe("setpriv", [*privileges, *command], environ)  # noqa: S606 - it becomes the daemon


if __name__ == "__main__":
    main()
