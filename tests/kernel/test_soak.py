"""The soak of ``python -m tests.bench soak``, shortened: the same clients every time."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.bench.soak import PREFIXES, Plan, soak
from tests.kernel.conftest import Daemon
from tests.kernel.rest import Rest
from tests.kernel.witness import Holdings

pytestmark = pytest.mark.once

#: Threads that the daemon's pool for closing may start when it first needs them.
_CLOSERS = 4


def test_nothing_is_left_of_forty_clients(
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    traceable: list[tuple[int, str]],
) -> None:
    names = [name for _, name in traceable if name.startswith(PREFIXES)]
    seen = soak(daemon.socket, daemon.pid, names, Plan(clients=40, seconds=10, seed=4))
    assert seen.failed == 0
    assert seen.left == seen.others
    assert [each["pid"] for each in seen.clients] == [os.getpid()]
    assert seen.leases == []
    assert seen.after.fds == seen.before.fds
    assert seen.after.threads <= seen.before.threads + _CLOSERS
    assert exact() == Holdings()
