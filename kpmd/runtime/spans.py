"""The phases of a request's work that take time, told to whoever traces it; by default, nobody.

What traces requests is ``kpmd.api.tracing``'s matter. Of a request that is not traced nothing is
known here, and a phase costs the look at a context variable. May import nothing of kpmd.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Trace(Protocol):
    """A request that is traced. Any thread may tell it something; after its end it ignores that."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """A phase, which lasts as long as the block does."""

    def waited(self, lane: str, since: int) -> None:
        """Its work has waited for a thread of that lane since then (nanoseconds, time of day)."""


#: The request that this task, or this work in a pool, is for.
current: ContextVar[Trace | None] = ContextVar("kpmd.trace", default=None)

_UNTRACED = nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """A phase of the request's work: as long as the block lasts."""
    trace = current.get()
    return _UNTRACED if trace is None else trace.phase(name)


def pooled(lane: str, work: Callable[..., T], *args: Any) -> Callable[[], T]:
    """``work(*args)`` for a thread of a pool, where it still is the request's that gives it."""
    trace = current.get()
    if trace is None:
        return partial(work, *args)
    given, context = time.time_ns(), copy_context()

    def run() -> T:
        trace.waited(lane, given)
        return context.run(work, *args)

    return run
