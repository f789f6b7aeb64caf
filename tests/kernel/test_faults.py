"""Clients that die or hang up at every step: the kernel keeps exactly what the API lists."""

from __future__ import annotations

import base64
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel.conftest import OBJECTS, Daemon
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID
from tests.kernel.test_service import COUNT
from tests.kernel.wire import Forked, Tell, Wire, request
from tests.kernel.witness import Holdings, children, eventually, wait_for_call

pytestmark = pytest.mark.once

#: Attaching to so much (half of all) takes the kernel seconds: there is a middle to be killed in.
MUCH = {"patterns": [f"{letter}*" for letter in "abcdefghijklm"]}
ONE = {"symbols": [GETPID]}

#: Keeps the verifier busy for seconds; `slow0` would exceed the loader's ten in the VM.
SLOW = {
    "source": {
        "kind": "object",
        "elf": base64.b64encode((OBJECTS / "slow.bpf.o").read_bytes()).decode(),
        "programs": ["chatty"],
    }
}

STEPS = (
    "half a load",
    "loading",
    "loaded",
    "half an attach",
    "attaching",
    "attached, unread",
    "attached",
)
ATTACH = "bpf_kprobe_multi_link_attach"


def client(
    path: str, step: str, lifetime: dict[str, object], hold: dict[str, object] | None = None
) -> Callable[[Tell], None]:
    """A client that goes as far as ``step``, and hangs up when it gets SIGUSR1.

    ``hold``: the lifetime of its program, if it is another one.
    """

    def go(wire: Wire, tell: Tell) -> None:
        source = SLOW if step == "loading" else COUNT
        load = request("POST", "/programs", {**source, "lifetime": hold or lifetime})
        if step == "half a load":
            wire.send(load[:-20])
            return
        wire.send(load)
        if step == "loading":
            return
        program = wire.answer()[1]["programs"][0]["id"]
        if step == "loaded":
            tell(program)
            return
        targets = MUCH if step == "attaching" else ONE
        body = {"program": program, "kind": "kprobe", "lifetime": lifetime, **targets}
        attach = request("POST", "/links", body)
        wire.send(attach[:-20] if step == "half an attach" else attach)
        if step == "attached":
            tell(wire.answer()[1]["id"])

    def work(tell: Tell) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        wire = Wire(path)
        go(wire, tell)
        signal.sigwait([signal.SIGUSR1])
        wire.close()

    return work


def wait_for_step(step: str, made: Forked, daemon: Daemon, rest: Rest) -> None:
    """Return when the daemon is where ``step`` says."""
    if step in ("loaded", "attached"):
        made.told()
    elif step == "attached, unread":
        daemon.wait_for("link created", pid=made.pid)
    elif step == "attaching":
        wait_for_call(daemon.pid, ATTACH)
    elif step == "loading":
        (server,) = children(daemon.pid)
        eventually(lambda: len(children(server)), 1)
    else:
        eventually(lambda: made.pid in [each["pid"] for each in rest.items("/clients")], True)
        if step == "half an attach":
            daemon.wait_for("program loaded", pid=made.pid)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("lifetime", "end"),
    [
        ("process", signal.SIGKILL),
        ("connection", signal.SIGKILL),
        ("connection", signal.SIGUSR1),
    ],
    ids=["killed", "killed, bound to its connection", "hung up"],
)
def test_nothing_is_left_of_a_client(
    step: str,
    lifetime: str,
    end: signal.Signals,
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    fork: Callable[..., Forked],
) -> None:
    made = fork(client(daemon.socket, step, {"kind": lifetime}))
    wait_for_step(step, made, daemon, rest)
    if step in ("loaded", "attached", "attached, unread"):
        there = exact()
        assert (len(there.programs), len(there.links)) == (1, int(step != "loaded"))
    made.signal(end)
    if step in ("loading", "attaching"):
        # It was in the middle: what came of it had nobody any more to belong to.
        daemon.wait_for("audit", outcome="gone", pid=made.pid)


@pytest.mark.parametrize(
    ("step", "links"), [("loading", 0), ("attaching", 1), ("attached, unread", 1)]
)
def test_what_a_process_made_does_not_need_its_connection(
    step: str,
    links: int,
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    fork: Callable[..., Forked],
) -> None:
    """It hangs up before its answer, and lives on: what it asked for is made, and ends with it."""
    made = fork(client(daemon.socket, step, {"kind": "process"}))
    wait_for_step(step, made, daemon, rest)
    made.signal(signal.SIGUSR1)
    if step == "attaching":
        daemon.wait_for("link created", pid=made.pid)
    elif step == "loading":
        daemon.wait_for("program loaded", pid=made.pid)
    there = exact()
    assert (len(there.programs), len(there.links)) == (1, links)
    listed = {each["pid"]: each for each in rest.items("/clients")}
    assert listed[made.pid]["links"] == links
    made.kill()


