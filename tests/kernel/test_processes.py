"""Which process a client is, and when it has ended: PID namespaces, and numbers used again."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import Daemon, Holder
from tests.kernel.rest import Rest
from tests.kernel.test_faults import ONE
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

#: A PID namespace of its own, as a container has it; it ends with the command.
BOXED = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

ATTACH_ONE = {"program": "$program", "kind": "kprobe", **ONE}


def test_client_in_a_pid_namespace_of_its_own(
    daemon: Daemon, rest: Rest, exact: Callable[[], Holdings]
) -> None:
    requests = [["POST", "/programs", COUNT], ["POST", "/links", ATTACH_ONE]]
    client = Holder(daemon.socket, requests, user=0, under=BOXED)
    try:
        (_, loaded), (status, link) = client.answers()
        assert status == 201, link
        there = rest.ok("GET", f"/clients/{link['client']}")
        # The number it has here, not the 1 or 2 that it has in there.
        assert [there["pid"]] == children(client.process.pid)
        assert len(exact().programs) == 1
    finally:
        client.kill()
    gone = daemon.wait_for("client gone", pid=there["pid"])
    assert gone["client"] == link["client"]
    daemon.wait_for("ended", what="link", id=link["id"], reason="client-gone")
    daemon.wait_for("ended", what="program", id=loaded["programs"][0]["id"])


class Boxed(Daemon):
    """The daemon as the first process of a PID namespace: it cannot see its clients' numbers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "--mode", "0666", under=BOXED)

    @property
    def pid(self) -> int:
        (pid,) = children(self.process.pid)
        return pid


@pytest.fixture(scope="module")
def boxed() -> Iterator[Boxed]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        Path(name).chmod(0o755)
        running = Boxed(Path(name))
        # From now on it loads nothing on its own account, as its feature tests do.
        running.wait_for("symbol index built")
        yield running
        assert running.stop() == 0


def two_connections(path: str) -> Callable[[Tell], None]:
    """A client that loads on one connection and attaches on another; tells the link."""

    def work(tell: Tell) -> None:
        first, second = Wire(path), Wire(path)
        program = first.ok("POST", "/programs", COUNT)["programs"][0]["id"]
        body = {"program": program, "kind": "kprobe", **ONE}
        tell([second.ok("POST", "/links", body), first.ok("GET", "/clients", None)["items"]])

    return work


@pytest.fixture
def boxed_rest(boxed: Boxed) -> Iterator[Rest]:
    rest = Rest(boxed.socket)
    yield rest
    rest.close()


@pytest.mark.multi
def test_clients_that_the_daemon_cannot_see(
    boxed: Boxed, boxed_rest: Rest, fork: Callable[..., Forked]
) -> None:
    """From pidfs on a process can be told from others though it has no number here."""
    others = in_kernel()
    first, second = (fork(two_connections(boxed.socket)) for _ in range(2))
    (link, listed), (link2, _) = first.told(), second.told()
    assert [each["pid"] for each in listed] == [0] * len(listed)
    clients = {each["id"]: each for each in boxed_rest.items("/clients")}
    # Two connections, one client; and the other process is another one of the same user.
    assert link["client"] != link2["client"]
    assert [clients[each["client"]]["links"] for each in (link, link2)] == [1, 1]
    assert [clients[each["client"]]["programs"] for each in (link, link2)] == [1, 1]
    assert len(clients) == 3
    boxed.mark()
    first.kill()
    boxed.wait_for("client gone", client=link["client"])
    eventually(lambda: [each["id"] for each in boxed_rest.items("/links")], [link2["id"]])
    eventually(lambda: in_kernel() - others, in_api(boxed_rest))
    second.kill()
    eventually(in_kernel, others)
    eventually(lambda: len(boxed_rest.items("/clients")), 1)
    assert boxed.bugs() == []


