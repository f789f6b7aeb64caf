"""The service on a real kernel: clients without privileges attach, count, and die."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable

import pytest

from tests.kernel.conftest import OBJECTS, Daemon, Holder, bpftool_links
from tests.kernel.rest import Rest
from tests.kernel.test_links import GETPID, GETTID, call_getpid, call_gettid
from tests.kernel.witness import eventually

pytestmark = pytest.mark.multi

COUNT = {"source": {"kind": "builtin", "builtin": "count"}}
RETURN_ZERO = base64.b64encode(bytes.fromhex("b7000000000000009500000000000000")).decode()


def raw(**extra: object) -> dict[str, object]:
    return {
        "source": {
            "kind": "instructions",
            "instructions": RETURN_ZERO,
            "license": "GPL",
            "name": "zero",
        },
        "attach": "kprobe_multi",
        **extra,
    }


def counts(rest: Rest, program: dict[str, list[str]]) -> dict[int, int]:
    """Function address -> calls"""
    (map_,) = [id_ for id_ in program["maps"] if rest.ok("GET", f"/maps/{id_}")["name"] == "counts"]
    return {
        int.from_bytes(bytes.fromhex(entry["key"]), "little"): sum(
            int.from_bytes(bytes.fromhex(value), "little") for value in entry["value"]
        )
        for entry in rest.items(f"/maps/{map_}/entries")
    }


def test_thousand_functions_in_one_request_die_with_their_client(
    rest: Rest,
    daemon: Daemon,
    holder: Callable[..., Holder],
    traceable: list[tuple[int, str]],
    addresses: dict[str, int],
) -> None:
    names = [GETPID, *[name for _, name in traceable if name.startswith("sock")]]
    names += [name for _, name in traceable if name.startswith("ext4_")]
    names += [name for _, name in traceable if name.startswith("nfs")]
    names += [name for _, name in traceable if name.startswith("tcp_")]
    names += [name for _, name in traceable if name.startswith("xen")]
    names += [name for _, name in traceable if name not in names][: 1000 - len(names)]
    names = names[:1000]
    rest.ok("GET", "/healthz")
    before = daemon.fds()
    client = holder(
        [
            ["POST", "/programs", COUNT],
            ["POST", "/links", {"program": "$program", "kind": "kprobe", "symbols": names}],
        ]
    )
    (loaded_status, loaded), (status, link) = client.answers()
    assert loaded_status == 201, loaded
    assert status == 201, link
    assert link["count"] == 1000
    assert link["mechanism"] == "kprobe_multi"
    assert link["owner"]["user"] == "nobody"
    assert link["kernel_id"] in {each["id"] for each in bpftool_links()}

    program = loaded["programs"][0]
    call_getpid(50)
    assert counts(rest, program)[addresses[GETPID]] >= 50

    client.kill()
    daemon.wait_for("client gone", pid=client.process.pid)
    daemon.wait_for("ended", what="link", id=link["id"])
    assert bpftool_links() == []
    # Only then does the loop learn of it.
    daemon.wait_for("ended", what="program", id=program["id"])
    assert rest("GET", f"/links/{link['id']}")[0] == 404
    assert rest("GET", f"/programs/{program['id']}")[0] == 404
    assert rest.items("/maps") == []
    eventually(daemon.fds, before)


def test_cookies_by_name_and_by_address(rest: Rest, addresses: dict[str, int]) -> None:
    """The program reads the cookie of the function that ran, however the target was named."""
    elf = base64.b64encode((OBJECTS / "record.bpf.o").read_bytes()).decode()
    for targets in (
        {"symbols": [GETTID, GETPID]},
        {"addresses": [hex(addresses[GETTID]), addresses[GETPID]]},
        # What tracefs lists, and users copy from there: behind the ENDBR.
        {"addresses": [addresses[GETTID] + 4, addresses[GETPID] + 4]},
    ):
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
        program = loaded["programs"][0]
        link = rest.ok(
            "POST",
            "/links",
            {
                "program": program["id"],
                "kind": "kprobe",
                "cookies": ["18446744073709551615", 7],
                **targets,
            },
        )
        call_gettid(2)
        call_getpid(3)
        rest.ok("DELETE", f"/links/{link['id']}")
        call_gettid(2)
        (seen,) = [each["id"] for each in loaded["maps"] if each["name"] == "seen"]
        found = {
            int.from_bytes(bytes.fromhex(entry["key"]), "little"): (
                int.from_bytes(bytes.fromhex(entry["value"][:16]), "little"),
                int.from_bytes(bytes.fromhex(entry["value"][16:]), "little"),
            )
            for entry in rest.items(f"/maps/{seen}/entries")
        }
        assert found == {2**64 - 1: (addresses[GETTID], 2), 7: (addresses[GETPID], 3)}


def test_targets_page_in_the_order_of_the_request(rest: Rest, addresses: dict[str, int]) -> None:
    program = rest.ok("POST", "/programs", raw())["programs"][0]
    names = ["vprintk", "inet6_release", GETPID]
    link = rest.ok(
        "POST",
        "/links",
        {"program": program["id"], "kind": "kprobe", "symbols": names, "cookies": [3, 1, 2]},
    )
    assert rest.ok("GET", f"/links/{link['id']}")["count"] == 3
    assert rest.items(f"/links/{link['id']}/targets") == [
        {
            "symbol": name,
            "module": None,
            "address": f"0x{addresses[name]:016x}",
            "cookie": cookie,
        }
        for name, cookie in zip(names, ["3", "1", "2"], strict=True)
    ]


def test_delete_answers_once_detached(rest: Rest) -> None:
    program = rest.ok("POST", "/programs", COUNT)["programs"][0]
    link = rest.ok(
        "POST", "/links", {"program": program["id"], "kind": "kprobe", "symbols": [GETPID]}
    )
    rest.ok("DELETE", f"/links/{link['id']}")
    assert link["kernel_id"] not in {each["id"] for each in bpftool_links()}
    still = counts(rest, program)
    call_getpid(10)
    assert counts(rest, program) == still


def test_missing_symbols_are_named_with_the_reason(
    rest: Rest, addresses: dict[str, int], traceable: list[tuple[int, str]]
) -> None:
    listed = {name for _, name in traceable}
    hidden = next(
        name
        for name in (
            "bpf_get_current_pid_tgid",
            "do_idle",
            "rcu_read_lock",
            "asm_exc_page_fault",
            "memcpy",
        )
        if name in addresses and name not in listed
    )
    program = rest.ok("POST", "/programs", raw())["programs"][0]
    status, problem = rest(
        "POST",
        "/links",
        {"program": program["id"], "kind": "kprobe", "symbols": ["vprintk", "bogus_fn", hidden]},
    )
    assert (status, problem["kind"]) == (422, "symbol-not-found")
    assert problem["symbols"] == ["bogus_fn", hidden]
    assert problem["symbols_total"] == 2
    reasons = [error["msg"] for error in problem["errors"]]
    assert "does not exist" in reasons[0]
    assert "cannot trace" in reasons[1] or "blacklist" in reasons[1]
    assert bpftool_links() == []


@pytest.mark.parametrize("bad", [0, 1, 0x400000, "inside"])
def test_bad_address_is_named(rest: Rest, addresses: dict[str, int], bad: int | str) -> None:
    address = addresses["vprintk"] + 5 if bad == "inside" else int(bad)
    program = rest.ok("POST", "/programs", raw())["programs"][0]
    status, problem = rest(
        "POST",
        "/links",
        {
            "program": program["id"],
            "kind": "kprobe",
            "addresses": [addresses["inet6_release"], address],
        },
    )
    assert (status, problem["kind"]) == (422, "address-not-traceable")
    assert problem["addresses"] == [f"0x{address:016x}"]
    assert bpftool_links() == []


def test_alias_that_tracefs_does_not_list_attaches(
    rest: Rest, addresses: dict[str, int], traceable: list[tuple[int, str]]
) -> None:
    """The kernel itself takes any name of a traceable function; so does kpmd."""
    listed = {name for _, name in traceable}
    starts = {addresses[name] for name in listed if name in addresses}
    alias = next(
        name for name, address in addresses.items() if name not in listed and address in starts
    )
    program = rest.ok("POST", "/programs", raw())["programs"][0]
    link = rest.ok(
        "POST", "/links", {"program": program["id"], "kind": "kprobe", "symbols": [alias]}
    )
    (target,) = rest.items(f"/links/{link['id']}/targets")
    assert target["address"] == f"0x{addresses[alias]:016x}"


def test_rejected_program_has_the_verifiers_log(rest: Rest) -> None:
    body = raw()
    source = dict(body["source"])  # type: ignore[call-overload]
    source["instructions"] = base64.b64encode(bytes.fromhex("9500000000000000")).decode()
    status, problem = rest("POST", "/programs", {**body, "source": source})
    assert (status, problem["kind"]) == (422, "verifier-rejected")
    assert "R0 !read_ok" in problem["verifier_log"]


def test_users_see_nothing_of_each_other(
    rest: Rest, daemon: Daemon, holder: Callable[..., Holder]
) -> None:
    mine = rest.ok("POST", "/programs", raw())["programs"][0]
    client = holder(
        [
            ["GET", "/programs", None],
            ["GET", f"/programs/{mine['id']}", None],
            ["DELETE", f"/programs/{mine['id']}", None],
            ["POST", "/links", {"program": mine["id"], "kind": "kprobe", "symbols": ["vprintk"]}],
            ["GET", "/capabilities?refresh=true", None],
        ]
    )
    listed, got, deleted, linked, refreshed = client.answers()
    assert listed == [200, {"items": [], "next": None}]
    assert [got[0], deleted[0], linked[0]] == [404, 404, 404]
    assert refreshed[1]["kind"] == "forbidden"
    assert rest.ok("GET", f"/programs/{mine['id']}")["id"] == mine["id"]


def test_persistent_link_outlives_its_client(
    rest: Rest, daemon: Daemon, holder: Callable[..., Holder]
) -> None:
    client = holder(
        [
            ["POST", "/programs", raw()],
            [
                "POST",
                "/links",
                {
                    "program": "$program",
                    "kind": "kprobe",
                    "symbols": ["vprintk"],
                    "lifetime": {"kind": "persistent"},
                },
            ],
        ]
    )
    (_, loaded), (_, link) = client.answers()
    client.kill()
    daemon.wait_for("client gone", pid=client.process.pid)
    assert rest.ok("GET", f"/links/{link['id']}")["count"] == 1
    # The program's own life has ended with its client; the link keeps it.
    assert rest.ok("GET", f"/programs/{loaded['programs'][0]['id']}")["links"] == 1
    rest.ok("DELETE", f"/links/{link['id']}")
    assert rest("GET", f"/programs/{loaded['programs'][0]['id']}")[0] == 404
    assert bpftool_links() == []


def test_session_links(rest: Rest) -> None:
    body = {**raw(), "attach": "kprobe_session"}
    program = rest.ok("POST", "/programs", body)["programs"][0]
    link = rest.ok(
        "POST", "/links", {"program": program["id"], "kind": "session", "symbols": ["vprintk"]}
    )
    assert link["count"] == 1
    status, problem = rest(
        "POST", "/links", {"program": program["id"], "kind": "kprobe", "symbols": ["vprintk"]}
    )
    assert (status, problem["kind"]) == (422, "wrong-attach-type")
