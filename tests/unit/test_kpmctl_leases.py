"""``kpmctl``: leases, clients, and what ends with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kpmd.client.client import Client
from kpmd.kpmctl import failures
from kpmd.kpmctl.cli import _COMMANDS
from tests.unit.test_client import ELF, ROOT, always, http, problem, running_daemon, scripted
from tests.unit.test_client_lifetimes import slow_to_detach, until
from tests.unit.test_kpmctl import good, read_json, run

TIME = r"\d{4}-\d\d-\d\dT[\d:.]+Z"


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.fixture
def daemon(shared: str) -> Iterator[str]:
    yield shared
    with Client(shared) as client:
        for lease in client.leases():
            client.end_lease(lease["id"])
        for program in client.programs():
            client.delete_program(program["id"], force=True)


@pytest.fixture
def lease(daemon: str) -> str:
    return good(daemon, "lease", "create", "--ttl", "60", "--quiet").strip()


@pytest.fixture
def program(daemon: str) -> str:
    with Client(daemon) as client:
        made = client.load_object(ELF, programs=["count"], lifetime="persistent")
        return made["programs"][0]["id"]


# Leases


def test_make_list_renew_and_end(daemon: str) -> None:
    text = good(daemon, "lease", "create", "--ttl", "60", "--label", "for=ci", "--label", "job=a=b")
    id_ = text.partition(":")[0]
    renewal = rf"{id_}: until {TIME}, or longer with `kpmctl lease renew {id_}`.\n"
    assert re.fullmatch(renewal, text)
    shown = good(daemon, "leases")
    assert re.search(rf"\n{id_} +60 +{TIME} +0 +0 +\w+ +{TIME}  for=ci,job=a=b\n", shown)
    assert re.fullmatch(renewal, good(daemon, "lease", "renew", id_))
    assert read_json(daemon, "lease", "renew", id_, "--ttl", "7.5")["ttl"] == 7.5
    (found,) = read_json(daemon, "leases")["items"]
    assert (found["id"], found["ttl"], found["labels"]["job"]) == (id_, 7.5, "a=b")
    assert good(daemon, "lease", "end", id_) == ""
    assert good(daemon, "leases").splitlines()[1:] == []


def test_for_scripts(daemon: str) -> None:
    id_ = good(daemon, "lease", "create", "--ttl", "1.5", "--quiet")
    assert re.fullmatch(r"lse-\w+\n", id_)
    made = read_json(daemon, "lease", "create", "--ttl", "60", "--quiet")
    assert (made["ttl"], type(made["ttl"])) == (60, int)
    assert read_json(daemon, "lease", "end", made["id"], id_.strip()) == {
        "deleted": [made["id"], id_.strip()]
    }


def test_load_and_attach_until_a_lease_ends(daemon: str, lease: str) -> None:
    text = good(daemon, "load", "--builtin", "count", "--lease", lease)
    until_ = rf"until {TIME}, or longer with `kpmctl lease renew {lease}`\.\n$"
    assert re.search(rf"\nLeased: loaded {until_}", text)
    assert re.search(rf" {lease}  ", text)
    program = re.findall(r"prg-\w+", text)[0]
    text = good(daemon, "attach", program, "vfs_read", "--lease", lease)
    assert re.search(rf"\nLeased: attached {until_}", text)
    link = text.partition(":")[0]
    assert re.search(rf"{link} .* {lease}  attached  ", good(daemon, "links", "--lease", lease))
    assert re.search(rf"{lease} +60 +{TIME} +1 +\d ", good(daemon, "leases"))
    good(daemon, "lease", "end", lease)
    assert read_json(daemon, "links")["items"] == []
    assert read_json(daemon, "programs")["items"] == []


def test_what_a_lease_is_sent_as() -> None:
    seen: list[Any] = []

    def script(method: str, target: str, body: Any) -> bytes:
        seen.append((method, target, body))
        if target.startswith("/leases"):
            return http({"id": "lse-1", "expires_at": "x"})
        link = {"id": "lnk-1", "count": 1, "kind": "kprobe", "skipped": 0}
        return http({"programs": [], "maps": [], **link}, 201)

    with scripted(script) as server:
        good(server.path, "load", "-", "--lease", "lse-1", stdin=b"elf")
        good(server.path, "attach", "prg-1", "f", "--kind", "kprobe", "--lease", "lse-1")
    lifetime = {"kind": "lease", "lease": "lse-1"}
    assert [body["lifetime"] for method, _, body in seen if method == "POST"] == [lifetime] * 2


def test_a_lease_that_has_ended(daemon: str, program: str, lease: str) -> None:
    good(daemon, "lease", "end", lease)
    for arguments in (
        ["load", "--builtin", "count", "--lease", lease],
        ["attach", program, "vfs_read", "--lease", lease],
        ["attach", program, "vfs_read", "--lease", lease, "--dry-run"],
        ["lease", "renew", lease],
        ["lease", "end", lease],
    ):
        done = run(daemon, *arguments)
        assert done.exit_code == failures.REFUSED
        assert done.stderr.startswith(f"kpmctl: lease {lease} has been ended")
        assert done.stdout == ""
    assert read_json(daemon, "links", "--lease", lease)["items"] == []


def test_a_lease_that_there_never_was(daemon: str, program: str) -> None:
    for arguments in (
        ["load", "--builtin", "count", "--lease", "lse-0"],
        ["attach", program, "vfs_read", "--lease", "lse-0"],
        ["lease", "renew", "lse-0"],
    ):
        assert run(daemon, *arguments).exit_code == failures.NOT_FOUND


def test_ending_goes_on_behind_a_failure(daemon: str, lease: str) -> None:
    done = run(daemon, "lease", "end", "lse-0", lease, lease)
    assert done.exit_code == failures.NOT_FOUND
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()] == ["kpmctl:"] * 2
    assert good(daemon, "leases").splitlines()[1:] == []


def test_longer_than_the_daemon_lets_it_live(daemon: str) -> None:
    done = run(daemon, "lease", "create", "--ttl", "2592001")
    assert done.exit_code == failures.INVALID
    assert "ttl: " in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "lease",
        "lease list",
        "lease create",
        "lease create --ttl 0",
        "lease create --ttl nan",
        "lease create --ttl 60 --label a",
        "lease create --ttl 60 --label =a",
        "lease renew",
        "lease renew lnk-1",
        "lease renew lse-1 --ttl -1",
        "lease end",
        "lease end 1",
        "load --builtin count --lease prg-1",
        "attach prg-1 f --lease 1",
        "links --lease cli-1",
        "links --client lse-1",
        "release",
        "release lnk-1",
        "release lse",
        "clients cli-1",
    ],
)
def test_wrong_usage(arguments: str) -> None:
    done = run("/none", *arguments.split())
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_an_id_of_something_else_is_named() -> None:
    assert (
        "'lse-1' is not the id of a link (lnk-…) or a program (prg-…): it is that of a lease"
        in (run("/none", "detach", "lse-1").stderr)
    )
    assert run("/none", "release", "x-1").stderr.endswith("is not the id of a client (cli-…)\n")


# Clients


def test_clients_and_their_release(daemon: str) -> None:
    with Client(daemon) as client:
        program = client.load_builtin("count", lifetime="persistent")["programs"][0]["id"]
        link = client.attach(program, symbols=["vfs_read"], lifetime="persistent")
        client.create_lease(60)
    id_, many = link["client"], len(read_json(daemon, "programs")["items"])
    with open("/proc/self/comm", encoding="utf-8") as file:
        command = file.read().strip()
    assert re.search(
        rf"\n{id_} +{os.getpid()}  {command} +\S+ +1 +{many} +1  {TIME}\n", good(daemon, "clients")
    )
    assert id_ in [each["id"] for each in read_json(daemon, "clients")["items"]]
    assert link["id"] in good(daemon, "links", "--client", id_)
    assert read_json(daemon, "links", "--client", "cli-0")["items"] == []
    done = run(daemon, "--json", "release", "cli-0", id_)
    assert (done.exit_code, done.stdout) == (failures.NOT_FOUND, f'{{"released": ["{id_}"]}}\n')
    assert read_json(daemon, "links")["items"] == []
    assert read_json(daemon, "leases")["items"] == []
    with Client(daemon) as client:
        client.version()
        (id_,) = [each["id"] for each in client.clients() if each["pid"] == os.getpid()]
        assert good(daemon, "release", id_) == ""


def test_a_user_without_a_name() -> None:
    counts = dict.fromkeys(("links", "programs", "leases"), 0)
    who = {"id": "cli-1", "pid": 7, "uid": 4_000_000_000, "gid": 0, "command": "a\x1b b"}
    record = {**who, **counts, "since": "x"}
    with scripted(always(http({"items": [record], "next": None}))) as server:
        assert good(server.path, "clients").splitlines()[1] == (
            "cli-1     7  a\\x1b b  uid 4000000000      0         0       0  x"
        )


# Links


def test_a_link_that_is_detaching() -> None:
    with slow_to_detach() as (path, go_on), Client(path) as client:
        program = client.load_builtin("count")["programs"][0]["id"]
        with Client(path) as passing:
            link = passing.attach(program, symbols=["vfs_read"], lifetime="connection")["id"]
        until(lambda: client.link(link)["state"] == "detaching")
        ending = rf"{link} .* connection  detaching: connection-closed  "
        assert re.search(ending, good(path, "links"))
        assert re.search(ending, good(path, "link", link))
        (found,) = read_json(path, "links")["items"]
        assert (found["state"], found["reason"]) == ("detaching", "connection-closed")
        go_on()
        until(lambda: not list(client.links()))


# All of it


def test_help() -> None:
    for command in ("load", "attach"):
        text = " ".join(good("/none", command, "-h").split())
        assert "--lease LEASE_ID" in text
        assert "default: it is persistent" in text
    for arguments in (["lease"], ["lease", "create"], ["lease", "renew"], ["lease", "end"]):
        good("/none", *arguments, "-h")
    assert "kpmctl lease create --ttl 60 --quiet" in good("/none", "lease", "-h")
    text = good("/none", "-h")
    for command in _COMMANDS:
        assert f"\n  {command} " in text


@pytest.mark.parametrize("arguments", [["leases"], ["clients"], ["lease", "renew", "lse-1"]])
@pytest.mark.parametrize(("kind", "status"), [("gone", 8), ("shutting-down", 3), ("quota", 8)])
def test_statuses(arguments: list[str], kind: str, status: int) -> None:
    with scripted(always(problem(kind, 400))) as server:
        done = run(server.path, *arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.startswith(f"kpmctl: it is {kind}\n")


def test_a_commands_module_is_imported_alone() -> None:
    code = (
        "import sys\n"
        "from kpmd.kpmctl.cli import main\n"
        "main(['lease', '-h'], standalone_mode=False)\n"
        "print([n for n in ('rich', 'http.client') if n in sys.modules])\n"
        "print(sorted(n for n in sys.modules if n.startswith('kpmd.kpmctl.commands.')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy, modules = done.stdout.splitlines()[-2:]
    assert heavy == "[]"
    assert modules == "['kpmd.kpmctl.commands.leases', 'kpmd.kpmctl.commands.show']"
