"""How far a piece of work in the kernel has come. May import: nothing of kpmd.

Who does the work writes it, in a thread of the pool; who asks reads it, in another. Each field is
written by one assignment and by one thread at a time, so that there is no lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What is being done: ``queued`` waits for a thread, or for others that are before it.
Phase = Literal["queued", "parsing", "verifying", "resolving", "attaching", "detaching"]


@dataclass(slots=True)
class Progress:
    """``done`` of ``total``, programs or functions; None: not known."""

    phase: Phase = "queued"
    done: int | None = None
    total: int | None = None
    #: The program that the verifier is at, or that is attached or detached.
    name: str = ""
