"""``python -m tests.fakes.daemon SOCKET [CALL CONTROL]``: the whole daemon over the fake kernel.

With CALL (``close_link``, say) each such call of the kernel connects to the Unix socket CONTROL,
and blocks until that closes the connection.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import uvloop

from kpmd.config import Config
from kpmd.daemon import Manager, serve
from kpmd.listener import make
from kpmd.log import configure
from tests.fakes.kernel import FakeKernel


def main() -> None:
    """Serve until SIGTERM."""
    configure("info")
    path = Path(sys.argv[1])
    manager = Manager.from_environment(os.environ)
    listener = make(path, None, 0o660)
    kernel = FakeKernel(
        entries={
            (0xFFFFFFFF81001000).to_bytes(8, "little"): [(41).to_bytes(8, "little")],
            (0xFFFFFFFF81002000).to_bytes(8, "little"): [(7).to_bytes(8, "little")],
        }
    )
    if len(sys.argv) == 4:

        def wait() -> None:
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(sys.argv[3])
                control.recv(1)

        kernel.hooks[sys.argv[2]] = wait
    try:
        uvloop.run(serve(Config(socket=path), listener, kernel, manager=manager))
    finally:
        listener.close()


if __name__ == "__main__":
    main()
