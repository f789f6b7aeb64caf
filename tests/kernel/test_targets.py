"""Targets by glob, module and ambiguity on a real kernel, by whatever mechanism it has."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.conftest import (
    OBJECTS,
    Daemon,
    Holder,
    bpftool_links,
    expects_multi,
)
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, call_getpid, call_gettid
from tests.kernel.test_service import COUNT, counts, raw
from tests.kernel.wire import NOBODY

MECHANISM = "kprobe_multi" if expects_multi() else "perf_event"


@pytest.fixture
def zero(rest: Rest) -> str:
    """A program that returns 0."""
    program: str = rest.ok("POST", "/programs", raw())["programs"][0]["id"]
    return program


def link(program: str, **targets: object) -> dict[str, object]:
    return {"program": program, "kind": "kprobe", **targets}


def listed(pattern: str) -> list[str]:
    """Names of tracefs's list that begin with a prefix, those of modules left out."""
    with open("/sys/kernel/tracing/available_filter_functions", encoding="ascii") as file:
        return [line.split()[0] for line in file if line.startswith(pattern) and "[" not in line]


@pytest.fixture
def module() -> Iterator[str]:
    """A small module, loaded; unloaded again, which fails while anything holds it."""
    subprocess.run(["modprobe", "dummy"], check=True)
    yield "dummy"
    subprocess.run(["modprobe", "-r", "dummy"], check=True)


@pytest.mark.kprobes
def test_glob_attaches_to_what_tracefs_lists(rest: Rest, zero: str) -> None:
    names = listed("vfs_")
    made = rest.ok("POST", "/links", link(zero, patterns=["vfs_*"]))
    assert made["mechanism"] == MECHANISM
    targets = rest.items(f"/links/{made['id']}/targets")
    skipped = rest.items(f"/links/{made['id']}/skipped")
    assert {each["symbol"] for each in targets} | {each["symbol"] for each in skipped} == set(names)
    assert made["count"] == len(targets) == len({each["symbol"] for each in targets})
    assert made["skipped"] == len(skipped)
    rest.ok("DELETE", f"/links/{made['id']}")


@pytest.mark.multi
def test_everything_at_once_but_the_deny_list(rest: Rest, zero: str) -> None:
    made = rest.ok("POST", "/links", link(zero, patterns=["*"]))
    assert made["count"] > 30_000
    reasons = {each["reason"] for each in rest.items(f"/links/{made['id']}/skipped")}
    assert reasons == {"denied", "ambiguous"}
    (only,) = [each for each in bpftool_links() if each["id"] == made["kernel_id"]]
    assert only
    rest.ok("DELETE", f"/links/{made['id']}")
    assert bpftool_links() == []


@pytest.mark.kprobes
def test_dry_run_touches_nothing_and_tells_why(rest: Rest, zero: str) -> None:
    plan = rest.ok(
        "POST",
        "/links",
        link(zero, symbols=["vfs_read", "bogus_fn"], dry_run=True),
    )
    assert plan["attachable"] is False
    assert [each["symbol"] for each in plan["targets"]] == ["vfs_read"]
    assert [(each["symbol"], each["reason"]) for each in plan["skipped"]] == [
        ("bogus_fn", "unknown")
    ]
    assert rest.items("/links") == []
    assert bpftool_links() == []


@pytest.mark.kprobes
def test_what_the_plan_says_is_what_is_attached(rest: Rest, zero: str) -> None:
    request = link(zero, patterns=["sock_*", "inet6_*"], exclude=["*alloc*"])
    plan = rest.ok("POST", "/links", {**request, "dry_run": True})
    made = rest.ok("POST", "/links", request)
    assert plan["attachable"] is True
    assert rest.items(f"/links/{made['id']}/targets") == plan["targets"]
    assert not [each for each in plan["targets"] if "alloc" in each["symbol"]]


@pytest.mark.kprobes
def test_functions_of_a_module_as_soon_as_it_is_loaded(rest: Rest, zero: str, module: str) -> None:
    """The first request after modprobe has returned finds them, and they hold the module."""
    made = rest.ok("POST", "/links", link(zero, patterns=[f"*[{module}]"]))
    targets = rest.items(f"/links/{made['id']}/targets")
    assert {each["module"] for each in targets} == {module}
    assert len(targets) == made["count"] > 0
    if expects_multi():
        held = subprocess.run(["modprobe", "-r", module], capture_output=True, check=False)
        assert held.returncode != 0
    rest.ok("DELETE", f"/links/{made['id']}")
    by_name = rest.ok("POST", "/links", link(zero, symbols=[targets[0]["symbol"]]))
    (target,) = rest.items(f"/links/{by_name['id']}/targets")
    assert target["module"] == module
    rest.ok("DELETE", f"/links/{by_name['id']}")