@pytest.mark.no_multi
def test_clients_that_nothing_tells_of(
    boxed: Boxed, boxed_rest: Rest, fork: Callable[..., Forked]
) -> None:
    """Before 6.5 nothing can be bound to such a process; a lease is as good as ever."""

    def work(tell: Tell) -> None:
        wire = Wire(boxed.socket)
        tell(wire.ask("POST", "/programs", COUNT))
        lifetime = {"kind": "lease", "lease": wire.ok("POST", "/leases", {"ttl": 600})["id"]}
        program = wire.ok("POST", "/programs", {**COUNT, "lifetime": lifetime})["programs"][0]["id"]
        body = {"program": program, "kind": "kprobe", **ONE, "lifetime": lifetime}
        tell([lifetime["lease"], wire.ok("POST", "/links", body)])

    others = in_kernel()
    made = fork(work)
    status, problem = made.told()
    assert (status, problem["kind"]) == (410, "gone")
    assert "PID namespace" in problem["detail"]
    lease, link = made.told()
    made.kill()
    assert [each["id"] for each in boxed_rest.items("/links")] == [link["id"]]
    assert len(kprobes()) == 1
    boxed_rest.ok("DELETE", f"/leases/{lease}")
    assert kprobes() == []
    eventually(in_kernel, others)
    assert boxed.bugs() == []


def as_pid(pid: int, start: Callable[[], Forked]) -> Forked:
    """Start a process that gets a number which a dead one had."""
    for _ in range(100):
        LAST_PID.write_text(str(pid - 1))
        made = start()
        if made.pid == pid:
            return made
        made.kill()
    raise AssertionError(f"no process got the number {pid} in a hundred tries")


def one_link(path: str) -> Callable[[Tell], None]:
    """A client that attaches to one function; tells the link."""

    def work(tell: Tell) -> None:
        wire = Wire(path)
        program = wire.ok("POST", "/programs", COUNT)["programs"][0]["id"]
        tell(wire.ok("POST", "/links", {"program": program, "kind": "kprobe", **ONE}))

    return work


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """What happens meanwhile the daemon learns all at once."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "at the same moment"])
def test_number_of_a_dead_client_used_again(
    noticed: bool,
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    fork: Callable[..., Forked],
) -> None:
    first = fork(one_link(daemon.socket))
    link: dict[str, Any] = first.told()

    def again() -> Forked:
        return as_pid(first.pid, lambda: fork(one_link(daemon.socket)))

    if noticed:
        first.kill()
        daemon.wait_for("client gone", pid=first.pid)
        second = again()
    else:
        with stopped(daemon):
            first.kill()
            second = again()
    link2 = second.told()
    assert link2["client"] != link["client"]
    eventually(lambda: [each["id"] for each in rest.items("/links")], [link2["id"]])
    assert rest("GET", f"/clients/{link['client']}")[0] == 404
    assert rest.ok("GET", f"/clients/{link2['client']}")["pid"] == first.pid
    assert len(exact().programs) == 1
    second.kill()


@pytest.mark.multi
def test_request_of_a_dead_process_whose_number_is_used_again(
    daemon: Daemon, exact: Callable[[], Holdings], fork: Callable[..., Forked]
) -> None:
    """From 6.5 on the socket itself tells who connected: what it asked for is nobody's."""

    def work(tell: Tell) -> None:
        wire = Wire(daemon.socket)
        body = {**COUNT, "source": {"kind": "builtin", "builtin": "count"}}
        tell("here")
        wire.ask("POST", "/programs", body)

    def bystander(tell: Tell) -> None:
        tell("here")

    with stopped(daemon):
        first = fork(work)
        first.told()
        # It is in recvmsg(2): its request is sent, and nobody has even accepted it.
        wait_for_call(first.pid, "unix_stream_read_generic")
        first.kill()
        second = as_pid(first.pid, lambda: fork(bystander))
    daemon.wait_for("audit", outcome="gone", pid=first.pid)
    assert exact() == Holdings()
    second.kill()
