"""An audit trail to look at."""

from __future__ import annotations

from kpmd.runtime.audit import Audit, Record


class Recorded(Audit):
    """Keeps what is put on record."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []

    def record(self, record: Record) -> None:
        self.records.append(record)
