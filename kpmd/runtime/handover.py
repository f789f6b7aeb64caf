"""Root's files for a daemon that is not root: opened before it starts, and handed over open.

``kpmd --hand-over-tracefs`` runs as root before the daemon does (``ExecStartPre=!`` in
kpmd.service) and leaves the files in the service manager's FD store, with whose content the daemon
is started. From systemd 253 on, ``OpenFile=`` would do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from kpmd.bpf import tracefs
from kpmd.log import Log
from kpmd.runtime.notify import Notifier

log = Log("kpmd.handover")

#: Before the names of files in the FD store: tells them from what is kept there over restarts.
_PREFIX = "file-"

#: How many places in the FD store must be left for them: one of each may be on its way.
PLACES = len(tracefs.PATHS)

Passed = list[tuple[str, int]]


def hand_over(notifier: Notifier) -> int:
    """Store all that can be opened; returns the exit status. What cannot be is said in the log."""
    if not notifier:
        log.error("nobody to hand over to", reason="this is for ExecStartPre= in kpmd.service")
        return 1
    for name in tracefs.PATHS:
        try:
            with tracefs.open_first(name) as file:
                notifier.send(
                    "FDSTORE=1", f"FDNAME={_PREFIX}{name}", "FDPOLL=0", fds=[file.fileno()]
                )
        except OSError as error:
            log.info("not handed over", file=error.filename or name, reason=error.strerror)
    try:
        # The manager must have taken them before it starts the daemon.
        notifier.barrier()
    except OSError as error:
        log.error("cannot hand over", reason=str(error))
        return 1
    return 0


def split(passed: Iterable[tuple[str, int]]) -> tuple[Passed, Passed]:
    """Of what the manager passed, the files that were handed over, and the rest."""
    files: Passed = []
    rest: Passed = []
    for name, fd in passed:
        (files if name.startswith(_PREFIX) else rest).append((name, fd))
    return files, rest


def take(files: Passed, notifier: Notifier) -> tracefs.Files:
    """The files that were handed over; they are taken out of the FD store, for this start only.

    Takes the FDs over. One of a name is kept, for as long as this process lives: an earlier start
    that failed may have left its own.
    """
    opened = {name.removeprefix(_PREFIX): fd for name, fd in files}
    for name, fd in files:
        if fd != opened[name.removeprefix(_PREFIX)]:
            os.close(fd)
    for name in sorted({name for name, _ in files}):
        try:
            notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}")
        except OSError as error:
            log.warning("a file stays in the FD store", name=name, error=str(error))
    made = tracefs.Files(opened)
    if not made.lists_functions():
        log.warning(
            "cannot tell which functions can be traced",
            reason="tracefs's available_filter_functions cannot be read: mount tracefs at"
            " /sys/kernel/tracing, and start kpmd by its unit, or as root",
        )
    return made