@pytest.mark.kprobes
def test_functions_of_a_module_that_is_gone(rest: Rest, zero: str) -> None:
    subprocess.run(["modprobe", "dummy"], check=True)
    (name, *_) = [each["symbol"] for each in rest.items("/symbols?pattern=*[dummy]")]
    subprocess.run(["modprobe", "-r", "dummy"], check=True)
    status, problem = rest("POST", "/links", link(zero, patterns=["*[dummy]"]))
    assert (status, problem["kind"]) == (422, "symbol-not-found")
    status, problem = rest("POST", "/links", link(zero, symbols=[name]))
    assert (status, problem["kind"]) == (422, "symbol-not-found")


@pytest.mark.multi
def test_ambiguous_names(rest: Rest, zero: str) -> None:
    """`first` is the function that the kernel itself takes, asked by name."""
    name = next(
        each["symbol"]
        for each in rest.items("/symbols")
        if each["ambiguous"] and each["module"] is None
    )
    instances = rest.items(f"/symbols?pattern={name}")
    assert len(instances) > 1
    every = rest.ok("POST", "/links", link(zero, symbols=[name], on_ambiguous="all"))
    assert every["count"] == len(instances)
    first = rest.ok("POST", "/links", link(zero, symbols=[name]))
    (target,) = rest.items(f"/links/{first['id']}/targets")
    from kpmd.bpf import objects
    from kpmd.bpf.abi import AttachType
    from tests.kernel.test_links import RETURN_ZERO

    program, _ = objects.program_load(RETURN_ZERO, "zero", "GPL", AttachType.KPROBE_MULTI)
    with (
        program,
        objects.link_create(program, AttachType.KPROBE_MULTI, symbols=[name.encode()]) as made,
    ):
        ((address, _),) = objects.link_addresses(made, 1)
    assert int(target["address"], 16) == address
    status, problem = rest("POST", "/links", link(zero, symbols=[name], on_ambiguous="error"))
    assert (status, problem["kind"]) == (422, "invalid")


@pytest.mark.kprobes
def test_counts_exactly_by_glob(rest: Rest, addresses: dict[str, int]) -> None:
    elf = base64.b64encode((OBJECTS / "record.bpf.o").read_bytes()).decode()
    if not expects_multi():
        # record needs bpf_get_attach_cookie (5.15); count does for what 5.10 has.
        program = rest.ok(
            "POST",
            "/programs",
            {"source": {**COUNT["source"], "globals": {"target_pid": os.getpid()}}},
        )["programs"][0]
        made = rest.ok("POST", "/links", link(program["id"], patterns=["__x64_sys_getp?d"]))
        call_getpid(7)
        assert counts(rest, program)[addresses[GETPID]] == 7
        rest.ok("DELETE", f"/links/{made['id']}")
        return
    loaded = rest.ok(
        "POST",
        "/programs",
        {
            "source": {
                "kind": "object",
                "elf": elf,
                "programs": ["on_entry"],
                "globals": {"target_pid": os.getpid()},
            }
        },
    )
    made = rest.ok(
        "POST", "/links", link(loaded["programs"][0]["id"], patterns=[GETPID, "__x64_sys_gett?d"])
    )
    call_getpid(3)
    call_gettid(4)
    rest.ok("DELETE", f"/links/{made['id']}")
    (seen,) = [each["id"] for each in loaded["maps"] if each["name"] == "seen"]
    (entry,) = rest.items(f"/maps/{seen}/entries")
    assert int.from_bytes(bytes.fromhex(entry["value"][16:]), "little") == 7


@pytest.mark.kprobes
def test_kpmctl_counts_by_glob_as_nobody(daemon: Daemon) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kpmd.kpmctl",
            "--socket",
            daemon.socket,
            "--json",
            "count",
            "--duration",
            "1",
            "vfs_*",
        ],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["last"] is True
    assert last["attached"] > 20
    assert any(each["symbol"] == "vfs_read" for each in last["functions"])


@pytest.mark.no_multi
@pytest.mark.kprobes
def test_one_by_one_where_there_is_no_multi(
    rest: Rest, daemon: Daemon, holder: Callable[..., Holder], zero: str
) -> None:
    before = daemon.fds()
    client = holder(
        [
            ["POST", "/programs", raw()],
            ["POST", "/links", link("$program", patterns=["vfs_*"])],
            ["POST", "/links", link("$program", symbols=["vfs_read"], mechanism="kprobe_multi")],
        ]
    )
    _, (status, made), (insisted, problem) = client.answers()
    assert status == 201, made
    assert made["mechanism"] == "perf_event"
    assert (insisted, problem["kind"]) == (501, "not-supported")
    assert "5.18" in problem["needs"]
    client.kill()
    daemon.wait_for("ended", what="link", id=made["id"])
    daemon.wait_for("ended", what="program")
    assert daemon.fds() == before


@pytest.mark.no_multi
@pytest.mark.kprobes
def test_half_a_failure_one_by_one_undoes_the_rest(
    rest: Rest, daemon: Daemon, addresses: dict[str, int], zero: str
) -> None:
    before = daemon.fds()
    status, problem = rest(
        "POST",
        "/links",
        link(zero, addresses=[addresses["vfs_read"], addresses["vfs_write"], 0x1000]),
    )
    assert (status, problem["kind"]) == (422, "address-not-traceable"), problem
    assert daemon.fds() == before
