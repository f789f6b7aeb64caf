"""The audit trail: a record of each request that changes something or is refused, and of more.

It stops nothing: where records cannot be written, requests go on, and the loss is counted and told,
in the log, in GET /healthz, and at the destination itself once it works again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kpmd.log import Log
from kpmd.runtime import journald
from kpmd.runtime.audit_record import Entry, Record, bounded
from kpmd.runtime.audit_writer import Destination, Lines, ToJournal, Writer

__all__ = ["Audit", "Record", "destinations"]

log = Log("kpmd.audit")

#: Seconds that ``Audit.close`` waits for what is not written yet.
PATIENCE = 5.0


def destinations(
    file: Path | None, journal: bool | None, environ: Mapping[str, str]
) -> list[Destination]:
    """Where records go: the journal, else standard error; and ``file`` if there is one.

    ``journal``: whether it is used; None: if standard error goes there.
    """
    if journal is None:
        journal = journald.is_standard_error(environ)
    made: list[Destination] = [ToJournal(journald.Journald()) if journal else Lines(None)]
    if file is not None:
        made.append(Lines(file))
    return made


class Audit:
    """Takes records on the event loop; each destination writes them in a thread of its own.

    It takes the destinations over. Without any it does nothing.
    """

    def __init__(
        self, *where: Destination, now: Callable[[], float] = time.time, patience: float = PATIENCE
    ) -> None:
        self._now = now
        self._patience = patience
        self._writers = [Writer(each, self._note) for each in where]

    @property
    def lost(self) -> int:
        """How many records could not be written; one at two destinations counts twice."""
        return sum(writer.lost for writer in self._writers)

    @property
    def failing(self) -> str | None:
        """The destination that records cannot be written to now, and why; None: all is well."""
        return next((writer.failing for writer in self._writers if writer.failing), None)

    def record(self, record: Record) -> None:
        """Put on record. Never raises, never waits."""
        if not self._writers:
            return
        try:
            entry = bounded(record, self._now())
        except Exception as error:
            log.error("bug", error, request=record.request)
            return
        for writer in self._writers:
            writer.put(entry, refused=record.refused)

    def reopen(self) -> None:
        """Write to the file that has the configured name now: logrotate has moved the other."""
        for writer in self._writers:
            writer.reopen()

    async def close(self) -> None:
        """Write what is left, for at most ``patience`` seconds, and let the destinations go."""
        deadline = time.monotonic() + self._patience
        await asyncio.gather(
            *(asyncio.to_thread(writer.close, deadline) for writer in self._writers)
        )

    def _note(self, count: int) -> Entry:
        detail = f"audit: {count} records lost"
        return bounded(
            Record(audit="lost", outcome="lost", detail=detail, what={"records": count}),
            self._now(),
        )
