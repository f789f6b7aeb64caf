"""A call as a line of text: when, how long, by whom, its arguments, and what it returned."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from typing import Any

from kpmd.client.errors import ProtocolError
from kpmd.kpmctl.histogram import span
from kpmd.kpmctl.output import clean

#: Errors that the kernel keeps to itself.
_INTERNAL = {
    512: "ERESTARTSYS",
    513: "ERESTARTNOINTR",
    514: "ERESTARTNOHAND",
    515: "ENOIOCTLCMD",
    516: "ERESTART_RESTARTBLOCK",
    517: "EPROBE_DEFER",
    524: "ENOTSUPP",
}

#: The largest error number that a pointer can hold (MAX_ERRNO).
_MOST_ERRNO = 4095

#: From here on a number is an address, or bits: it is told in hexadecimal.
_LARGE = 1 << 20


class Call:
    """A ``struct trace_event`` of the builtin, as the daemon decodes it."""

    def __init__(self, decoded: Mapping[str, Any]) -> None:
        """Raises ProtocolError."""
        try:
            self.time_ns = int(decoded["time_ns"])
            self.duration_ns = int(decoded["duration_ns"])
            self.function = int(decoded["function"], 16)
            self.arguments = [int(each) for each in decoded["arguments"]]
            self.return_value = int(decoded["return_value"])
            self.pid, self.tid = int(decoded["pid"]), int(decoded["tid"])
            self.uid, self.gid = int(decoded["uid"]), int(decoded["gid"])
            self.cpu = int(decoded["cpu"])
            self.command = str(decoded["command"])
            self.returned = decoded["kind"] == "CALL_RETURNED"
        except (KeyError, TypeError, ValueError):
            raise ProtocolError("the daemon sent a record that is no call") from None


def signed(value: int) -> int:
    """A register's value: as a negative number where it is a small one, of 64 bits or of 32.

    What a function's type has no bits for is left in the register: an int is 32 of them.
    """
    value &= (1 << 64) - 1
    for bits in (64, 32):
        if (1 << bits) - _MOST_ERRNO <= value < 1 << bits:
            return value - (1 << bits)
    return value


def number(value: int) -> str:
    """A register's value, in hexadecimal where it is large."""
    value = signed(value)
    return str(value) if value < _LARGE else hex(value)


def returned(value: int) -> str:
    """What a function returned; where that can be an error, its name, too."""
    value = signed(value)
    name = None
    if value < 0:
        name = _INTERNAL.get(-value) or errno.errorcode.get(-value)
    return f"{number(value)} {name}" if name else number(value)


class CallLines:
    """Calls as lines under a heading."""

    def __init__(
        self, arguments: int, epoch_ns: int | None, entry_only: bool, unicode: bool
    ) -> None:
        """``arguments``: how many are told.

        ``epoch_ns`` is when (Unix time) the clock of the calls was 0; None where nobody knows:
        times are told since the first call then.
        """
        self._arguments = arguments
        self._epoch_ns = epoch_ns
        self._entry_only = entry_only
        self._unicode = unicode
        self._first: int | None = None

    def heading(self) -> str:
        """The titles."""
        time_ = "TIME" if self._epoch_ns is not None else "SECONDS"
        what = "FUNCTION" if self._entry_only else "FUNCTION = RETURNED"
        taken = "" if self._entry_only else f"{'TOOK':>7}  "
        return f"{time_:<15}  {taken}PROCESS[THREAD]  {what}"

    def line(self, call: Call, name: str) -> str:
        """A call of the function of this name."""
        told = ", ".join(number(each) for each in call.arguments[: self._arguments])
        who = f"{clean(call.command)}[{call.tid}]"
        what = f"{clean(name)}({told})"
        if not call.returned:
            return f"{self._time(call.time_ns)}  {who:<15}  {what}"
        took = span(call.duration_ns, self._unicode)
        what += f" = {returned(call.return_value)}"
        return f"{self._time(call.time_ns)}  {took:>7}  {who:<15}  {what}"

    def _time(self, time_ns: int) -> str:
        if self._epoch_ns is None:
            self._first = time_ns if self._first is None else self._first
            return f"{(time_ns - self._first) / 1e9:<15.6f}"
        seconds, ns = divmod(self._epoch_ns + time_ns, 10**9)
        return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{ns // 1000:06d}"
