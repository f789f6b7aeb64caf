"""The client: a small Python library, and ``kpmctl``.

Synchronous, over HTTP on the daemon's Unix socket, and with nothing of the daemon in it::

    from kpmd.client import Client

    with Client() as kpmd:
        made = kpmd.load_builtin("count")
        link = kpmd.attach(made["programs"][0]["id"], symbols=["vfs_read"])

What it names is imported when it is first used: ``kpmctl --version`` needs none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpmd.client.client import Client
    from kpmd.client.errors import ApiError, ClientError, ConnectionFailed, ProtocolError

__all__ = ["DEFAULT_SOCKET", "ApiError", "Client", "ClientError", "ConnectionFailed"]
__all__ += ["ProtocolError"]

#: Where the daemon listens unless it was told otherwise.
DEFAULT_SOCKET = "/run/kpmd.sock"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "client" if name == "Client" else "errors"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
