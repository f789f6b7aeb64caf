"""The client: a Python library.

HTTP on the daemon's Unix socket, and with nothing of the daemon in it::

    from kpmd.client import Client

    with (
        Client() as kpmd,
        kpmd.loaded_builtin("count") as loaded,
        kpmd.attached(loaded["programs"][0]["id"], symbols=["vfs_read"]) as link,
    ):
        print(kpmd.link(link["id"])["missed"])

``AsyncClient`` has the same methods as coroutines. Errors are subclasses of ``ClientError``, one
for each kind that the daemon knows (``kpmd.client.errors``).

What it names is imported when it is first used: few need all of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpmd.client.aio import AsyncClient
    from kpmd.client.client import Client
    from kpmd.client.errors import (
        AddressNotTraceable,
        ApiError,
        BadObject,
        ClientError,
        Conflict,
        ConnectionFailed,
        Forbidden,
        Gone,
        InternalError,
        Invalid,
        KernelError,
        Malformed,
        MethodNotAllowed,
        NotFound,
        NotSupported,
        ProtocolError,
        QuotaExceeded,
        ShuttingDown,
        SymbolNotFound,
        TooLarge,
        TooSlow,
        VerifierRejected,
        WrongAttachType,
    )
    from kpmd.client.streams import AsyncStream, Stream

__all__ = [
    "DEFAULT_SOCKET",
    "AddressNotTraceable",
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "BadObject",
    "Client",
    "ClientError",
    "Conflict",
    "ConnectionFailed",
    "Forbidden",
    "Gone",
    "InternalError",
    "Invalid",
    "KernelError",
    "Malformed",
    "MethodNotAllowed",
    "NotFound",
    "NotSupported",
    "ProtocolError",
    "QuotaExceeded",
    "ShuttingDown",
    "Stream",
    "SymbolNotFound",
    "TooLarge",
    "TooSlow",
    "VerifierRejected",
    "WrongAttachType",
]

#: Where the daemon listens unless it was told otherwise.
DEFAULT_SOCKET = "/run/kpmd.sock"

#: The modules of what is no error.
_MODULES = {"AsyncClient": "aio", "AsyncStream": "streams", "Client": "client", "Stream": "streams"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
