"""What the service manager is about to do with us: stop, or start again."""

from __future__ import annotations

import subprocess
from pathlib import Path

from kpmd.log import Log

log = Log("kpmd.manager")

#: systemctl's answer takes milliseconds; a manager that is stuck must not keep us from stopping.
_PATIENCE = 10.0


def own_unit(cgroup: Path = Path("/proc/self/cgroup")) -> str | None:
    """The name of the service that this process belongs to; None where it is in none."""
    try:
        text = cgroup.read_text(encoding="utf-8")
    except OSError:
        return None
    for line in text.splitlines():
        _, _, path = line.split(":", 2)
        for part in reversed(path.split("/")):
            if part.endswith(".service"):
                return part
    return None


def is_being_stopped() -> bool:
    """Whether systemd stops this service for good, and does not restart it.

    SIGTERM is the same for both, and nothing else tells (systemd 252 to 257): so the job is looked
    at. False when that cannot be told: what is left in the FD store is closed by systemd itself
    when it really stops the service.
    """
    unit = own_unit()
    if unit is None:
        return False
    try:
        jobs = subprocess.run(
            ["systemctl", "--no-legend", "--no-pager", "list-jobs", unit],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("cannot tell a stop from a restart", error=str(error))
        return False
    # "JOB UNIT TYPE STATE"
    return any(line.split()[1:3] == [unit, "stop"] for line in jobs.splitlines())
