"""A map that was handed over, from kpmd in its sandbox: who holds it, and a restart meanwhile."""

from __future__ import annotations

import os
from typing import Any

from tests.kernel.rest import Rest
from tests.kernel.test_map_fds import take
from tests.kernel.test_service import COUNT
from tests.kernel.wire import Wire
from tests.kernel.witness import in_kernel
from tests.systemd.conftest import SOCKET, Kpmd
from tests.systemd.control import until

BODY = {**COUNT, "lifetime": {"kind": "persistent"}}


def make(rest: Rest) -> tuple[dict[str, Any], int]:
    """A program, and the file descriptor of one of its maps."""
    program = rest.ok("POST", "/programs", BODY)["programs"][0]
    wire = Wire(SOCKET)
    try:
        return program, take(wire, program["maps"][0])[1]
    finally:
        wire.close()


def used(rest: Rest) -> int:
    usage: dict[str, int] = rest.ok("GET", "/policy")["usage"]
    return usage["map_bytes"]


def test_it_counts_until_nobody_holds_it_also_over_a_restart(kpmd: Kpmd, rest: Rest) -> None:
    before = in_kernel().maps
    program, fd = make(rest)
    rest.ok("DELETE", f"/programs/{program['id']}")
    # All but this one; systemd's file descriptors have to go as well.
    until(lambda: len(in_kernel().maps - before) == 1, "the others are gone")
    assert used(rest) > 0
    os.close(fd)
    until(lambda: used(rest) == 0, "it is off the books")
    until(lambda: in_kernel().maps == before, "it is gone")
    # The same with a restart meanwhile.
    program, fd = make(rest)
    kpmd.service.restart()
    rest.close()
    rest = Rest(SOCKET)
    rest.ok("DELETE", f"/programs/{program['id']}")
    until(lambda: used(rest) < 2 << 20, "only this one counts")
    assert used(rest) > 0
    os.close(fd)
    until(lambda: used(rest) == 0, "it is off the books")
    rest.close()
