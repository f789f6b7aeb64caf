"""Programs that are asked for what they know: for a time, and for so many bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass

from kpmd.kpmctl.support.parts import MOST_BYTES, Missing

#: Where bpftool is, which is in no user's $PATH.
_SYSTEM = "/usr/sbin:/sbin"

#: Characters of a program's complaint that are kept: it says what is wrong at its end.
_COMPLAINT = 500

#: Seconds that the end of one that was killed is waited for.
_FAREWELL = 1.0


@dataclass(frozen=True)
class Ran:
    """A program that ended by itself: with which status, and what it wrote."""

    name: str
    status: int
    output: str
    error: str

    def failure(self) -> str:
        """Why its output is not what it was run for."""
        told = " ".join((self.error or self.output).split())[-_COMPLAINT:]
        return f"{self.name} ended with {self.status}: {told or 'it said nothing'}"


async def run(name: str, *arguments: str) -> Ran:
    """Run a program to its end. Raises Missing where it is not installed, or writes too much.

    Cancelled, it leaves no process behind.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM}"
    program = shutil.which(name, path=path)
    if program is None:
        raise Missing("absent", f"{name} is not installed")
    loop = asyncio.get_running_loop()
    transport, told = await loop.subprocess_exec(
        lambda: _Told(name),
        program,
        *arguments,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
        # With all that it starts; and Ctrl-C is for us alone.
        start_new_session=True,
    )
    try:
        await told.whole
    finally:
        if not told.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(transport.get_pid(), signal.SIGKILL)
        transport.close()
        with contextlib.suppress(TimeoutError):  # it hangs in the kernel
            async with asyncio.timeout(_FAREWELL):
                await told.gone.wait()
    return Ran(name, transport.get_returncode() or 0, told.text(1), told.text(2))


class _Told(asyncio.SubprocessProtocol):
    """What a program writes. ``whole``: it and all that it started are done, or it is too much."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._written = {1: bytearray(), 2: bytearray()}
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take what it wrote."""
        if len(self._written[fd]) + len(data) <= MOST_BYTES:
            self._written[fd] += data
        elif not self.whole.done():
            told = f"{self._name} writes more than {MOST_BYTES} bytes"
            self.whole.set_exception(Missing("failed", told))

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, and nobody writes any more."""
        self.gone.set()
        if not self.whole.done():
            self.whole.set_result(None)

    def text(self, fd: int) -> str:
        """All that it wrote there."""
        return self._written[fd].decode(errors="backslashreplace")


async def output(name: str, *arguments: str) -> str:
    """What a program wrote, which has to succeed. Raises Missing."""
    done = await run(name, *arguments)
    if done.status:
        raise Missing("failed", done.failure())
    return done.output
