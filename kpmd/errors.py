"""Every error a client can see: its ``kind``, HTTP status, and public fields. Nowhere else.

An error is raised where the cause is known, at whatever layer, and travels unchanged to the API,
which writes it as RFC 9457 ``application/problem+json``. This module imports nothing of kpmd.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence
from typing import Any, ClassVar

#: Names returned in ``symbols`` at the most; ``symbols_total`` tells how many there are.
MAX_SYMBOLS = 100

#: errno values that the kernel gives out but Python's ``errno`` does not know
#: (include/linux/errno.h).
_KERNEL_ONLY = {512: "ERESTARTSYS", 524: "ENOTSUPP"}


def errno_name(number: int) -> str:
    """The symbolic name of an errno (``"EINVAL"``), or ``"errno N"`` for one without a name."""
    return _errno.errorcode.get(number) or _KERNEL_ONLY.get(number) or f"errno {number}"


class KpmdError(Exception):
    """Base of all errors with a place in the API.

    ``detail`` is a sentence for people that says what to do; the keyword fields become members of
    the problem document (``None`` is left out).
    """

    kind: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, **fields: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def problem(self) -> dict[str, Any]:
        """The members of the problem document."""
        return {
            "type": f"urn:kpmd:error:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "kind": self.kind,
            **self.fields,
        }


class Malformed(KpmdError):
    """What came is not HTTP or JSON that can be read."""

    kind, status, title = "malformed", 400, "The request cannot be read"


class Invalid(KpmdError):
    """A field is missing, unknown, of the wrong type, or out of range."""

    kind, status, title = "invalid", 422, "The request is not valid"

    @classmethod
    def at(cls, loc: Sequence[str | int], msg: str) -> Invalid:
        """One field is wrong: ``loc`` is the path to it, ``msg`` what is wrong and what to do."""
        path = ".".join(str(part) for part in loc)
        return cls(f"{path}: {msg}", errors=[{"loc": list(loc), "msg": msg}])


class BadObject(KpmdError):
    """The ELF object cannot be read, or it broke the process that read it."""

    kind, status, title = "bad-object", 422, "The object cannot be loaded"

    #: How that process ended, if it did not end well: a word, for who counts.
    ended = ""

    @classmethod
    def after(cls, ended: str, detail: str) -> BadObject:
        """The process that read the object ended so."""
        error = cls(detail)
        error.ended = ended
        return error


class VerifierRejected(KpmdError):
    """The kernel's verifier refused the program. ``verifier_log`` holds its own words."""

    kind, status, title = "verifier-rejected", 422, "The verifier refused the program"

    def __init__(self, detail: str, log: str, truncated: bool, **fields: Any) -> None:
        super().__init__(detail, verifier_log=log, verifier_log_truncated=truncated, **fields)


class SymbolNotFound(KpmdError):
    """One or more symbols do not exist or cannot be traced."""

    kind, status, title = "symbol-not-found", 422, "Symbols not found"

    def __init__(
        self, detail: str, names: Sequence[str], reasons: Sequence[str], **fields: Any
    ) -> None:
        super().__init__(
            detail,
            symbols=list(names[:MAX_SYMBOLS]),
            symbols_total=len(names),
            errors=[
                {"loc": ["symbols"], "msg": f"{name}: {reason}"}
                for name, reason in zip(names[:MAX_SYMBOLS], reasons, strict=False)
            ],
            **fields,
        )


class AddressNotTraceable(KpmdError):
    """An address is no function entry that the kernel can trace."""

    kind, status, title = "address-not-traceable", 422, "Addresses cannot be traced"

    def __init__(self, detail: str, addresses: Sequence[int], **fields: Any) -> None:
        shown = [f"0x{address:016x}" for address in addresses[:MAX_SYMBOLS]]
        super().__init__(
            detail,
            addresses=shown or None,
            addresses_total=len(addresses) or None,
            **fields,
        )


class WrongAttachType(KpmdError):
    """The program was made for another kind of link."""

    kind, status, title = "wrong-attach-type", 422, "The program is for another kind of link"


class Forbidden(KpmdError):
    """The caller may not do this."""

    kind, status, title = "forbidden", 403, "Not allowed"


class NotFound(KpmdError):
    """No such thing, or it is another user's: the two look the same."""

    kind, status, title = "not-found", 404, "Not found"


class MethodNotAllowed(KpmdError):
    """The path exists, but not with this method."""

    kind, status, title = "method-not-allowed", 405, "Method not allowed"


class Conflict(KpmdError):
    """The thing is in use."""

    kind, status, title = "conflict", 409, "In use"


class Gone(KpmdError):
    """What the request relies on has ended: the lease, or the client process itself."""

    kind, status, title = "gone", 410, "Gone"


class TooLarge(KpmdError):
    """The body or an object is over its limit."""

    kind, status, title = "too-large", 413, "Too large"


class TooSlow(KpmdError):
    """The request did not come whole in the time it has."""

    kind, status, title = "timeout", 408, "The request came too slowly"


class Quota(KpmdError):
    """A per-user limit is reached."""

    kind, status, title = "quota", 429, "Limit reached"


class NotSupported(KpmdError):
    """A link of this type cannot do that, or the kernel lacks the feature (``needs``: which)."""

    kind, status, title = "not-supported", 501, "Not supported"


class ShuttingDown(KpmdError):
    """The daemon is stopping."""

    kind, status, title = "shutting-down", 503, "Shutting down"


class KernelError(KpmdError):
    """Any other errno from the kernel. ``number`` is the errno."""

    kind, status, title = "kernel", 500, "The kernel refused"

    def __init__(self, detail: str, number: int, **fields: Any) -> None:
        super().__init__(detail, errno=errno_name(number), **fields)
        self.number = number


class InternalError(KpmdError):
    """A bug in kpmd. The log has the traceback; the client gets the request's id to quote."""
