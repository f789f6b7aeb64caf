"""A program on a terminal, and what that shows."""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pexpect
import pyte

ROOT = Path(__file__).parents[2]


class Terminal:
    """A terminal of ``columns`` and ``lines`` that ``command`` runs on; ``user``: as that one."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        columns: int = 60,
        lines: int = 20,
        patience: float = 20,
        user: int | None = None,
    ) -> None:
        def become() -> None:
            if user is not None:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)

        self.child = pexpect.spawn(
            command[0],
            list(command[1:]),
            cwd=str(ROOT),
            env=dict(environment),
            encoding="utf-8",
            dimensions=(lines, columns),
            timeout=patience,
            preexec_fn=become,
        )
        self.before = termios.tcgetattr(self.child.child_fd)
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.Stream(self.screen)
        #: All that it wrote.
        self.raw = ""
        self._patience = patience

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def read_until(self, holds: Callable[[list[str]], bool]) -> list[str]:
        """Read until the screen is like that."""
        while not holds(self.screen.display):
            self._take(self.child.read_nonblocking(65536, self._patience))
        return self.screen.display

    def shows(self, text: str) -> list[str]:
        """Read until a line has this text."""
        return self.read_until(lambda lines: any(text in line for line in lines))

    def end(self) -> int | None:
        """Read the rest of it; returns the status, None where a signal ended it."""
        with contextlib.suppress(pexpect.EOF):
            while True:
                self._take(self.child.read_nonblocking(65536, self._patience))
        after = termios.tcgetattr(self.child.child_fd)
        self.child.close()
        assert after == self.before
        if "\x1b[?25l" in self.raw:  # the cursor was hidden, and is seen again
            assert self.raw.rindex("\x1b[?25h") > self.raw.rindex("\x1b[?25l")
        return self.child.exitstatus

    def _take(self, data: str) -> None:
        self.raw += data
        # pyte does not know that these begin private sequences.
        self.stream.feed(data.replace("\x1b[>", "\x1b[?").replace("\x1b[<u", ""))
