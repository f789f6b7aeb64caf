"""Counting calls with the builtin ``count``: attach, sample, and what changed between samples."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kpmd.client.errors import ApiError, ClientError, ProtocolError
from kpmd.client.parameters import is_glob

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.client.client import Client


#: Functions that the map of a count by globs has room for at first.
_ROOM = 4096


@dataclass(frozen=True)
class Sample:
    """What was counted until one moment; ``calls`` by the function's address."""

    elapsed: float
    calls: dict[int, int]
    dropped: int


@dataclass(frozen=True)
class Row:
    """A function that was called; ``rate`` is in calls per second."""

    calls: int
    rate: float
    name: str
    module: str | None
    address: int


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
        self._client = client
        self._loaded: answers.Loaded | None = None
        self._link: str | None = None
        self._names: dict[int, tuple[str, str | None]] | None = None
        self._attached = 0
        self._missed: int | None = None
        self._attach_seconds = 0.0
        self._began = 0.0
        self._samples: list[Sample] = []

    def start(
        self,
        functions: Sequence[str],
        pid: int | None,
        kind: answers.Kind,
        exclude: Sequence[str] = (),
    ) -> None:
        """Load and attach; ``pid`` is the only process to count for. Raises ClientError.

        ``functions`` are names, or, where one of them has a wildcard, globs.
        """
        globs = exclude or any(is_glob(each) for each in functions)
        room = _ROOM if globs else len(functions)
        self._start(functions, pid, kind, exclude if globs else None, room)
        if globs and self._attached > room:
            # More functions than a first guess had room for: once more, with as much as it takes.
            room = self._attached
            self.close()
            self._start(functions, pid, kind, exclude, room)

    def _start(
        self,
        functions: Sequence[str],
        pid: int | None,
        kind: answers.Kind,
        exclude: Sequence[str] | None,
        room: int,
    ) -> None:
        self._loaded = self._client.load_builtin(
            "count",
            globals={} if pid is None else {"target_pid": pid},
            max_entries={"counts": room},
        )
        programs = self._loaded["programs"]
        program = next((each for each in programs if each["name"] == "count"), None)
        if program is None:
            raise ProtocolError("the daemon's builtin count has no program of that name")
        before = time.monotonic()
        if exclude is None:
            link = self._client.attach(program["id"], kind, symbols=functions)
        else:
            link = self._client.attach(program["id"], kind, patterns=functions, exclude=exclude)
        self._began = time.monotonic()
        self._attach_seconds = self._began - before
        self._link, self._attached, self._missed = link["id"], link["count"], link["missed"]
        self._samples = [Sample(0.0, {}, 0)]

    def report(self, interval: float) -> Report:
        """Sample now. Rates are over the time since the sample before.

        Where that is less than half an ``interval`` ago the one before it is taken. Raises
        ClientError.
        """
        now = self._sample()
        base = self._samples[-1]
        if len(self._samples) > 1 and now.elapsed - base.elapsed < interval / 2:
            base = self._samples[-2]
        self._samples = [base, now]
        return Report(
            self._attached,
            self._attach_seconds,
            now.elapsed,
            self._missed,
            now.dropped,
            self._rows(base, now),
        )

    def end(self) -> None:
        """Detach; what was counted can still be reported. Raises ClientError."""
        if self._link is not None:
            self._fetch_names()
            self._missed = self._client.link(self._link)["missed"]
            self._detach()

    def close(self) -> None:
        """Give everything back; what cannot be given back now ends with this process."""
        with contextlib.suppress(ClientError):
            self._detach()
        loaded, self._loaded = self._loaded, None
        for program in loaded["programs"] if loaded else ():
            with contextlib.suppress(ClientError):
                self._client.delete_program(program["id"], force=True)

    def _detach(self) -> None:
        if self._link is not None:
            link, self._link = self._link, None
            self._client.detach(link)

    def _map(self, name: str) -> str | None:
        maps = self._loaded["maps"] if self._loaded else []
        return next((each["id"] for each in maps if each["name"].endswith(name)), None)

    def _sample(self) -> Sample:
        counts = self._map("counts")
        if counts is None:
            raise ProtocolError("the daemon's builtin count has no map counts")
        calls = {
            _u64(entry["key"]): _total(entry["value"]) for entry in self._client.entries(counts)
        }
        dropped, variables = 0, self._map(".bss")
        if variables is not None:
            dropped = sum(_total(entry["value"]) for entry in self._client.entries(variables))
        if self._link is not None:
            self._missed = self._client.link(self._link)["missed"]
        return Sample(time.monotonic() - self._began, calls, dropped)

    def _rows(self, base: Sample, now: Sample) -> list[Row]:
        seconds = max(now.elapsed - base.elapsed, 1e-9)
        if now.calls:
            self._fetch_names()
        names = self._names or {}
        rows = []
        for address, calls in now.calls.items():
            name, module = names.get(address, (f"0x{address:016x}", None))
            rate = (calls - base.calls.get(address, 0)) / seconds
            rows.append(Row(calls, rate, name, module, address))
        rows.sort(key=lambda row: (-row.calls, row.name, row.address))
        return rows

    def _fetch_names(self) -> None:
        """Names by address: many pages of them perhaps, so not before they are wanted."""
        if self._names is None and self._link is not None:
            self._names = {
                int(target["address"], 16): (target["symbol"], target["module"])
                for target in self._client.targets(self._link)
                if target["address"] is not None and target["symbol"] is not None
            }


def explain_loss(error: ClientError) -> ClientError:
    """What ``not-found`` means of something that was there a moment ago."""
    if isinstance(error, ApiError) and error.kind == "not-found":
        return ApiError(
            error.kind,
            error.status,
            "the daemon no longer knows what was being counted: it was restarted, or somebody "
            "deleted the program",
            error.problem,
        )
    return error


def _u64(text: str) -> int:
    """The first 8 bytes, which this machine's kernel wrote in this machine's order."""
    try:
        return int.from_bytes(bytes.fromhex(text)[:8], sys.byteorder)
    except (TypeError, ValueError):
        raise ProtocolError("the daemon's answer has an entry that is not in hex") from None


def _total(value: str | list[str]) -> int:
    return _u64(value) if isinstance(value, str) else sum(_u64(each) for each in value)