def test_persistent_link_is_made_though_its_client_died_meanwhile(
    daemon: Daemon, rest: Rest, exact: Callable[[], Holdings], fork: Callable[..., Forked]
) -> None:
    made = fork(client(daemon.socket, "attaching", {"kind": "persistent"}))
    wait_for_step("attaching", made, daemon, rest)
    made.kill()
    link = daemon.wait_for("link created", pid=made.pid)
    there = exact()
    assert there.links == {link["kernel_id"]}
    # Its program is as persistent as it is, and goes only by hand.
    program = link["program"]
    rest.ok("DELETE", f"/links/{link['id']}")
    assert exact().links == set()
    rest.ok("DELETE", f"/programs/{program}")


def test_bodies_cut_in_the_middle(
    daemon: Daemon, rest: Rest, exact: Callable[[], Holdings], fork: Callable[..., Forked]
) -> None:
    """At every place of a body; the same process can then go on as if nothing had been."""
    load = request("POST", "/programs", COUNT)
    body = load.index(b"\r\n\r\n") + 4
    big = request("POST", "/programs", {**SLOW, "attach": "kprobe_multi"})

    def work(tell: Tell) -> None:
        for raw, end in [(load, at) for at in range(body, len(load))] + [(big, len(big) // 2)] * 5:
            wire = Wire(daemon.socket)
            wire.send(raw[:end])
            wire.close()
        wire = Wire(daemon.socket)
        tell(wire.ok("POST", "/programs", COUNT)["programs"][0]["kernel_id"])

    made = fork(work)
    program = made.told()
    assert exact().programs == {program}
    made.kill()


def leased(path: str) -> Callable[[Tell], None]:
    """A client that leaves a program and a link to a lease."""

    def work(tell: Tell) -> None:
        wire = Wire(path)
        lease = wire.ok("POST", "/leases", {"ttl": 600})["id"]
        lifetime = {"kind": "lease", "lease": lease}
        program = wire.ok("POST", "/programs", {**COUNT, "lifetime": lifetime})["programs"][0]["id"]
        body = {"program": program, "kind": "kprobe", "lifetime": lifetime, **ONE}
        tell([lease, wire.ok("POST", "/links", body)])

    return work


@pytest.mark.parametrize("how", ["expires", "is ended"])
def test_lease_outlives_its_client_and_takes_all_with_it(
    how: str,
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    fork: Callable[..., Forked],
) -> None:
    made = fork(leased(daemon.socket))
    lease, link = made.told()
    made.kill()
    daemon.wait_for("client gone", pid=made.pid)
    there = exact()
    assert there.links == {link["kernel_id"]}
    assert len(there.programs) == 1
    if how == "expires":
        rest.ok("PUT", f"/leases/{lease}", {"ttl": 0.1})
        daemon.wait_for("ended", what="link", id=link["id"], reason="lease-expired")
    else:
        rest.ok("DELETE", f"/leases/{lease}")
        # When it has answered, all that was bound to it is detached.
        assert exact() == Holdings()
        daemon.wait_for("ended", what="link", id=link["id"], reason="lease-ended")
    assert rest("GET", f"/leases/{lease}")[0] == 410


@pytest.mark.parametrize("how", ["expires", "is ended"])
def test_lease_ends_while_a_link_is_being_made_for_it(
    how: str,
    daemon: Daemon,
    rest: Rest,
    exact: Callable[[], Holdings],
    fork: Callable[..., Forked],
) -> None:
    """The attach is refused when it is done, and what it made is detached."""
    lease = rest.ok("POST", "/leases", {"ttl": 600})["id"]
    lifetime = {"kind": "lease", "lease": lease}
    work = client(daemon.socket, "attaching", lifetime, {"kind": "process"})
    made = fork(work, 0)
    wait_for_call(daemon.pid, ATTACH)
    if how == "expires":
        rest.ok("PUT", f"/leases/{lease}", {"ttl": 0.1})
    else:
        rest.ok("DELETE", f"/leases/{lease}")
    refused: dict[str, Any] = daemon.wait_for("audit", pid=made.pid, call="POST /links")
    assert refused["outcome"] == "gone"
    assert exact().links == set()
    made.kill()
