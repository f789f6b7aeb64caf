"""What can go wrong between a client and the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

#: Why there is no connection, or no more: no socket there; its permissions do not let this user in;
#: nobody listens on it; the daemon closed it in the middle of a call; no answer came in time; ssh
#: did not get through to its machine; anything else.
Reason = Literal["missing", "permission", "refused", "lost", "timeout", "ssh", "other"]


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
    """The daemon refused the call; of each kind that is known there is a subclass.

    ``kind`` is the stable word (``"symbol-not-found"``), ``status`` the HTTP status, ``detail`` a
    sentence for people, ``problem`` the whole problem document (RFC 9457) with whatever else the
    daemon told: ``errors``, ``symbols``, ``verifier_log``, ``needs`` and so on.
    """

    def __init__(self, kind: str, status: int, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(detail)
        self.kind = kind
        self.status = status
        self.detail = detail
        self.problem = dict(problem)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.status, self.detail, self.problem)

    @staticmethod
    def from_problem(status: int, problem: Mapping[str, Any]) -> ApiError:
        """From a problem document, which may lack any of its members.

        A kind that this client does not know yet is an ``ApiError`` as such.
        """
        kind = problem.get("kind")
        kind = kind if isinstance(kind, str) else "unknown"
        detail = problem.get("detail") or problem.get("title")
        return KINDS.get(kind, ApiError)(
            kind,
            status,
            detail if isinstance(detail, str) else f"the daemon answered {status} without a reason",
            problem,
        )


class Malformed(ApiError):
    """What came to the daemon is not HTTP or JSON that it can read."""


class Invalid(ApiError):
    """A field is missing, unknown, of the wrong type or out of range; ``problem["errors"]``."""


class BadObject(ApiError):
    """The ELF object cannot be read."""


class VerifierRejected(ApiError):
    """The kernel's verifier refused the program; ``problem["verifier_log"]`` has its words."""


class SymbolNotFound(ApiError):
    """Functions do not exist or cannot be traced; ``problem["errors"]`` says why each."""


class AddressNotTraceable(ApiError):
    """An address is no start of a function that the kernel can trace; ``problem["addresses"]``."""


class WrongAttachType(ApiError):
    """The program was loaded for another kind of link."""


class Forbidden(ApiError):
    """The policy does not let the caller do this; ``problem["rule"]`` says which rule."""


class NotFound(ApiError):
    """There is no such thing, or it is another user's: the two look the same."""


class MethodNotAllowed(ApiError):
    """The path exists, but not with this method."""


class Conflict(ApiError):
    """The thing is in use: a program has links, an entry is there already."""


class Gone(ApiError):
    """The lease has ended, or the events asked for are no longer kept."""


class TooLarge(ApiError):
    """The body, or an object, is over its limit."""


class TooSlow(ApiError):
    """The request did not come whole in the time that it has (the kind ``timeout``)."""


class QuotaExceeded(ApiError):
    """A limit of the user is reached: ``problem["limit"]``, ``["used"]`` and ``["most"]``."""


class NotSupported(ApiError):
    """Links cannot do that, or the kernel lacks what it takes; ``problem["needs"]`` says what."""


class ShuttingDown(ApiError):
    """The daemon is stopping, and has done nothing."""


class KernelError(ApiError):
    """Any other errno from the kernel; ``problem["errno"]`` is its name."""


class InternalError(ApiError):
    """A bug in the daemon; ``problem["request"]`` is what its log has."""


#: The class of each kind.
KINDS: dict[str, type[ApiError]] = {
    "malformed": Malformed,
    "invalid": Invalid,
    "bad-object": BadObject,
    "verifier-rejected": VerifierRejected,
    "symbol-not-found": SymbolNotFound,
    "address-not-traceable": AddressNotTraceable,
    "wrong-attach-type": WrongAttachType,
    "forbidden": Forbidden,
    "not-found": NotFound,
    "method-not-allowed": MethodNotAllowed,
    "conflict": Conflict,
    "gone": Gone,
    "too-large": TooLarge,
    "timeout": TooSlow,
    "quota": QuotaExceeded,
    "not-supported": NotSupported,
    "shutting-down": ShuttingDown,
    "kernel": KernelError,
    "internal": InternalError,
}
