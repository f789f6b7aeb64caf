"""The client library: leases, clients, and what lifetimes mean for what it makes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kpmd.client.client import Client
from kpmd.client.errors import ApiError
from tests.unit.test_client import always, http, running_daemon, scripted, short_directory


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.fixture
def client(daemon: str) -> Iterator[Client]:
    with Client(daemon) as made:
        yield made
        for program in made.programs():
            made.delete_program(program["id"], force=True)
        for lease in made.leases():
            made.end_lease(lease["id"])


def refusal(call: Callable[..., object], *arguments: object, **more: object) -> tuple[str, int]:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **more)
    return caught.value.kind, caught.value.status


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def me(client: Client) -> str:
    (found,) = [each for each in client.clients() if each["pid"] == os.getpid()]
    return found["id"]


@contextlib.contextmanager
def slow_to_detach() -> Iterator[tuple[str, Callable[[], None]]]:
    """A daemon whose kernel detaches no link before the function was called."""
    with short_directory() as directory, socket.socket(socket.AF_UNIX) as control:
        control.bind(str(directory / "control"))
        control.listen()
        go_on = threading.Event()

        def let_pass() -> None:
            with contextlib.suppress(OSError):
                while True:
                    blocked, _ = control.accept()
                    go_on.wait(20)
                    blocked.close()

        thread = threading.Thread(target=let_pass)
        thread.start()
        try:
            with running_daemon("close_link", str(directory / "control")) as (path, _):
                yield path, go_on.set
        finally:
            go_on.set()
            control.shutdown(socket.SHUT_RDWR)
            thread.join()


# Leases


def test_the_life_of_a_lease(client: Client) -> None:
    lease = client.create_lease(60, {"for": "ci"})
    assert lease["id"].startswith("lse-")
    assert (lease["ttl"], lease["labels"]) == (60, {"for": "ci"})
    assert (lease["client"], lease["owner"]["uid"]) == (me(client), os.getuid())
    assert [each["id"] for each in client.leases()] == [lease["id"]]
    renewed = client.renew_lease(lease["id"])
    assert renewed["ttl"] == 60
    assert renewed["expires_at"] > lease["expires_at"]
    assert client.renew_lease(lease["id"], 7.5)["ttl"] == 7.5
    assert client.lease(lease["id"])["ttl"] == 7.5
    client.end_lease(lease["id"])
    assert list(client.leases()) == []
    for call in (client.lease, client.renew_lease, client.end_lease):
        assert refusal(call, lease["id"]) == ("gone", 410)


def test_what_is_bound_to_a_lease_ends_with_it(client: Client) -> None:
    lease = client.create_lease(60)["id"]
    program = client.load_builtin("count", lifetime=lease)["programs"][0]
    assert program["lifetime"] == {"kind": "lease", "lease": lease}
    link = client.attach(program["id"], symbols=["vfs_read"], lifetime=lease)
    assert link["lifetime"] == {"kind": "lease", "lease": lease}
    found = client.lease(lease)
    assert (found["links"], found["programs"]) == (1, len(list(client.programs())))
    assert [each["id"] for each in client.links(lease=lease)] == [link["id"]]
    client.end_lease(lease)
    assert list(client.links()) == []
    assert list(client.programs()) == []
    load = client.load_builtin
    assert refusal(load, "count", lifetime=lease) == ("gone", 410)


def test_a_lease_that_nobody_renews(client: Client) -> None:
    lease = client.create_lease(0.05)["id"]
    client.load_builtin("count", lifetime=lease)
    until(lambda: not list(client.programs()))
    assert refusal(client.renew_lease, lease) == ("gone", 410)


@pytest.mark.parametrize("id_", ["lse-", "lse-0", "../version", "a/b", "ä?x=y"])
def test_leases_and_clients_that_do_not_exist(client: Client, id_: str) -> None:
    for call in (client.lease, client.renew_lease, client.end_lease, client.client):
        assert refusal(call, id_) == ("not-found", 404)
    assert refusal(client.release_client, id_) == ("not-found", 404)


@pytest.mark.parametrize("lifetime", ["lease", "for ever", "", "prg-1"])
def test_lifetimes_that_do_not_exist(client: Client, lifetime: str) -> None:
    assert refusal(client.load_builtin, "count", lifetime=lifetime) == ("invalid", 422)
    assert refusal(client.load_builtin, "count", lifetime="lse-0") == ("not-found", 404)


@pytest.mark.parametrize("ttl", [0, -1, 1e9])
def test_times_that_no_lease_can_have(client: Client, ttl: float) -> None:
    assert refusal(client.create_lease, ttl) == ("invalid", 422)
    lease = client.create_lease(60)["id"]
    assert refusal(client.renew_lease, lease, ttl) == ("invalid", 422)


def test_bodies() -> None:
    with scripted(always(http({"programs": [], "maps": []}))) as server:
        with Client(server.path) as client:
            client.create_lease(60)
            client.create_lease(0.5, {"k": "v"})
            client.renew_lease("lse-1")
            client.renew_lease("lse-1", 9)
            client.end_lease("lse-1")
            client.release_client("cli-1")
            client.attach("prg-1", symbols=["f"], lifetime="lse-1")
            client.load_instructions(b"", lifetime="connection")
        assert server.seen[:6] == [
            ("POST", "/leases", {"ttl": 60, "labels": {}}),
            ("POST", "/leases", {"ttl": 0.5, "labels": {"k": "v"}}),
            ("PUT", "/leases/lse-1", None),
            ("PUT", "/leases/lse-1", {"ttl": 9}),
            ("DELETE", "/leases/lse-1", None),
            ("DELETE", "/clients/cli-1", None),
        ]
        assert [body["lifetime"] for _, _, body in server.seen[6:]] == [
            {"kind": "lease", "lease": "lse-1"},
            {"kind": "connection"},
        ]


# Connections and clients


def test_what_ends_with_the_connection(daemon: str, client: Client) -> None:
    with Client(daemon) as passing:
        program = passing.load_builtin("count", lifetime="connection")["programs"][0]
        assert program["lifetime"] == {"kind": "connection"}
        passing.attach(program["id"], symbols=["vfs_read"], lifetime="connection")
        kept = client.attach(program["id"], symbols=["vfs_open"])["id"]
        assert len(list(client.links(program=program["id"]))) == 2
    # Not the other client's, though it is of the same process; and what that needs stays.
    until(lambda: [each["id"] for each in client.links()] == [kept])
    assert client.program(program["id"])["id"] == program["id"]


def test_clients_and_what_they_hold(client: Client) -> None:
    program = client.load_builtin("count", lifetime="persistent")["programs"][0]
    link = client.attach(program["id"], symbols=["vfs_read"], lifetime="persistent")
    client.create_lease(60)
    found = client.client(me(client))
    assert (found["pid"], found["uid"], found["gid"]) == (os.getpid(), os.getuid(), os.getgid())
    assert (found["links"], found["leases"]) == (1, 1)
    assert found["id"] == link["client"] == program["client"]
    assert list(client.links(client=found["id"])) == list(client.links())
    assert list(client.links(client="cli-0")) == []
    client.release_client(found["id"])
    assert list(client.links()) == []
    assert list(client.programs()) == []
    assert list(client.leases()) == []
    assert client.client(found["id"])["links"] == 0


def test_filters_are_all_given() -> None:
    with scripted(always(http({"items": [], "next": None}))) as server:
        with Client(server.path) as client:
            list(client.links())
            list(client.links("prg-1", client="cli-1", lease="lse-1"))
        assert [target for _, target, _ in server.seen] == [
            "/links?limit=1000",
            "/links?limit=1000&program=prg-1&client=cli-1&lease=lse-1",
        ]


def test_a_link_that_is_detaching() -> None:
    with slow_to_detach() as (path, go_on), Client(path) as client:
        lease = client.create_lease(0.05)["id"]
        program = client.load_builtin("count")["programs"][0]["id"]
        link = client.attach(program, symbols=["vfs_read"], lifetime=lease)
        assert link["state"] == "attached"
        assert "reason" not in link
        found: Any = link
        while found["state"] == "attached":
            found = client.link(link["id"])
        assert (found["state"], found["reason"]) == ("detaching", "lease-expired")
        go_on()
        until(lambda: not list(client.links()))
