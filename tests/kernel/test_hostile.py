"""Two users, one of them hostile: what it can do to the other, which is nothing.

How long the other's requests take meanwhile is for ``tests/bench/hostile.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import attacks
from tests.kernel.attacks import Attack
from tests.kernel.conftest import Daemon
from tests.kernel.wire import Forked, Tell, Wire, request

pytestmark = pytest.mark.once

HOSTILE, VICTIM = 4001, 4002

POLICY = f"""
[limits]
links = 8
targets = 100
connections = 40
requests = 4
leases = 3
[[rules]]
name = "builtins"
users = [{HOSTILE}, {VICTIM}]
"""

COUNT = {"source": {"kind": "builtin", "builtin": "count"}, "attach": "kprobe_multi"}
OBJECT = {"source": {"kind": "object", "elf": "f0VMRg=="}}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One of its own: with the policy that kpmd ships, and small limits."""
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        policy = folder / "policy.toml"
        policy.write_text(POLICY)
        running = Daemon(folder, "--mode", "0666", "--policy", str(policy))
        yield running
        assert running.stop() == 0


class Victim:
    """What the other user has, and whether it is still there."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._process = Forked(self._hold, VICTIM)
        self.ids: dict[str, str] = self._process.told()

    def _hold(self, tell: Tell) -> None:
        wire = Wire(self._socket)
        lease = wire.ok("POST", "/leases", {"ttl": 600})["id"]
        loaded = wire.ok("POST", "/programs", COUNT)
        program = loaded["programs"][0]["id"]
        body = {"program": program, "kind": "kprobe", "symbols": ["vfs_read"]}
        link = wire.ok("POST", "/links", body)
        tell(
            {
                "program": program,
                "map": loaded["maps"][0]["id"],
                "link": link["id"],
                "client": link["client"],
                "lease": lease,
            }
        )

    def still_counts(self) -> None:
        """Everything is there, and the link counts on."""
        ids, socket = self.ids, self._socket

        def look(tell: Tell) -> None:
            wire = Wire(socket)
            before = wire.ok("GET", f"/maps/{ids['map']}/entries")
            Path("/proc/self/stat").read_bytes()
            after = wire.ok("GET", f"/maps/{ids['map']}/entries")
            state = wire.ok("GET", f"/links/{ids['link']}")["state"]
            leases = [each["id"] for each in wire.ok("GET", "/leases")["items"]]
            tell([state, before != after, leases])

        looker = Forked(look, VICTIM)
        assert looker.told() == ["attached", True, [ids["lease"]]]
        looker.kill()

    def end(self) -> None:
        self._process.kill()


@pytest.fixture
def victim(daemon: Daemon) -> Iterator[Victim]:
    made = Victim(daemon.socket)
    try:
        yield made
        made.still_counts()
    finally:
        made.end()
        admin = Wire(daemon.socket)
        for each in admin.ok("GET", "/leases")["items"]:
            admin.ok("DELETE", f"/leases/{each['id']}")
        admin.close()


def as_hostile(daemon: Daemon, work: Any) -> Any:
    """What a hostile process tells."""
    socket = daemon.socket

    def run(tell: Tell) -> None:
        tell(work(Wire(socket)))

    process = Forked(run, HOSTILE)
    try:
        return process.told()
    finally:
        process.kill()


def test_what_is_another_s_looks_like_what_is_not_there(daemon: Daemon, victim: Victim) -> None:
    ids = victim.ids
    link = {"program": ids["program"], "kind": "kprobe", "symbols": ["vfs_write"]}
    bound = {**COUNT, "lifetime": {"kind": "lease", "lease": ids["lease"]}}
    attempts = [
        ("GET", f"/programs/{ids['program']}", None),
        ("DELETE", f"/programs/{ids['program']}?force=true", None),
        ("GET", f"/links/{ids['link']}", None),
        ("GET", f"/links/{ids['link']}/targets", None),
        ("GET", f"/links/{ids['link']}/skipped", None),
        ("DELETE", f"/links/{ids['link']}", None),
        ("PUT", f"/links/{ids['link']}/pin", None),
        ("GET", f"/maps/{ids['map']}", None),
        ("GET", f"/maps/{ids['map']}/entries", None),
        ("GET", f"/maps/{ids['map']}/entries/0000000000000000", None),
        ("GET", f"/clients/{ids['client']}", None),
        ("DELETE", f"/clients/{ids['client']}", None),
        ("GET", f"/leases/{ids['lease']}", None),
        ("PUT", f"/leases/{ids['lease']}", {"ttl": 1}),
        ("DELETE", f"/leases/{ids['lease']}", None),
        ("POST", "/links", link),
        ("POST", "/links", {**link, "dry_run": True}),
        ("POST", "/programs", bound),
    ]

    def strip(answer: tuple[int, Any], id_: str) -> tuple[int, str]:
        return answer[0], str(answer[1]).replace(id_, "ID")

    def work(wire: Wire) -> list[str]:
        told = []
        for method, path, body in attempts:
            real = next(id_ for id_ in ids.values() if id_ in f"{path} {body}")
            # One that was never given out, of the same form.
            guess = real[:4] + "0" * (len(real) - 4)
            there = strip(wire.ask(method, path, body), real)
            other = json.loads(json.dumps(body).replace(real, guess))
            not_there = strip(wire.ask(method, path.replace(real, guess), other), guess)
            if there != not_there or there[0] != 404:
                told.append(f"{method} {path}: {there} and {not_there}")
        for path in ("/programs", "/links", "/maps", "/leases"):
            if wire.ok("GET", path)["items"]:
                told.append(path)
        for path in (f"/links?program={ids['program']}", f"/links?client={ids['client']}"):
            if wire.ok("GET", path)["items"]:
                told.append(path)
        return told

    assert as_hostile(daemon, work) == []


def test_more_than_its_share_is_refused(daemon: Daemon, victim: Victim) -> None:
    def work(wire: Wire) -> dict[str, Any]:
        program = wire.ok("POST", "/programs", COUNT)["programs"][0]["id"]
        link = {"program": program, "kind": "kprobe"}
        many = [wire.ask("POST", "/links", {**link, "symbols": ["vfs_read"]}) for _ in range(10)]
        targets = wire.ask("POST", "/links", {**link, "patterns": ["*"], "dry_run": True})
        for _, made in many[:8]:
            wire.ok("DELETE", f"/links/{made['id']}")
        return {
            "links": [status for status, _ in many],
            "told": {name: many[9][1].get(name) for name in ("kind", "limit", "used", "most")},
            "targets": targets[1]["refusal"],
            "after": wire.ask("POST", "/links", {**link, "patterns": ["*"]})[1]["limit"],
            "leases": [wire.ask("POST", "/leases", {"ttl": 9})[0] for _ in range(4)],
            "own": [wire.ask("POST", "/programs", OBJECT)[1]["rule"] for _ in range(2)],
            "large": wire.ask("POST", "/links", {**link, "symbols": ["x" * 500] * 20_000})[0],
        }

    told = as_hostile(daemon, work)
    assert told["links"] == [201] * 8 + [429] * 2
    assert told["told"] == {"kind": "quota", "limit": "links", "used": 8, "most": 8}
    assert told["targets"]["kind"] == "quota"
    assert told["after"] == "targets"
    assert told["leases"] == [201] * 3 + [429]
    assert told["own"] == ["builtins"] * 2
    assert told["large"] == 413


def test_a_thousand_connections(daemon: Daemon, victim: Victim) -> None:
    socket = daemon.socket

    def work(first: Wire) -> list[int]:
        served = refused = 0
        kept = [first]
        for _ in range(1000):
            wire = Wire(socket)
            with contextlib.suppress(BrokenPipeError):  # it was refused before
                wire.send(request("GET", "/version"))
            status, content = wire.answer()
            if status == 200:
                served += 1
                kept.append(wire)
            else:
                assert (status, content["limit"]) == (429, "connections"), content
                refused += 1
                wire.close()
        return [served, refused]

    before = daemon.fds()
    assert as_hostile(daemon, work) == [39, 961]
    victim.still_counts()
    # What its process had open is closed with it, at both ends.
    rest = Wire(daemon.socket)
    while daemon.fds() > before + 1:
        rest.ok("GET", "/version")
    rest.close()


@pytest.mark.parametrize(
    "attack",
    [each for each in attacks.all_attacks() if each is not attacks.busy],
    ids=lambda attack: str(attack.__name__),
)
def test_under_attack_the_other_is_served_and_nothing_is_left(
    daemon: Daemon, victim: Victim, attack: Attack
) -> None:
    socket = daemon.socket
    before = daemon.fds()
    attacker = Forked(lambda tell: attack(socket), HOSTILE)

    def work(tell: Tell) -> None:
        wire = Wire(socket)
        program = wire.ok("POST", "/programs", COUNT)["programs"][0]["id"]
        for _ in range(3):
            wire.ok("GET", "/capabilities")
            body = {"program": program, "kind": "kprobe", "symbols": ["vfs_write"]}
            wire.ok("DELETE", f"/links/{wire.ok('POST', '/links', body)['id']}")
        tell("served")

    other = Forked(work, VICTIM)
    assert other.told() == "served"
    other.kill()
    attacker.kill()
    admin = Wire(socket)
    clients = {"HOSTILE"}
    while clients:  # each of its links takes its time
        found = admin.ok("GET", "/clients?limit=1000")["items"]
        clients = {each["id"] for each in found if each["uid"] == HOSTILE}
    mine = {each["owner"]["uid"] for each in admin.ok("GET", "/links?limit=1000")["items"]}
    assert HOSTILE not in mine
    assert admin.ok("GET", f"/policy?user={os.getuid()}")["policy"]["administrator"]
    while daemon.fds() > before + 1:
        admin.ok("GET", "/version")
    admin.close()
    assert not daemon.bugs(), daemon.bugs()


def test_bytes_of_a_request_that_never_ends_hold_up_nobody(daemon: Daemon, victim: Victim) -> None:
    wires = [Wire(daemon.socket) for _ in range(20)]
    for each in wires:
        each.send(request("POST", "/links", {"program": "x" * 5000})[:-10])
    victim.still_counts()
    for each in wires:
        each.close()
