"""Takes the guest's output and the terminal's keys apart; no input or output is done here."""

import time

from tests.vm.guest import end_mark, start_mark

_LONGEST_STATUS = 4  # three digits and a NUL


class Reader:
    """Splits the guest's stream into the command's output and what the init says (marks)."""

    def __init__(self, nonce: str) -> None:
        self._start = start_mark(nonce)
        self._end = end_mark(nonce)
        self._held = b""
        self.started = False
        self.status: int | None = None

    def feed(self, data: bytes) -> bytes:
        """Return the output that is certain by now; the rest is held until more comes."""
        self._held += data
        if not self.started:
            before, mark, after = self._held.partition(self._start)
            if not mark:
                self._held = before[-len(self._start) :]
                return b""
            self.started = True
            self._held = after
        output, mark, after = self._held.partition(self._end)
        if mark:
            digits, nul, _ = after.partition(b"\0")
            if nul:
                self.status = int(digits)
                self._held = b""
            elif len(after) < _LONGEST_STATUS:
                self._held = mark + after
            return output
        keep = self._beginning_of_mark(output)
        self._held = output[len(output) - keep :]
        return output[: len(output) - keep]

    def rest(self) -> bytes:
        """Return what is still held, once nothing more can come."""
        held, self._held = self._held, b""
        return held if self.started else b""

    def _beginning_of_mark(self, output: bytes) -> int:
        for length in range(min(len(self._end) - 1, len(output)), 0, -1):
            if output.endswith(self._end[:length]):
                return length
        return 0


class Keys:
    """Watches what is typed for a way out of a guest that doesn't answer.

    Ctrl-A then x always ends the machine (Ctrl-A twice types one, as in qemu); with
    ``impatient`` a second Ctrl-C within a second does so too.
    """

    def __init__(self, *, impatient: bool) -> None:
        self._impatient = impatient
        self._escaped = False
        self._interrupted = -10.0
        self.leave = False

    def feed(self, data: bytes, now: float | None = None) -> bytes:
        """Return what to pass on to the guest."""
        now = time.monotonic() if now is None else now
        passed = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in b"xX":
                    self.leave = True
                    break
                if byte != 1:
                    passed.append(1)
            elif byte == 1:
                self._escaped = True
                continue
            elif byte == 3 and self._impatient:
                if now - self._interrupted < 1:
                    self.leave = True
                    break
                self._interrupted = now
            passed.append(byte)
        return bytes(passed)
