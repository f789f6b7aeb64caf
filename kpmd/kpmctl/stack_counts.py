"""Who calls functions, by the builtin ``stacks``."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kpmd.client.errors import ProtocolError
from kpmd.kpmctl.output import clean
from kpmd.kpmctl.tracing import Tracing, total

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.client.client import Client
    from kpmd.kpmctl.filters import Wanted

#: struct caller of the builtin: function, stack, pid, command.
_CALLER = struct.Struct("=QiI16s")

#: What stands for the callers where a stack was not kept.
UNKNOWN = "[stack not kept]"


@dataclass(frozen=True)
class Frame:
    """A place in the kernel's code; ``symbol`` None where the caller may not see symbols."""

    address: int
    symbol: str | None
    offset: int | None = None
    module: str | None = None

    @property
    def name(self) -> str:
        """The function that it is in, or the address."""
        return self.symbol or f"0x{self.address:016x}"


@dataclass(frozen=True)
class Stack:
    """Calls of a function that came the same way; the function itself is the first of ``frames``.

    ``frames`` None: they were not kept. ``process`` None: calls of all processes.
    """

    calls: int
    function: Frame
    frames: tuple[Frame, ...] | None
    process: tuple[int, str] | None

    @property
    def names(self) -> list[str]:
        """The frames' names, the innermost first."""
        if self.frames is None:
            return [self.function.name, UNKNOWN]
        return [each.name for each in self.frames]

    @property
    def caller(self) -> str | None:
        """The process, by command and id."""
        return f"{self.process[1]}[{self.process[0]}]" if self.process else None


@dataclass(frozen=True)
class StackReport:
    """What there was: the stacks of most calls first; the rest as in a ``LatencyReport``."""

    attached: int
    attach_seconds: float
    elapsed: float
    missed: int | None
    lost: Mapping[str, int]
    stacks: list[Stack] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """All of them."""
        return sum(each.calls for each in self.stacks)


class Stacks:
    """The builtin ``stacks``, attached for as long as this process lives.

    ``start``, ``end``, and ``report`` what there was; ``close`` gives everything back.
    """

    def __init__(self, client: Client) -> None:
        self.tracing = Tracing(client, "stacks")
        self._by_process = False
        self._elapsed = 0.0

    def start(self, wanted: Wanted, kind: answers.Kind, by_process: bool) -> None:
        """Load and attach. Raises ClientError."""
        self._by_process = by_process
        self.tracing.start(wanted, kind, {"by_process": int(by_process)})

    def end(self) -> None:
        """Detach. Raises ClientError."""
        self.tracing.end()
        self._elapsed = time.monotonic() - self.tracing.began

    def report(self) -> StackReport:
        """What there was until ``end``. Raises ClientError."""
        tracing = self.tracing
        counted = list(tracing.client.entries(tracing.map("stacks")))
        listed = tracing.client.entries(tracing.map("traces")) if counted else ()
        traces = {_number(each["key"]): _frames(each) for each in listed}
        stacks = [self._stack(each, traces) for each in counted]
        stacks.sort(key=lambda each: (-each.calls, each.names, each.process or ()))
        return StackReport(
            tracing.attached,
            tracing.attach_seconds,
            self._elapsed,
            tracing.missed(),
            tracing.lost(),
            stacks,
        )

    def close(self) -> None:
        """Give everything back."""
        self.tracing.close()

    def _stack(self, entry: answers.Entry, traces: Mapping[int, tuple[Frame, ...]]) -> Stack:
        try:
            address, id_, pid, command = _CALLER.unpack(bytes.fromhex(entry["key"]))
        except (ValueError, struct.error):
            raise ProtocolError("the daemon's answer has a key that is no caller") from None
        symbol, module = self.tracing.names().get(address, (None, None))
        text = command.partition(b"\0")[0].decode(errors="backslashreplace")
        return Stack(
            total(entry["value"]),
            Frame(address, symbol, 0, module),
            traces.get(id_),
            (pid, text) if self._by_process else None,
        )


def merged(stacks: Iterable[Stack]) -> list[Stack]:
    """Those together that differ in nothing but from where in a function the next was called."""
    found: dict[tuple[object, ...], Stack] = {}
    for each in stacks:
        key = (*each.names, each.process)
        known = found.get(key)
        found[key] = each if known is None else replace(known, calls=known.calls + each.calls)
    return sorted(found.values(), key=lambda each: -each.calls)


def folded(stacks: Iterable[Stack]) -> list[str]:
    """A line for each stack, the outermost frame first, as flame graph tools take them."""
    sums: dict[str, int] = {}
    for each in stacks:
        line = ";".join(clean(name).replace(";", ":") for name in path(each))
        sums[line] = sums.get(line, 0) + each.calls
    return [f"{line} {calls}" for line, calls in sums.items()]


def path(stack: Stack) -> list[str]:
    """The process, where it is told, and the frames from the outermost on."""
    return [*([stack.caller] if stack.caller else []), *reversed(stack.names)]


def _number(text: str) -> int:
    try:
        return int.from_bytes(bytes.fromhex(text), sys.byteorder)
    except (TypeError, ValueError):
        raise ProtocolError("the daemon's answer has an entry that is not in hex") from None


def _frames(entry: answers.Entry) -> tuple[Frame, ...]:
    """The frames as the daemon has found their functions."""
    try:
        return tuple(
            Frame(int(each["address"], 16), each["symbol"], each["offset"], each["module"])
            for each in entry["decoded"]["value"]["frames"]
        )
    except (KeyError, TypeError, ValueError):
        raise ProtocolError("the daemon's answer has a stack without its frames") from None
