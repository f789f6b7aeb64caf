"""The daemon's own processes are killed: clients get an error, and the kernel keeps nothing."""

from __future__ import annotations

import os
import select
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import Daemon, expects_multi
from tests.kernel.rest import Rest
from tests.kernel.test_faults import ATTACH, MUCH, ONE, SLOW
from tests.kernel.test_service import COUNT
from tests.kernel.wire import Forked, Tell, Wire
from tests.kernel.witness import (
    Holdings,
    children,
    eventually,
    in_api,
    in_kernel,
    kprobes,
    wait_for_call,
)

pytestmark = pytest.mark.kprobes


def loading(path: str) -> Callable[[Tell], None]:
    """A client that loads what takes the verifier seconds, and tells the answer."""

    def work(tell: Tell) -> None:
        tell(Wire(path).ask("POST", "/programs", {**SLOW, "attach": "kprobe_multi"}))

    return work


def kill_while_it_loads(daemon: Daemon, made: Forked, whom: str) -> tuple[int, Any]:
    """The answer to a load whose child, or its server, was killed in the middle."""
    (server,) = children(daemon.pid)
    eventually(lambda: len(children(server)), 1)
    os.kill(server if whom == "server" else children(server)[0], signal.SIGKILL)
    status, answer = made.told()
    return status, answer


def test_loaders_child_is_killed(
    daemon: Daemon, rest: Rest, exact: Callable[[], Holdings], fork: Callable[..., Forked]
) -> None:
    made = fork(loading(daemon.socket))
    status, problem = kill_while_it_loads(daemon, made, "child")
    assert (status, problem["kind"]) == (422, "bad-object")
    assert "SIGKILL" in problem["detail"]
    assert exact() == Holdings()
    loaded = rest.ok("POST", "/programs", COUNT)
    assert len(exact().programs) == 1
    rest.ok("DELETE", f"/programs/{loaded['programs'][0]['id']}")


def test_loaders_server_is_killed_while_it_loads(
    daemon: Daemon, rest: Rest, exact: Callable[[], Holdings], fork: Callable[..., Forked]
) -> None:
    made = fork(loading(daemon.socket))
    (server,) = children(daemon.pid)
    status, problem = kill_while_it_loads(daemon, made, "server")
    assert (status, problem["kind"], problem["errno"]) == (500, "kernel", "EAGAIN")
    # Its child died with it: nothing of the object is left, and the next load gets a new server.
    assert exact() == Holdings()
    loaded = rest.ok("POST", "/programs", COUNT)
    assert len(exact().programs) == 1
    assert children(daemon.pid) != [server]
    rest.ok("DELETE", f"/programs/{loaded['programs'][0]['id']}")


def test_loaders_server_is_killed_between_loads(
    daemon: Daemon, rest: Rest, exact: Callable[[], Holdings]
) -> None:
    """Nobody notices: the next load starts another."""
    for _ in range(3):
        (server,) = children(daemon.pid)
        os.kill(server, signal.SIGKILL)
        loaded = rest.ok("POST", "/programs", COUNT)
        assert len(exact().programs) == 1
        rest.ok("DELETE", f"/programs/{loaded['programs'][0]['id']}")


def attaching(path: str) -> Callable[[Tell], None]:
    """A client with a link that goes on to attach to much more; tells how that ended."""
    many = MUCH if expects_multi() else {"patterns": ["tcp_v4_*"]}

    def work(tell: Tell) -> None:
        wire = Wire(path)
        program = wire.ok("POST", "/programs", COUNT)["programs"][0]["id"]
        body: dict[str, object] = {"program": program, "kind": "kprobe"}
        tell(wire.ok("POST", "/links", {**body, **ONE})["count"])
        kept = {**body, **ONE, "lifetime": {"kind": "persistent"}}
        tell(wire.ok("POST", "/links", kept)["count"])
        try:
            wire.ask("POST", "/links", {**body, **many})
        except ConnectionResetError:
            tell("cut")

    return work


def test_daemon_is_killed(fork: Callable[..., Forked]) -> None:
    """In the middle of a request, with links attached; and it can be started again at once."""
    others = in_kernel()
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        Path(name).chmod(0o755)
        daemon = Daemon(Path(name), "--mode", "0666")
        made = fork(attaching(daemon.socket))
        assert (made.told(), made.told()) == (1, 1)
        held = in_kernel() - others
        assert len(held.programs) == 1
        assert len(held.links) + len(kprobes()) >= 2
        wait_for_call(daemon.pid, ATTACH if expects_multi() else "perf_event_open")
        helpers = [os.pidfd_open(each) for each in children(daemon.pid)]
        assert helpers
        daemon.end(signal.SIGKILL)
        assert made.told() == "cut"
        # Also what was being made: the kernel ends the call, and lets go of what it gave.
        eventually(in_kernel, others)
        eventually(kprobes, [])
        for pidfd in helpers:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(20_000), "a process of the daemon outlived it"
            os.close(pidfd)

        daemon = Daemon(Path(name))
        rest = Rest(daemon.socket)
        assert in_api(rest) == Holdings()
        program = rest.ok("POST", "/programs", COUNT)["programs"][0]["id"]
        rest.ok("POST", "/links", {"program": program, "kind": "kprobe", **ONE})
        rest.close()
        assert daemon.stop() == 0
    assert in_kernel() == others
