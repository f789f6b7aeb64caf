"""One part of a support bundle: what is asked, what comes of it, and for how long that may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from kpmd.client.errors import (
    ApiError,
    ClientError,
    ConnectionFailed,
    Forbidden,
    MethodNotAllowed,
    NotFound,
)

#: Bytes of one answer, of one program's output and of one file at the most.
MOST_BYTES = 4 << 20

#: ``left-out``: it was not wanted, or would be about another machine.
Outcome = Literal["got", "refused", "absent", "failed", "timeout", "left-out"]


class Missing(Exception):
    """A part that there is not, and why."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome: Outcome = outcome
        self.detail = detail


@dataclass(frozen=True)
class Part:
    """``file``: its name in the bundle. ``asked``: what is asked, and whom, in words.

    ``get`` answers with text, or with anything that JSON can write. It may raise whatever it likes.
    """

    file: str
    asked: str
    get: Callable[[], Awaitable[object]]
    #: Seconds; None: as long as the others.
    limit: float | None = None


@dataclass(frozen=True)
class Result:
    """What came of a part. ``detail`` says why there is nothing, or None."""

    part: Part
    outcome: Outcome
    detail: str | None
    data: object
    seconds: float


async def take(part: Part, limit: float) -> Result:
    """Get a part, within ``limit`` seconds unless it has a limit of its own. Never raises."""
    begun = time.monotonic()
    limit = part.limit or limit
    outcome: Outcome = "got"
    detail: str | None = None
    data: object = None
    try:
        async with asyncio.timeout(limit):
            data = await part.get()
    except Exception as error:
        outcome, detail = _explained(error, limit)
    return Result(part, outcome, detail, data, time.monotonic() - begun)


def _explained(error: Exception, limit: float) -> tuple[Outcome, str]:
    """How a part ended without an answer, and why."""
    if isinstance(error, Missing):
        return error.outcome, error.detail
    if isinstance(error, TimeoutError):
        return "timeout", f"there was no answer within {limit:g} seconds"
    if isinstance(error, (NotFound, MethodNotAllowed)):
        return "absent", f"this daemon has no such call: {error.detail}"
    if isinstance(error, ClientError):
        denied = isinstance(error, ConnectionFailed) and error.reason == "permission"
        told = error.detail if isinstance(error, ApiError) else str(error)
        return "refused" if denied or isinstance(error, Forbidden) else "failed", told
    if isinstance(error, FileNotFoundError):
        return "absent", f"{error.filename} is not there"
    if isinstance(error, OSError):
        return "refused" if isinstance(error, PermissionError) else "failed", str(error)
    # A bug here, or an answer that nobody thought of: the other parts are worth having.
    return "failed", f"{type(error).__name__}: {error}"
