"""``python -m tests.fakes.daemon``: the whole daemon over the fake kernel."""

from __future__ import annotations

import argparse
import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from kpmd import policy_file
from kpmd.config import Config
from kpmd.core.policy import Policy
from kpmd.daemon import Manager, serve
from kpmd.listener import make
from kpmd.log import configure
from kpmd.runtime.policies import Policies
from tests.fakes.kernel import FakeKernel
from tests.fakes.policies import OPEN
from tests.fakes.traffic import TrafficKernel


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="tests.fakes.daemon")
    parser.add_argument("socket", type=Path)
    parser.add_argument(
        "hook",
        nargs="*",
        help="CALL CONTROL: each such call of the kernel (close_link, say) connects to the Unix "
        "socket CONTROL, and blocks until that closes the connection",
    )
    parser.add_argument(
        "--policy",
        type=Path,
        help="who is an administrator is up to its groups then, and root is nobody special; "
        "without it, who runs this may do everything",
    )
    parser.add_argument(
        "--traffic", action="store_true", help="functions are called, which builtins tell of"
    )
    arguments = parser.parse_args()
    configure("info")
    path: Path = arguments.socket
    manager = Manager.from_environment(os.environ)
    listener = make(path, None, 0o660)
    kernel = (TrafficKernel if arguments.traffic else FakeKernel)(
        entries={
            (0xFFFFFFFF81001000).to_bytes(8, "little"): [(41).to_bytes(8, "little")],
            (0xFFFFFFFF81002000).to_bytes(8, "little"): [(7).to_bytes(8, "little")],
        }
    )
    if arguments.hook:
        call, control_path = arguments.hook

        def wait() -> None:
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(control_path)
                control.recv(1)

        kernel.hooks[call] = wait
    read = partial(_policy, arguments.policy)
    policies = Policies(read(), read)
    try:
        uvloop.run(serve(Config(socket=path), listener, kernel, manager=manager, policies=policies))
    finally:
        listener.close()


def _policy(path: Path | None) -> Policy:
    if path is None:
        return replace(OPEN, admin_users=frozenset({os.geteuid()}))
    policy = policy_file.load(path)
    return replace(policy, admin_users=policy.admin_users - {0})


if __name__ == "__main__":
    main()
