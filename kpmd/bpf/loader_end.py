"""How the loader's processes end, in words for a client.

May import: ``kpmd.errors``. Keep the imports few, the loader's processes carry them.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from typing import Any

from kpmd.errors import BadObject, KernelError, KpmdError

#: What is told of a process: one of these words and a number.
STARTED = "started"
EXITED, KILLED, TIMED_OUT, NOT_STARTED = "exited", "killed", "timed-out", "not-started"

#: What is said of it to those who count, beside TIMED_OUT.
CRASHED, GAVE_UP = "crashed", "gave-up"

#: libbpf's words that are shown after a crash, in bytes.
_WORDS_SHOWN = 1024


def how_ended(ended: os.waitid_result | None) -> tuple[str, int]:
    """The word and the number for a process that was waited for."""
    if ended is None:
        return NOT_STARTED, errno.ECHILD
    return EXITED if ended.si_code == os.CLD_EXITED else KILLED, ended.si_status


def describe(how: str, number: int, words: int, limits: Mapping[str, Any]) -> KpmdError:
    """What to say of a process that did not end well; ``words``: the FD of what it wrote."""
    if how == TIMED_OUT:
        return BadObject.after(
            TIMED_OUT, f"loading took longer than {limits['seconds']:g} seconds and was ended"
        )
    if how == KILLED:
        if number == signal.SIGXCPU:
            most = limits["cpu_seconds"]
            return BadObject.after(
                TIMED_OUT, f"loading took more than {most} seconds of processor time"
            )
        names = {each.value: each.name for each in signal.Signals}
        name = names.get(number, "unknown")
        last = last_words(words)
        return BadObject.after(
            CRASHED,
            f"the process that read the object crashed with signal {number} ({name})"
            + (f"; libbpf said last: {last}" if last else ""),
        )
    if how == EXITED:
        return BadObject.after(
            GAVE_UP,
            f"the process that read the object gave up (status {number}): {last_words(words)}",
        )
    if how == NOT_STARTED:
        return KernelError("no process can be started to load the object; try later", number)
    return KernelError("the loader ended while it worked on the object; try again", errno.EAGAIN)


def last_words(words: int) -> str:
    """The end of what a process wrote, in one line."""
    size = os.lseek(words, 0, os.SEEK_END)
    raw = os.pread(words, _WORDS_SHOWN, max(0, size - _WORDS_SHOWN))
    text = "".join(c if c.isprintable() else " " for c in raw.decode("ascii", "replace"))
    return " ".join(text.replace("libbpf: ", "; ").strip("; ").split())


def problem(error: KpmdError) -> dict[str, Any]:
    """An error as the loader's processes tell it to the next one."""
    number = error.number if isinstance(error, KernelError) else None
    return {
        "error": error.kind,
        "detail": error.detail,
        "errno": number,
        "fields": error.fields,
    }


def out_of_memory(limits: Mapping[str, Any]) -> BadObject:
    """What to say where a process may not have the memory that it needs."""
    return BadObject(
        f"out of memory: reading the object took more than {limits['memory_bytes'] >> 20} MiB"
    )
