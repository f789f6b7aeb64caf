"""What can go wrong between a client and the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

#: Why there is no connection, or no more: no socket there; its permissions do not let this user in;
#: nobody listens on it; the daemon closed it in the middle of a call; no answer came in time;
#: anything else.
Reason = Literal["missing", "permission", "refused", "lost", "timeout", "other"]


class ClientError(Exception):
    """Base of the errors of this package."""


class ConnectionFailed(ClientError):
    """The daemon cannot be reached, or went away; the message says what to do.

    ``reason`` is the stable word to switch on.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class ProtocolError(ClientError):
    """What came is no answer of kpmd: not HTTP, not JSON, of another shape, or too large."""


class ApiError(ClientError):
    """The daemon refused the call.

    ``kind`` is the stable word to switch on (``"symbol-not-found"``), ``status`` the HTTP status,
    ``detail`` a sentence for people, ``problem`` the whole problem document (RFC 9457) with
    whatever else the daemon told: ``errors``, ``symbols``, ``verifier_log``, ``needs`` and so on.
    """

    def __init__(self, kind: str, status: int, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(detail)
        self.kind = kind
        self.status = status
        self.detail = detail
        self.problem = dict(problem)

    @classmethod
    def from_problem(cls, status: int, problem: Mapping[str, Any]) -> ApiError:
        """From a problem document, which may lack any of its members."""
        kind = problem.get("kind")
        detail = problem.get("detail") or problem.get("title")
        return cls(
            kind if isinstance(kind, str) else "unknown",
            status,
            detail if isinstance(detail, str) else f"the daemon answered {status} without a reason",
            problem,
        )
