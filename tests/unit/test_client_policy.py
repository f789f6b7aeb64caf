"""The client library under a policy: what it may do, what it is refused, and with which words."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kpmd.client import answers
from kpmd.client.client import Client
from kpmd.client.errors import ApiError
from kpmd.client.net import Blocking
from tests.unit.test_client import (
    ELF,
    always,
    http,
    problem,
    running_daemon,
    scripted,
    short_directory,
)

SIGNER = Ed25519PrivateKey.generate()
OWN = b"\x7fELF" + b"\1" * 60

#: Some functions, some objects, and few of them.
POLICY = """
[[rules]]
name = "some"
users = ["*"]
calls = ["load", "attach", "maps", "symbols"]
functions.allow = ["vfs_*", "nf_*[nf_tables]"]
functions.deny = ["vfs_write"]
programs.sha256 = ["{sha256}"]
programs.keys = ["{key}"]
limits.programs = 2

[administrators]
groups = {administrators}
"""


def write_policy(folder: Path, *, administrator: bool = False) -> str:
    """A policy that is about whoever runs this, or of which they are an administrator."""
    key = folder / "build.pem"
    key.write_bytes(
        SIGNER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    path = folder / "policy.toml"
    path.write_text(
        POLICY.format(
            sha256=hashlib.sha256(OWN).hexdigest(),
            key=key,
            administrators=[os.getgid()] if administrator else [],
        )
    )
    for each in (key, path):
        each.chmod(0o644)
    return str(path)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    policy = write_policy(tmp_path_factory.mktemp("policy"))
    with running_daemon("--policy", policy) as (path, _):
        yield path


@pytest.fixture
def client(daemon: str) -> Iterator[Client]:
    with Client(daemon) as made:
        yield made
        for program in made.programs():
            made.delete_program(program["id"], force=True)


def refused(error: pytest.ExceptionInfo[ApiError]) -> dict[str, Any]:
    assert (error.value.kind, error.value.status) == ("forbidden", 403)
    return error.value.problem


def test_what_one_may_do(client: Client) -> None:
    found = client.policy()
    policy = found["policy"]
    assert found["user"]["uid"] == os.geteuid()
    assert (policy["administrator"], policy["rule"]) == (False, "some")
    assert policy["calls"] == ["load", "attach", "maps", "symbols"]
    assert policy["functions"] == {
        "allow": ["vfs_*", "nf_*[nf_tables]"],
        "deny": ["vfs_write"],
        "risky": False,
    }
    assert policy["programs"]["keys"] == ["build.pem"]
    assert found["limits"]["programs"] == 2
    assert found["usage"]["programs"] == 0
    assert client.capabilities()["policy"] == policy
    client.load_builtin("count")
    assert client.policy(os.geteuid())["usage"]["programs"] == 2
    assert client.health() == {"status": "ok", "warnings": []}


def test_others_are_not_ones_own_business(client: Client) -> None:
    for user in (os.geteuid() + 1, "no such user"):
        with pytest.raises(ApiError) as error:
            client.policy(user)
        assert refused(error)["rule"] == "some"
        with pytest.raises(ApiError) as error:
            client.explain(user)
        assert refused(error)["rule"] == "some"


def test_explained_beforehand(client: Client) -> None:
    assert client.explain(call="load")["allowed"] is True
    found = client.explain(call="events")
    assert (found["rule"], found["allowed"], len(found["reasons"])) == ("some", False, 1)
    found = client.explain(patterns=["vfs_*", "nf_hook"])
    assert (found["allowed"], found["functions"], found["refused_total"]) == (True, 3, 1)
    assert found["refused"] == [{"symbol": "vfs_write", "module": None, "detail": "is denied"}]
    assert client.explain(source="builtin", patterns=["vfs_read"])["allowed"] is True
    for content, allowed in ((OWN, True), (ELF, False)):
        digest = hashlib.sha256(content).hexdigest()
        assert client.explain(source="object", sha256=digest)["allowed"] is allowed
    with pytest.raises(ApiError) as error:
        client.explain(patterns=["a["])
    assert error.value.kind == "invalid"


def test_objects_by_their_hash_or_signature(client: Client) -> None:
    client.load_object(OWN, programs=["count"])
    client.load_object(ELF, programs=["count"], signature=SIGNER.sign(ELF))
    for signature in (None, b"", SIGNER.sign(OWN)):
        with pytest.raises(ApiError) as error:
            client.load_object(ELF, programs=["count"], signature=signature)
        assert refused(error)["rule"] == "some"


def test_functions_that_are_refused(client: Client) -> None:
    program = client.load_builtin("count")["programs"][0]["id"]
    with pytest.raises(ApiError) as error:
        client.attach(program, symbols=["vfs_read", "vfs_write", "vprintk"])
    assert refused(error)["symbols"] == ["vfs_write", "vprintk"]
    assert refused(error)["symbols_total"] == 2
    link = client.attach(program, patterns=["vfs_*"])
    (skipped,) = client.skipped(link["id"])
    assert (skipped["symbol"], skipped["reason"]) == ("vfs_write", "forbidden")


def test_quota(client: Client) -> None:
    client.load_builtin("count")
    with pytest.raises(ApiError) as error:
        client.load_builtin("count")
    assert (error.value.kind, error.value.status) == ("quota", 429)
    told = error.value.problem
    assert (told["limit"], told["used"], told["most"]) == ("programs", 2, 2)


def test_what_is_sent() -> None:
    with scripted(always(http({}))) as server, Client(server.path) as client:
        client.policy("a b&c")
        client.policy(0)
        client.explain()
        client.explain("ada", "load", ("f",), "object", "00")
        seen = server.seen
    assert [each[1] for each in seen[:2]] == ["/policy?user=a+b%26c", "/policy?user=0"]
    nothing: dict[str, object] = {
        "user": None,
        "call": None,
        "patterns": [],
        "source": None,
        "sha256": None,
    }
    assert seen[2] == ("POST", "/policy/explain", nothing)
    everything = dict(zip(nothing, ("ada", "load", ["f"], "object", "00"), strict=True))
    assert seen[3] == ("POST", "/policy/explain", everything)


@pytest.mark.parametrize("call", ["version", "load", "events"])
def test_one_connection_too_many(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon says so, and closes, before it has read anything."""
    calls = {
        "version": lambda client: client.version(),
        "load": lambda client: client.load_object(bytes(1 << 20)),
        "events": lambda client: client.events(),
    }
    with short_directory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        connect = Blocking.connect

        async def connect_and_be_refused(self: Blocking, sock: socket.socket, *more: Any) -> None:
            await connect(self, sock, *more)
            refused, _ = listener.accept()
            with refused:
                refused.sendall(problem("quota", 429, limit="connections"))

        monkeypatch.setattr(Blocking, "connect", connect_and_be_refused)
        with Client(str(folder / "s")) as client, pytest.raises(ApiError) as error:
            calls[call](client)
    assert (error.value.kind, error.value.problem["limit"]) == ("quota", "connections")


def test_the_shapes_are_those_of_the_contract(client: Client) -> None:
    schemas = client.call("GET", "/openapi.json")["components"]["schemas"]
    for ours, name in (
        (answers.Policy, "PolicyAnswer"),
        (answers.FunctionsAllowed, "FunctionsAnswer"),
        (answers.ProgramsAllowed, "ProgramsAllowedAnswer"),
        (answers.UserPolicy, "UserPolicyAnswer"),
        (answers.Explanation, "ExplainAnswer"),
        (answers.RefusedFunction, "RefusedFunctionAnswer"),
        (answers.Capabilities, "CapabilitiesAnswer"),
        (answers.Health, "HealthAnswer"),
    ):
        assert set(ours.__annotations__) == set(schemas[name]["properties"]), name
