"""GET /work while the kernel is busy: with functions one by one, and with its verifier."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.kernel.conftest import OBJECTS, Daemon
from tests.kernel.rest import Rest
from tests.kernel.test_service import raw

MANY = 150


@pytest.fixture
def other(daemon: Daemon) -> Iterator[Rest]:
    """A second connection, to look on while a call is under way on the first."""
    connection = Rest(daemon.socket)
    yield connection
    connection.close()


def watched(
    other: Rest, rest: Rest, method: str, path: str, body: object = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Make a call: its answer, and what was seen of it meanwhile."""
    seen: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(rest, method, path, body)
        while not call.done():
            seen += other.ok("GET", "/work")["items"]
    assert other.ok("GET", "/work")["items"] == []
    # All of it is about one piece of work.
    assert len({each["id"] for each in seen}) == 1
    _, answer = call.result()
    return answer, seen


@pytest.mark.no_multi
@pytest.mark.kprobes
def test_functions_one_by_one(rest: Rest, other: Rest, traceable: list[tuple[int, str]]) -> None:
    names = [name for _, name in traceable if name.startswith(("ext4_", "nfs", "xfs_", "tcp_"))]
    program = rest.ok("POST", "/programs", raw())["programs"][0]["id"]
    body = {"program": program, "kind": "kprobe", "symbols": names[:MANY]}
    link, seen = watched(other, rest, "POST", "/links", body)
    assert link["mechanism"] == "perf_event"
    counted(seen, "attach", "attaching")
    _, seen = watched(other, rest, "DELETE", f"/links/{link['id']}")
    assert {each["link"] for each in seen} == {link["id"]}
    counted(seen, "detach", "detaching")


def counted(seen: list[dict[str, Any]], what: str, phase: str) -> None:
    """Whether the functions were seen to become more, one after the other."""
    assert {each["what"] for each in seen} == {what}
    done = [each["done"] for each in seen if each["phase"] == phase and each["done"] is not None]
    assert done == sorted(done)
    assert len({each for each in done if 0 < each < MANY}) > 2
    assert {each["total"] for each in seen if each["phase"] == phase} == {MANY}


@pytest.mark.once
def test_the_verifier_at_work(rest: Rest, other: Rest) -> None:
    source = {
        "kind": "object",
        "elf": base64.b64encode((OBJECTS / "slow.bpf.o").read_bytes()).decode(),
        "programs": ["chatty"],
    }
    # Whether the verifier comes to its end within the time of a load is another matter.
    _, seen = watched(other, rest, "POST", "/programs", {"source": source})
    assert {each["what"] for each in seen} == {"load"}
    phases = list(dict.fromkeys((each["phase"], each["done"], each.get("name")) for each in seen))
    assert phases[-1] == ("verifying", 0, "chatty")
    assert {each["total"] for each in seen} == {1}
