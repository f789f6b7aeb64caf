"""Counting calls with the builtin ``count``: attach, sample, and what changed between samples."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpmd.client.errors import ProtocolError
from kpmd.kpmctl.tracing import Tracing, total, u64

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.client.client import Client
    from kpmd.kpmctl.filters import Wanted

#: Functions that the map of a count by globs has room for at first.
_ROOM = 4096

#: What a count by process has room for: functions times processes.
_PROCESSES = 16384

#: struct process of the builtin: function, pid, uid, command.
_PROCESS = struct.Struct("=QII16s")

#: What is counted apart: a function's address or, by process, also pid, uid and command.
Key = tuple[int, int | None, int | None, str | None]


@dataclass(frozen=True)
class Sample:
    """What was counted until one moment."""

    elapsed: float
    calls: dict[Key, int]
    dropped: int


@dataclass(frozen=True)
class Row:
    """A function that was called; ``rate`` is in calls per second.

    Where it is counted by process, by threads of this name, in a process, of a user.
    """

    calls: int
    rate: float
    name: str
    module: str | None
    address: int
    pid: int | None = None
    uid: int | None = None
    command: str | None = None


@dataclass(frozen=True)
class Report:
    """A sample, made readable: the most called functions first. Times are in seconds.

    ``missed`` are calls that the kernel could not run the program for (None: it does not tell),
    ``dropped`` those that the program had no room for.
    """

    attached: int
    attach_seconds: float
    elapsed: float
    missed: int | None
    dropped: int
    rows: list[Row] = field(default_factory=list)


class Counter:
    """The builtin ``count``, attached to functions for as long as this process lives.

    ``start``, then ``report`` at any time; ``end`` ends the counting, ``close`` everything.
    """

    def __init__(self, client: Client) -> None:
        self.tracing = Tracing(client, "count")
        self._by_process = False
        self._samples: list[Sample] = []

    def start(self, wanted: Wanted, kind: answers.Kind, by_process: bool = False) -> None:
        """Load and attach; ``by_process`` counts each process's calls apart. Raises ClientError."""
        self._by_process = by_process
        if by_process:
            sizes = {"counts": 1, "counts_by_process": _PROCESSES}
            self.tracing.start(wanted, kind, {"by_process": 1}, sizes)
        else:
            self.tracing.start(wanted, kind, room=("counts", _ROOM))
        self._samples = [Sample(0.0, {}, 0)]

    def report(self, interval: float) -> Report:
        """Sample now. Rates are over the time since the sample before.

        Where that is less than half an ``interval`` ago the one before it is taken. Raises
        ClientError.
        """
        now, missed = self._sample(), self.tracing.missed()
        base = self._samples[-1]
        if len(self._samples) > 1 and now.elapsed - base.elapsed < interval / 2:
            base = self._samples[-2]
        self._samples = [base, now]
        return Report(
            self.tracing.attached,
            self.tracing.attach_seconds,
            now.elapsed,
            missed,
            now.dropped,
            self._rows(base, now),
        )

    def end(self) -> None:
        """Detach; what was counted can still be reported. Raises ClientError."""
        self.tracing.end()

    def close(self) -> None:
        """Give everything back; what cannot be given back now ends with this process."""
        self.tracing.close()

    def _sample(self) -> Sample:
        counts = self.tracing.map("counts_by_process" if self._by_process else "counts")
        calls = {
            self._key(entry["key"]): total(entry["value"])
            for entry in self.tracing.client.entries(counts)
        }
        dropped = self.tracing.lost().get("dropped", 0)
        return Sample(time.monotonic() - self.tracing.began, calls, dropped)

    def _key(self, text: str) -> Key:
        if not self._by_process:
            return u64(text), None, None, None
        try:
            address, pid, uid, command = _PROCESS.unpack(bytes.fromhex(text))
        except (ValueError, struct.error):
            raise ProtocolError("the daemon's answer has a key that is no process") from None
        return address, pid, uid, command.partition(b"\0")[0].decode(errors="backslashreplace")

    def _rows(self, base: Sample, now: Sample) -> list[Row]:
        seconds = max(now.elapsed - base.elapsed, 1e-9)
        rows = []
        for key, calls in now.calls.items():
            address, pid, uid, command = key
            name, module = self.tracing.name(address)
            rate = (calls - base.calls.get(key, 0)) / seconds
            rows.append(Row(calls, rate, name, module, address, pid, uid, command))
        rows.sort(key=lambda row: (-row.calls, row.name, row.address, row.pid or 0))
        return rows
