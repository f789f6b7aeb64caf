"""``kpmctl``: what the policy says, shown and explained, and what it refuses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kpmd.client.client import Client
from kpmd.kpmctl import failures
from tests.unit.test_client import ELF, always, http, running_daemon, scripted
from tests.unit.test_client_policy import OWN, SIGNER, write_policy
from tests.unit.test_kpmctl import good, read_json, run

SOMEBODY = "nobody"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    policy = write_policy(tmp_path_factory.mktemp("policy"))
    with running_daemon("--policy", policy) as (path, _):
        yield path


@pytest.fixture
def daemon(shared: str) -> Iterator[str]:
    """A daemon whose policy is about us."""
    yield shared
    with Client(shared) as client:
        for program in client.programs():
            client.delete_program(program["id"], force=True)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon with the same policy, of which we are an administrator."""
    policy = write_policy(tmp_path_factory.mktemp("policy"), administrator=True)
    with running_daemon("--policy", policy) as (path, _):
        yield path


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    (tmp_path / "own.o").write_bytes(OWN)
    (tmp_path / "other.o").write_bytes(ELF)
    (tmp_path / "other.sig").write_bytes(SIGNER.sign(ELF))
    return tmp_path


def no(socket_: str, *arguments: str) -> str:
    done = run(socket_, *arguments)
    assert (done.exit_code, done.stderr) == (failures.FORBIDDEN, ""), done.output
    return done.stdout


# Shown


def test_show(daemon: str) -> None:
    text = good(daemon, "policy", "show")
    assert re.match(rf"user +\S+ \(uid {os.geteuid()}\), in groups \S+", text)
    assert "\nrule        some\n" in text
    assert "\ncalls       load, attach, maps, symbols\n" in text
    assert "\nfunctions   vfs_*, nf_*[nf_tables]\n            but not vfs_write, what is" in text
    assert "\nprograms    builtins; objects signed with build.pem; objects of the SHA-256" in text
    assert "\nreads       no memory by probe_read\nhelpers     " in text
    assert "\nkfuncs      none\nmap types   array, " in text
    assert "others " not in text
    assert re.search(r"\nLIMIT +USED +MOST\n", text)
    assert re.search(r"\nprograms +0 +2\n", text)
    assert re.search(r"\ntargets_per_link +- +131072\n", text)
    assert max(len(line) for line in text.splitlines()) <= 100
    good(daemon, "load", "--builtin", "count")
    assert re.search(r"\nprograms +2 +2\n", good(daemon, "policy", "show", str(os.geteuid())))
    assert read_json(daemon, "policy", "show")["usage"]["programs"] == 2


def test_show_of_others_is_for_administrators(daemon: str, ours: str) -> None:
    done = run(daemon, "policy", "show", SOMEBODY)
    assert (done.exit_code, done.stdout) == (failures.FORBIDDEN, "")
    assert done.stderr.startswith("kpmctl: only administrators may ask about other users\n")
    assert "\nrule        some\n" in good(ours, "policy", "show", SOMEBODY)
    text = good(ours, "policy", "show")
    assert "\nrule        none is needed: an administrator may do everything\n" in text
    assert re.search(r"\nprograms +\d+ +unlimited\n", text)
    assert run(ours, "policy", "show", "no such user").exit_code == failures.NOT_FOUND


def shown(policy: dict[str, Any], warnings: tuple[str, ...] = ()) -> tuple[str, str]:
    whole = {
        "administrator": False,
        "rule": "r",
        "calls": [],
        "functions": {"allow": [], "deny": [], "risky": True},
        "programs": {"any": False, "builtin": False, "sha256": [], "keys": []},
        "helpers": None,
        "probe_read_kernel": True,
        "probe_read_user": True,
        "kfuncs": None,
        "map_types": [],
        "read_others": False,
        **policy,
    }
    answers = {
        "/policy?user=ada": {
            "user": {"uid": 12345678, "user": None},
            "groups": [12345678],
            "policy": whole,
            "limits": {"links": None},
            "usage": {"links": 3},
        },
        "/healthz": {"status": "ok", "warnings": warnings},
    }
    with scripted(lambda method, target, body: http(answers[target])) as server:
        done = run(server.path, "policy", "show", "ada")
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_show_what_other_rules_say() -> None:
    text, _ = shown({"rule": None})
    assert text.startswith("user        uid 12345678 (uid 12345678), in groups 12345678\n")
    assert "rule        none is about this user, who may do nothing but look" in text
    assert "programs" not in text
    assert re.search(r"\nlinks +3 +unlimited\n", text)
    text, _ = shown({})
    assert "calls       none but to look" in text
    assert "\nfunctions   none\nprograms    none\n\n" in text
    programs = {"any": True, "builtin": True, "sha256": [], "keys": []}
    text, _ = shown({"programs": programs, "read_others": True, "rule": "x\x1b"})
    assert "\nprograms    any\nreads       the kernel's memory, the memory of the process" in text
    assert "\nhelpers     all\nkfuncs      all\nmap types   none\nothers      may see" in text
    assert "rule        x\\x1b\n" in text


def test_show_warns_administrators() -> None:
    _, told = shown({}, ("the policy before stays in force: x\x1b",))
    assert told == "kpmctl: warning: the policy before stays in force: x\\x1b\n"


def test_capabilities_tell_the_rule(daemon: str) -> None:
    text = good(daemon, "capabilities")
    assert "\npolicy    rule some (load, attach, maps, symbols); `kpmctl policy show` tells" in text


# Explained


