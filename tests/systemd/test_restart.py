"""What outlives the daemon: restarts, kills and stops under a real systemd."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from kpmd.bpf.tracefs import PATHS
from kpmd.core.model import new_id
from kpmd.runtime.handover import PLACES
from tests.kernel.conftest import bpftool_links, kallsyms
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, call_getpid
from tests.kernel.test_service import COUNT, counts
from tests.systemd.conftest import SOCKET, UNITS, Client, Kpmd
from tests.systemd.control import until

Lifetime = dict[str, str]
PERSISTENT: Lifetime = {"kind": "persistent"}


def make(rest: Rest, lifetime: Lifetime, link_lifetime: Lifetime | None = None) -> Any:
    """The builtin ``count`` on getpid(2): program and link."""
    program = rest.ok("POST", "/programs", {**COUNT, "lifetime": lifetime})["programs"][0]
    link = rest.ok(
        "POST",
        "/links",
        {
            "program": program["id"],
            "kind": "kprobe",
            "symbols": [GETPID],
            "lifetime": link_lifetime or lifetime,
            "labels": {"of": "the test"},
        },
    )
    return program, link


def lease(rest: Rest, ttl: float) -> Lifetime:
    return {"kind": "lease", "lease": rest.ok("POST", "/leases", {"ttl": ttl})["id"]}


def counted(rest: Rest, program: Any) -> int:
    return counts(rest, program).get(kallsyms()[GETPID], 0)


def again(rest: Rest) -> Rest:
    """A connection to the daemon that runs now."""
    rest.close()
    return Rest(SOCKET)


def nothing_is_stored(kpmd: Kpmd, rest: Rest) -> None:
    """Once this client has gone, too: it is kept as long as it is known."""
    rest.close()
    until(lambda: kpmd.service.stored == 0, "the FD store is empty")


def without_counts(record: Any) -> Any:
    """What stays the same of a record; what the kernel counts goes on."""
    return {name: value for name, value in record.items() if name != "missed"}


def restart(kpmd: Kpmd, how: str) -> None:
    """Have the daemon start anew; returns when it is ready."""
    before = kpmd.service.main_pid
    if how == "restart":
        kpmd.service.restart()
    else:
        kpmd.service.kill(how)
        kpmd.service.wait_until_active()
    assert kpmd.service.main_pid not in (0, before)


def still_there(rest: Rest, program: Any, link: Any, least: int) -> Rest:
    """A connection to the next daemon, which has the same program and link, and counts on."""
    # It was attached all the while: no new link of the kernel, and the old program.
    assert {each["id"] for each in bpftool_links()} == {link["kernel_id"]}
    rest = again(rest)
    before = counted(rest, program)
    assert before >= least
    call_getpid(10)
    assert counted(rest, program) >= before + 10
    assert without_counts(rest.ok("GET", f"/links/{link['id']}")) == without_counts(link)
    assert rest.ok("GET", f"/programs/{program['id']}") == {**program, "links": 1}
    assert rest.items(f"/links/{link['id']}/targets")[0]["symbol"] == GETPID
    return rest


def test_a_link_counts_on_over_a_restart_and_a_kill_of_the_daemon(kpmd: Kpmd, rest: Rest) -> None:
    """Nothing is lost of what it counts while the daemon is away."""
    program, link = make(rest, PERSISTENT)
    call_getpid(10)
    first = counted(rest, program)
    assert first >= 10
    restart(kpmd, "restart")
    rest = still_there(rest, program, link, first)
    kpmd.service.add_drop_in("slow", "[Service]\nRestartSec=3s\n")
    first = counted(rest, program)
    pid = kpmd.service.main_pid
    kpmd.service.kill()
    # Counted by the kernel between the daemon's death and its next start.
    assert kpmd.service.active == "activating"
    call_getpid(1000)
    kpmd.service.wait_until_active()
    assert kpmd.service.main_pid not in (0, pid)
    rest = still_there(rest, program, link, first + 1000)
    # And it ends as any other: at once, and with nothing of it left in the FD store.
    rest.ok("DELETE", f"/links/{link['id']}")
    assert bpftool_links() == []
    rest.ok("DELETE", f"/programs/{program['id']}")
    nothing_is_stored(kpmd, rest)


def test_each_lifetime_over_a_restart(
    kpmd: Kpmd, rest: Rest, client: Callable[[str], Client]
) -> None:
    alive, dies = client("inside"), client("inside")
    held = lease(rest, 600)
    over = lease(rest, 600)
    made = {
        "persistent": make(rest, PERSISTENT),
        "lease": make(rest, held),
        "expired": make(rest, PERSISTENT, over),
        "process": make(alive, {"kind": "process"}),
        "dead": make(dies, {"kind": "process"}),
        "connection": make(rest, PERSISTENT, {"kind": "connection"}),
    }
    kept = ("persistent", "lease", "process")
    owner = made["process"][1]["client"]
    assert alive.ok("GET", f"/clients/{owner}")["pid"] == alive.process.pid
    kpmd.service.add_drop_in("slow", "[Service]\nRestartSec=3s\n")
    rest.ok("PUT", f"/leases/{over['lease']}", {"ttl": 2})
    kpmd.service.kill()
    dies.close()
    kpmd.service.wait_until_active()
    rest = again(rest)
    kpmd.journal.wait_for("taken over", links=5, programs=6)
    until(lambda: len(rest.items("/links")) == len(kept), "the others are detached")
    found = {link["id"]: link for link in rest.items("/links")}
    assert set(found) == {made[name][1]["id"] for name in kept}
    assert {each["id"] for each in bpftool_links()} == {
        each["kernel_id"] for each in found.values()
    }
    for name in kept:
        _, link = made[name]
        assert without_counts(found[link["id"]]) == without_counts(link)
    # Programs of links that ended: persistent ones stay, the dead client's does not.
    programs = {program["id"] for program in rest.items("/programs")}
    assert programs == {program["id"] for name, (program, _) in made.items() if name != "dead"}
    # The process that lives is the same client as before, also when it connects anew.
    (listed,) = [each for each in rest.items("/clients") if each["id"] == owner]
    assert (listed["pid"], listed["links"]) == (alive.process.pid, 1)
    # The lease can be renewed, and ends what is bound to it.
    rest.ok("PUT", f"/leases/{held['lease']}")
    assert rest("PUT", f"/leases/{over['lease']}")[0] in (404, 410)
    rest.ok("DELETE", f"/leases/{held['lease']}")
    # The client's end is noticed by the daemon that did not see it begin.
    alive.close()
    until(lambda: len(rest.items("/links")) == 1, "the client's link is detached")
    assert [each["id"] for each in bpftool_links()] == [made["persistent"][1]["kernel_id"]]
    rest.close()


def test_many_links_end_in_the_background_after_a_restart(
    kpmd: Kpmd, rest: Rest, client: Callable[[str], Client]
) -> None:
    """A client that died while the daemon was away: others do not wait for its links."""
    other = client("inside")
    program, _ = make(other, {"kind": "process"})
    body = {"program": program["id"], "kind": "kprobe", "symbols": [GETPID]}
    for _ in range(40):
        other.ok("POST", "/links", body)
    kpmd.service.add_drop_in("slow", "[Service]\nRestartSec=2s\n")
    kpmd.service.kill()
    other.close()
    kpmd.service.wait_until_active()
    rest = again(rest)
    detaching = rest.items("/links")
    assert {(each["state"], each["reason"]) for each in detaching} == {("detaching", "client-gone")}
    own, link = make(rest, {"kind": "process"})
    rest.ok("DELETE", f"/links/{link['id']}")
    rest.ok("DELETE", f"/programs/{own['id']}")
    assert rest.items("/links"), "there were too few to tell"
    # A restart in the middle of it loses nothing, and takes no longer for it.
    restart(kpmd, "restart")
    rest = again(rest)
    until(lambda: rest.items("/links") == [] and bpftool_links() == [], "all are detached")
    nothing_is_stored(kpmd, rest)


def test_a_state_of_another_version_is_listed_and_can_be_deleted(kpmd: Kpmd, rest: Rest) -> None:
    """As after a downgrade: the older kpmd cannot read what the newer one stored."""
    program, link = make(rest, PERSISTENT)
    kpmd.expected.add("taken over without its state")
    kpmd.service.add_drop_in(
        "other",
        f"[Service]\nExecStart=\nExecStart={sys.executable} -c "
        "'import kpmd.core.carried; kpmd.core.carried.VERSION = 2; "
        "from kpmd.__main__ import main; main()'\n",
    )
    kpmd.service.restart()
    rest = again(rest)
    (found,) = rest.items("/links")
    # Of the ids nothing knows but the names in the FD store.
    assert (found["id"], found["kernel_id"], found["count"]) == (link["id"], link["kernel_id"], 1)
    assert found["owner"]["uid"] == 0
    assert "kpmd" in found["labels"]
    (loaded,) = rest.items("/programs")
    assert loaded["id"] == program["id"]
    assert (loaded["kernel_id"], loaded["links"]) == (program["kernel_id"], 1)
    assert counted(rest, loaded) >= 0
    rest.ok("DELETE", f"/programs/{loaded['id']}?force=true")
    assert bpftool_links() == []
    nothing_is_stored(kpmd, rest)


def test_a_full_store(kpmd: Kpmd, rest: Rest) -> None:
    """What must outlive the daemon is refused then; what lives as long as its client is made."""
    most = 8
    # The files that root opens for each start find room in a full store, too.
    room = most + PLACES
    kpmd.service.add_drop_in(
        "small",
        f"[Service]\nFileDescriptorStoreMax={room}\nEnvironment=KPMD_FDSTORE={room}\n",
    )
    assert rest.ok("GET", "/capabilities")["survives_restart"] is True
    _, link = make(rest, PERSISTENT)
    taken = 3  # program with its maps, link, and the client that made them
    assert kpmd.service.stored == taken
    for _ in range(most - taken):
        rest.ok("POST", "/leases", {"ttl": 600})
    for path, body in (("/leases", {"ttl": 600}), ("/programs", {**COUNT, "lifetime": PERSISTENT})):
        status, problem = rest("POST", path, body)
        assert (status, problem["kind"]) == (429, "quota")
    other, _ = make(rest, {"kind": "process"})
    rest.ok("DELETE", f"/programs/{other['id']}?force=true")
    assert kpmd.service.stored == most
    kpmd.service.restart()
    rest = again(rest)
    kpmd.journal.wait_for("taken over", links=1, leases=most - taken)
    assert rest.items(f"/symbols?pattern={GETPID}")
    rest.ok("DELETE", f"/clients/{link['client']}")
    assert bpftool_links() == []
    nothing_is_stored(kpmd, rest)


def test_the_names_of_all_that_is_stored_fit_into_one_variable() -> None:
    """LISTEN_FDNAMES: execve(2) takes 128 KiB at the most (MAX_ARG_STRLEN), or nothing starts.

    Handed over in full by hand once: 4,096 took the next daemon 4 s more to start, emulated.
    """
    unit = (UNITS / "kpmd.service").read_text(encoding="utf-8")
    (stored,) = re.findall(r"^FileDescriptorStoreMax=(\d+)$", unit, re.MULTILINE)
    (told,) = re.findall(r"^Environment=KPMD_FDSTORE=(\d+)$", unit, re.MULTILINE)
    assert told == stored
    kept = int(stored) - PLACES
    names = ":".join(["kpmd.socket", *(f"file-{name}" for name in PATHS), *[new_id("lnk")] * kept])
    assert len(f"LISTEN_FDNAMES={names}") < 128 << 10
