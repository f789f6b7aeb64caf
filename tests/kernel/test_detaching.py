"""A client with many links dies: nobody else waits for the kernel to take them apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.conftest import Daemon, bpftool_links, kernel_name
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID
from tests.kernel.test_service import raw
from tests.kernel.wire import Forked, Tell, Wire
from tests.kernel.witness import Holdings, eventually

# On 7.3 a link takes the kernel 8 ms: no time to look at anything.
pytestmark = [
    pytest.mark.multi,
    pytest.mark.skipif(kernel_name() != "6.12", reason="where a close takes the kernel 0.1 s"),
]

MANY = 60
EACH = 10


def holding(path: str, names: list[str]) -> Callable[[Tell], None]:
    """A client with many links; tells its program's id, and theirs."""

    def work(tell: Tell) -> None:
        wire = Wire(path)
        program = wire.ok("POST", "/programs", raw())["programs"][0]["id"]
        found = []
        for number in range(MANY):
            part = names[number * EACH : (number + 1) * EACH]
            body = {"program": program, "kind": "kprobe", "symbols": part}
            found.append(wire.ok("POST", "/links", body)["id"])
        tell([program, found])

    return work


@pytest.fixture(scope="module")
def names(traceable: list[tuple[int, str]]) -> list[str]:
    quiet = ("ext4_", "tcp_", "nfs", "vfs_", "xen", "acpi_", "pci_")
    return [name for _, name in traceable if name.startswith(quiet)][: MANY * EACH]


@pytest.fixture
def dying(
    names: list[str], daemon: Daemon, exact: Callable[[], Holdings], fork: Callable[..., Forked]
) -> Iterator[list[str]]:
    """Links of a client that has just been killed, as the daemon has noticed."""
    assert len(names) == MANY * EACH
    made = fork(holding(daemon.socket, names))
    program, ids = made.told()
    assert len(exact().links) == MANY
    daemon.mark()
    made.kill()
    gone = daemon.wait_for("client gone", pid=made.pid)
    assert gone["links"] == MANY
    yield ids
    daemon.wait_for("ended", what="program", id=program)
    assert exact() == Holdings()


def detaching(rest: Rest) -> set[str]:
    return {each["id"] for each in rest.items("/links") if each["state"] == "detaching"}


def test_other_clients_go_on(dying: list[str], rest: Rest) -> None:
    begun = time.monotonic()
    program = rest.ok("POST", "/programs", raw())["programs"][0]["id"]
    for _ in range(3):
        body = {"program": program, "kind": "kprobe", "symbols": [GETPID]}
        link = rest.ok("POST", "/links", body)
        assert rest.ok("GET", f"/links/{link['id']}")["state"] == "attached"
        assert link["kernel_id"] in {each["id"] for each in bpftool_links()}
        rest.ok("DELETE", f"/links/{link['id']}")
        # It did not only get into the queue: it is detached.
        assert link["kernel_id"] not in {each["id"] for each in bpftool_links()}
    own = time.monotonic() - begun
    left = detaching(rest)
    assert left < set(dying)
    assert len(left) > MANY // 2, f"only {len(left)} of {MANY} were left after {own:.1f} s"
    rest.ok("DELETE", f"/programs/{program}")


def test_deleted_before_their_turn_and_listed_until_the_kernel_has_let_go(
    dying: list[str], rest: Rest
) -> None:
    # DELETE overtakes the queue.
    *queued, own = dying
    last = rest.ok("GET", f"/links/{own}")
    assert last["state"] == "detaching"
    status, _ = rest("DELETE", f"/links/{own}")
    assert status == 204
    held = {each["id"] for each in bpftool_links()}
    assert last["kernel_id"] not in held
    assert len(held) > MANY // 2
    assert rest("GET", f"/links/{own}")[0] == 404
    listed = {each["id"]: each for each in rest.items("/links")}
    # In the order in which they were made.
    assert list(listed) == queued[-len(listed) :]
    assert {each["state"] for each in listed.values()} == {"detaching"}
    assert {each["reason"] for each in listed.values()} == {"client-gone"}
    held = {each["id"] for each in bpftool_links()}
    # What the kernel still has, the API listed a moment before.
    assert held <= {each["kernel_id"] for each in listed.values()}
    # Their program is there as long as one of them is.
    (program,) = rest.items("/programs")
    # One more may have gone between the two.
    assert program["links"] >= len(rest.items("/links")) > 0
    # DELETE of a program with ?force waits for all its links, though nobody else did.
    rest.ok("DELETE", f"/programs/{program['id']}?force=true")
    assert bpftool_links() == []
    eventually(lambda: rest.items("/programs"), [])