def test_explain_calls(daemon: str, ours: str) -> None:
    me = re.escape(read_json(daemon, "policy", "show")["user"]["user"] or "uid")
    assert re.match(
        rf"{me}.*: yes, by rule some\n", good(daemon, "policy", "explain", "-", "--call", "load")
    )
    text = no(daemon, "policy", "explain", str(os.geteuid()), "--call", "events")
    assert re.match(r".*: no, by rule some\n  you may not listen to events: .*'some'", text)
    assert "yes, as an administrator\n" in good(ours, "policy", "explain", "-", "--call", "events")
    text = no(ours, "policy", "explain", SOMEBODY, "--call", "events")
    assert ": no, by rule some\n" in text
    text = good(daemon, "policy", "explain", "-")
    assert re.match(r".*: judged by rule some; `kpmctl policy show ", text)


def test_explain_of_others_is_for_administrators(daemon: str) -> None:
    done = run(daemon, "policy", "explain", SOMEBODY)
    assert (done.exit_code, done.stdout) == (failures.FORBIDDEN, "")
    assert "only administrators" in done.stderr


def test_explain_functions(daemon: str) -> None:
    text = good(daemon, "policy", "explain", "-", "vfs_read", "nf_*[nf_tables]")
    assert text.endswith("\n2 function(s) may be attached to, 0 not.\n")
    text = no(daemon, "policy", "explain", "-", "vfs_*", "vprintk")
    assert re.search(
        r"\nFUNCTION +MODULE +REASON\nvfs_write +- +is denied\nvprintk +- +is not among", text
    )
    assert "  vprintk is not among those allowed\n" in text
    assert text.endswith("\n2 function(s) may be attached to, 2 not.\n")
    text = good(daemon, "policy", "explain", "-", "vfs_*")
    assert "\n2 function(s) may be attached to, 1 not.\nA link by globs leaves out" in text
    done = run(daemon, "--json", "policy", "explain", "-", "vfs_write")
    assert done.exit_code == failures.FORBIDDEN
    assert '"refused_total": 1' in done.stdout


def test_explain_functions_that_do_not_exist(daemon: str) -> None:
    done = run(daemon, "policy", "explain", "-", "no_such_function")
    assert done.exit_code == failures.INVALID
    assert done.stdout.endswith("No function that can be traced matches no_such_function.\n")
    done = run(daemon, "policy", "explain", "-", "a[")
    assert (done.exit_code, done.stdout) == (failures.INVALID, "")


def test_explain_many_functions() -> None:
    answer = {
        "user": {"uid": 1, "user": "ada\x1b"},
        "rule": "no rule",
        "allowed": False,
        "reasons": ["no\x1b"],
        "functions": 0,
        "refused": [{"symbol": f"f{n}", "module": "m", "detail": "no"} for n in range(100)],
        "refused_total": 2000,
        "unmatched": [],
    }
    with scripted(always(http(answer))) as server:
        text = no(server.path, "policy", "explain", "ada", "*")
    lines = text.splitlines()
    assert lines[:3] == ["ada\\x1b: no, since no rule fits", "  no\\x1b", ""]
    assert lines[23:26] == ["f19       m       no", "… and 1980 more", ""]
    assert lines[26:] == ["0 function(s) may be attached to, 2000 not."]


def test_explain_programs(daemon: str, objects: Path) -> None:
    good(daemon, "policy", "explain", "-", "--builtin", "count", "vfs_read")
    done = run(daemon, "policy", "explain", "-", "--builtin", "nope")
    assert (done.exit_code, done.stdout) == (failures.INVALID, "")
    assert "there is no builtin 'nope'; there are count" in done.stderr
    assert ": yes, " in good(daemon, "policy", "explain", "-", "--object", str(objects / "own.o"))
    other = ["--object", str(objects / "other.o")]
    assert "objects of your own" in no(daemon, "policy", "explain", "-", *other)
    other += ["--signature", str(objects / "other.sig")]
    assert "The signature was not checked" in no(daemon, "policy", "explain", "-", *other)


def test_of_an_object_only_the_hash_is_sent(objects: Path) -> None:
    answer = {
        "user": {"uid": 1, "user": "ada"},
        "rule": "r",
        "allowed": True,
        "reasons": [],
        "functions": 0,
        "refused": [],
        "refused_total": 0,
        "unmatched": [],
    }
    with scripted(always(http(answer))) as server:
        good(server.path, "policy", "explain", "ada", "--object", str(objects / "own.o"))
        ((_, _, body),) = server.seen
    assert (body["user"], body["source"], len(body["sha256"])) == ("ada", "object", 64)
    assert set(body) == {"user", "call", "patterns", "source", "sha256"}


# Refused


def test_load_with_a_signature(daemon: str, objects: Path) -> None:
    path = str(objects / "other.o")
    good(daemon, "load", path, "--program", "count", "--signature", str(objects / "other.sig"))
    done = run(daemon, "load", path, "--program", "count")
    assert done.exit_code == failures.FORBIDDEN
    assert "rule 'some'" in done.stderr
    assert "\n  `kpmctl policy show` tells what the policy lets you do\n" in done.stderr


def test_refused_functions_are_named(daemon: str) -> None:
    program = read_json(daemon, "load", "--builtin", "count")["programs"][0]["id"]
    done = run(daemon, "attach", program, "vfs_read", "vfs_write", "vprintk")
    assert done.exit_code == failures.FORBIDDEN
    assert "\n  refused: vfs_write, vprintk\n" in done.stderr
    text = good(daemon, "attach", program, "vfs_*", "--dry-run")
    assert re.search(r"\nvfs_write +- +forbidden: is denied \(rule some\)\n", text)


def test_quota(daemon: str) -> None:
    good(daemon, "load", "--builtin", "count")
    done = run(daemon, "load", "--builtin", "count")
    assert done.exit_code == failures.REFUSED
    assert "you have 2 programs of 2" in done.stderr
    assert "\n  `kpmctl policy show` tells how much you may have" in done.stderr
