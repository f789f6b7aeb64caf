"""What the policy lets each user do, and what they hear where it does not."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kpmd.core.globs import Glob
from kpmd.core.policy import (
    RIGHTS,
    Functions,
    Helpers,
    Key,
    Policy,
    Programs,
    Rule,
)
from kpmd.core.quotas import Limits
from kpmd.errors import Forbidden
from tests.fakes.kernel import FakeKernel
from tests.fakes.policies import EVERYTHING, OPEN
from tests.http.actor import NOBODY, Actor
from tests.http.conftest import Serve
from tests.http.samples import ELF, PERSISTENT, Gate, elf, instructions, link
from tests.http.serving import Client, Served

BUILTIN = {"source": {"kind": "builtin", "builtin": "count"}, "attach": "kprobe_multi"}
GROUP = 4711

Start = Callable[..., Awaitable[Actor]]


def rule(name: str = "watchers", **fields: Any) -> Rule:
    fields.setdefault("groups", frozenset({GROUP}))
    return Rule(name, Helpers(frozenset()), frozenset({"hash"}), **fields)


@pytest.fixture
async def member(serve: Serve, kernel: FakeKernel, actor: Start) -> Callable[..., Awaitable[Actor]]:
    """Makes a member of the group of a policy with the one rule that is described."""

    async def start(which: Rule, *, deny: str = "") -> Actor:
        served = await serve(kernel, policy=Policy((which,)), deny=deny)
        return await actor(NOBODY, served.path, groups=[GROUP])

    return start


async def refused(actor: Actor, method: str, path: str, body: object = None) -> dict[str, Any]:
    answer = await actor.request(method, path, body)
    assert (answer.status, answer.json["kind"]) == (403, "forbidden"), answer.body
    problem: dict[str, Any] = answer.json
    return problem


class TestWho:
    async def test_a_member_of_the_group_may_use_builtins(self, member: Start) -> None:
        user = await member(rule())
        program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
        made = await user.post("/links", link(program))
        assert (await user.get(f"/links/{made['id']}"))["count"] == 1

    async def test_own_programs_need_a_rule(self, member: Start) -> None:
        user = await member(rule())
        for body in (instructions(), elf()):
            problem = await refused(user, "POST", "/programs", body)
            assert problem["rule"] == "watchers"
            assert "watchers" in problem["detail"]

    async def test_whom_no_rule_fits_may_look_and_no_more(
        self, serve: Serve, kernel: FakeKernel, actor: Start
    ) -> None:
        served = await serve(kernel, policy=Policy((rule(),)))
        stranger = await actor(NOBODY, served.path)
        for path in ("/capabilities", "/healthz", "/version", "/openapi.json", "/policy"):
            await stranger.get(path)
        for path in ("/programs", "/links", "/maps", "/clients", "/leases"):
            assert [e for e in (await stranger.get(path))["items"] if e.get("uid") != NOBODY] == []
        for path, body in (
            ("/programs", BUILTIN),
            ("/links", link("prg-1")),
            ("/leases", {"ttl": 5}),
        ):
            problem = await refused(stranger, "POST", path, body)
            assert problem["rule"] == "no rule"
        await refused(stranger, "GET", "/symbols")
        await refused(stranger, "GET", "/events")
        assert not kernel.programs

    async def test_the_group_of_the_socket_s_peer_counts_not_the_database_s(
        self, serve: Serve, kernel: FakeKernel, actor: Start
    ) -> None:
        served = await serve(kernel, policy=Policy((rule(groups=frozenset({0})),)))
        # The user database has root in group 0; this process has given it up.
        await refused(await actor(NOBODY, served.path), "POST", "/programs", BUILTIN)

    async def test_an_administrators_group(
        self, serve: Serve, kernel: FakeKernel, actor: Start
    ) -> None:
        served = await serve(kernel, policy=Policy(admin_groups=frozenset({GROUP})))
        admin = await actor(NOBODY, served.path, groups=[GROUP])
        await admin.post("/programs", instructions())
        assert (await admin.get("/capabilities"))["policy"]["administrator"] is True
        await admin.get("/capabilities?refresh=true")

    @pytest.mark.parametrize("right", RIGHTS)
    async def test_each_call_needs_its_right(self, member: Start, right: str) -> None:
        user = await member(rule(rights=frozenset(RIGHTS) - {right}))
        program = "prg-none"
        if right != "load":
            program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
        each = {
            "load": ("POST", "/programs", BUILTIN),
            "attach": ("POST", "/links", link(program)),
            "maps": ("GET", "/maps/map-1/entries", None),
            "symbols": ("GET", "/symbols", None),
            "leases": ("POST", "/leases", {"ttl": 5}),
            "events": ("GET", "/events", None),
            "metrics": ("GET", "/metrics", None),
        }
        problem = await refused(user, *each[right])
        assert repr(right) in problem["detail"]


class TestPrograms:
    DIGEST = hashlib.sha256(base64.b64decode(ELF)).hexdigest()

    async def test_an_object_by_its_digest(self, member: Start) -> None:
        user = await member(rule(programs=Programs(sha256=frozenset({self.DIGEST}))))
        await user.post("/programs", elf())
        other = base64.b64encode(base64.b64decode(ELF) + b"!").decode()
        source = {"kind": "object", "elf": other}
        problem = await refused(user, "POST", "/programs", {"source": source})
        assert hashlib.sha256(base64.b64decode(other)).hexdigest() in problem["detail"]

    async def test_an_object_by_its_signature(self, member: Start) -> None:
        key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        keys = tuple(
            Key(name, each.public_key().public_bytes_raw())
            for name, each in (("spare", Ed25519PrivateKey.generate()), ("build", key))
        )
        user = await member(rule(programs=Programs(keys=keys)))
        content = base64.b64decode(ELF)

        def signed(by: Ed25519PrivateKey, what: bytes = content) -> dict[str, Any]:
            signature = base64.b64encode(by.sign(what)).decode()
            return {"source": {"kind": "object", "elf": ELF, "signature": signature}}

        await user.post("/programs", signed(key))
        for body in (elf(), signed(other), signed(key, content + b"!")):
            await refused(user, "POST", "/programs", body)
        short = {"source": {"kind": "object", "elf": ELF, "signature": "AAAA"}}
        await refused(user, "POST", "/programs", short)

    async def test_any(self, member: Start) -> None:
        user = await member(rule(programs=Programs(anything=True)))
        await user.post("/programs", elf())
        await user.post("/programs", instructions())

    async def test_no_builtins(self, member: Start) -> None:
        user = await member(rule(programs=Programs(builtin=False)))
        await refused(user, "POST", "/programs", BUILTIN)


class TestInstructions:
    """What the loader is told to let pass; that it does is for tests of the loader."""

    async def test_the_rule_s_helpers_and_maps(self, member: Start, kernel: FakeKernel) -> None:
        which = Rule(
            "watchers",
            Helpers(frozenset({"ktime_get_ns"}), read_kernel=True),
            frozenset({"hash"}),
            groups=frozenset({GROUP}),
            programs=Programs(anything=True),
            limits=Limits(map_bytes=2 << 20, load_seconds=3),
        )
        user = await member(which)
        await user.post("/programs", elf())
        await user.post("/programs", instructions())
        first, second = kernel.rights
        assert first is not None
        assert second is not None
        assert first.helpers == frozenset({"ktime_get_ns"})
        assert (first.read_kernel, first.read_user) == (True, False)
        assert first.kfuncs == frozenset()
        assert first.map_types == frozenset({"hash"})
        assert (first.map_bytes, first.seconds) == (2 << 20, 3)
        # What the first load holds is not there for the second.
        assert second.map_bytes < 2 << 20

    async def test_builtins_may_do_all_they_do(self, member: Start, kernel: FakeKernel) -> None:
        user = await member(rule(limits=Limits(map_bytes=1 << 30)))
        await user.post("/programs", BUILTIN)
        (rights,) = kernel.rights
        assert rights is not None
        assert rights.helpers is rights.kfuncs is rights.map_types is None
        assert rights.map_bytes == 1 << 30

    async def test_administrators_everything(self, client: Client, kernel: FakeKernel) -> None:
        await client.post("/programs", elf())
        assert kernel.rights == [None]

    async def test_a_refusal_of_the_loader_names_the_rule(
        self, member: Start, kernel: FakeKernel
    ) -> None:
        def refuse() -> None:
            raise Forbidden("program x calls bpf_send_signal", refused=["bpf_send_signal"])

        kernel.hooks["load_object"] = refuse
        user = await member(rule(programs=Programs(anything=True)))
        problem = await refused(user, "POST", "/programs", elf())
        assert problem["rule"] == "watchers"
        assert "'watchers'" in problem["detail"]
        assert problem["refused"] == ["bpf_send_signal"]


class TestFunctions:
    async def test_only_those_allowed(self, member: Start, kernel: FakeKernel) -> None:
        user = await member(rule(functions=Functions((Glob.parse("vfs_r*"),))), deny="vfs_open x")
        program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
        problem = await refused(user, "POST", "/links", link(program, symbols=["vfs_write"]))
        assert problem["symbols"] == ["vfs_write"]
        assert not kernel.links
        made = await user.post("/links", link(program, patterns=["vfs_*"]))
        targets = await user.get(f"/links/{made['id']}/targets")
        assert [each["symbol"] for each in targets["items"]] == ["vfs_read"]
        skipped = await user.get(f"/links/{made['id']}/skipped")
        assert {(e["symbol"], e["reason"]) for e in skipped["items"]} == {
            ("vfs_write", "forbidden"),
            ("vfs_open", "denied"),
        }

    async def test_the_deny_list_binds_users_by_name_too(self, member: Start) -> None:
        user = await member(rule(), deny="vfs_open it hurts")
        program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
        problem = await refused(user, "POST", "/links", link(program, symbols=["vfs_open"]))
        assert "it hurts" in problem["detail"]

    async def test_a_dry_run_tells_it(self, member: Start) -> None:
        user = await member(rule(functions=Functions((Glob.parse("vfs_r*"),))))
        program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
        body = link(program, symbols=["vfs_read", "vfs_open"], dry_run=True)
        answer = await user.request("POST", "/links", body)
        assert answer.status == 200
        assert answer.json["refusal"]["kind"] == "forbidden"
        assert answer.json["skipped"][0]["symbol"] == "vfs_open"


class TestOthers:
    async def test_a_reader_sees_all_and_touches_nothing(
        self, serve: Serve, kernel: FakeKernel, actor: Start
    ) -> None:
        served = await serve(kernel, policy=Policy((rule(reads_others=True),)))
        reader = await actor(NOBODY, served.path, groups=[GROUP])
        async with Client(served.path) as admin:
            program = (await admin.post("/programs", elf(lifetime=PERSISTENT)))["programs"][0]
            made = await admin.post("/links", link(program["id"], lifetime=PERSISTENT))
            lease = await admin.post("/leases", {"ttl": 50})
            mine = (await admin.get("/clients"))["items"][0]["id"]
            for path in (
                f"/programs/{program['id']}",
                f"/links/{made['id']}",
                f"/links/{made['id']}/targets",
                f"/maps/{program['maps'][0]}",
                f"/maps/{program['maps'][0]}/entries",
                f"/leases/{lease['id']}",
                f"/clients/{mine}",
            ):
                await reader.get(path)
            for path in ("/programs", "/links", "/maps", "/leases"):
                assert (await reader.get(path))["items"]
            for method, path, body in (
                ("DELETE", f"/programs/{program['id']}?force=true", None),
                ("DELETE", f"/links/{made['id']}", None),
                ("POST", "/links", link(program["id"])),
                ("POST", "/links", link(program["id"], dry_run=True)),
                ("PUT", f"/leases/{lease['id']}", {"ttl": 1}),
                ("DELETE", f"/leases/{lease['id']}", None),
                ("DELETE", f"/clients/{mine}", None),
            ):
                assert (await refused(reader, method, path, body))["rule"] == "watchers"
            bound = {"kind": "lease", "lease": lease["id"]}
            await refused(reader, "POST", "/programs", {**BUILTIN, "lifetime": bound})
            assert (await admin.get(f"/links/{made['id']}"))["state"] == "attached"

    async def test_others_do_not_even_see(self, served: Served, actor: Start) -> None:
        async with Client(served.path) as admin:
            program = (await admin.post("/programs", elf(lifetime=PERSISTENT)))["programs"][0]
            user = await actor(NOBODY)
            assert (await user.request("GET", f"/programs/{program['id']}")).status == 404


class TestCapabilities:
    async def test_it_shows_what_the_caller_may(self, member: Start) -> None:
        user = await member(
            rule(
                rights=frozenset({"load", "attach"}),
                functions=Functions((Glob.parse("nft_*[nf_tables]"),)),
                limits=Limits(links=3),
            )
        )
        found = await user.get("/capabilities")
        assert found["policy"] == {
            "administrator": False,
            "rule": "watchers",
            "calls": ["load", "attach"],
            "functions": {"allow": ["nft_*[nf_tables]"], "deny": [], "risky": False},
            "programs": {"any": False, "builtin": True, "sha256": [], "keys": []},
            "helpers": [],
            "probe_read_kernel": False,
            "probe_read_user": False,
            "kfuncs": [],
            "map_types": ["hash"],
            "read_others": False,
        }
        assert found["limits"]["links"] == 3

    async def test_each_caller_sees_its_own(
        self, serve: Serve, kernel: FakeKernel, actor: Start
    ) -> None:
        served = await serve(kernel, policy=Policy((rule(),)))
        user, stranger = (
            await actor(NOBODY, served.path, groups=[GROUP]),
            await actor(NOBODY, served.path),
        )
        async with Client(served.path) as admin:
            for _ in range(2):
                rules = [
                    (await each.get("/capabilities"))["policy"]["rule"]
                    for each in (user, stranger, admin)
                ]
                assert rules == ["watchers", None, None]

    async def test_usage_beside_the_limits(self, member: Start) -> None:
        user = await member(rule())
        program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
        await user.post("/links", link(program, symbols=["vfs_read", "vfs_open"]))
        found = await user.get("/policy")
        assert found["usage"]["links"] == 1
        assert found["usage"]["targets"] == 2
        assert GROUP in found["groups"]


class TestReload:
    @staticmethod
    async def reload(served: Served, made: Policy | ValueError) -> None:
        def read() -> Policy:
            if isinstance(made, ValueError):
                raise made
            return made

        served.state.policies._read = read
        await served.state.policies.renew(served.state.executor)

    async def test_a_new_policy_holds_for_open_connections_too(
        self, served: Served, actor: Start
    ) -> None:
        user = await actor(NOBODY)
        await user.post("/programs", instructions())
        await self.reload(served, Policy())
        await refused(user, "POST", "/programs", instructions())
        await self.reload(served, OPEN)
        await user.post("/programs", instructions())

    async def test_a_bad_one_leaves_the_old_one_in_force_and_that_is_told(
        self, served: Served, actor: Start, client: Client
    ) -> None:
        user = await actor(NOBODY)
        await self.reload(served, ValueError("policy.toml: line 3 is wrong"))
        await user.post("/programs", instructions())
        assert "line 3" in (await client.get("/healthz"))["warnings"][0]
        assert (await user.get("/healthz"))["warnings"] == []
        await self.reload(served, OPEN)
        assert (await client.get("/healthz"))["warnings"] == []

    async def test_who_lost_their_rule_can_still_let_go(self, served: Served, actor: Start) -> None:
        user = await actor(NOBODY)
        program = (await user.post("/programs", instructions()))["programs"][0]["id"]
        made = (await user.post("/links", link(program)))["id"]
        await self.reload(served, Policy())
        assert (await user.request("DELETE", f"/links/{made}")).status == 204
        assert (await user.request("DELETE", f"/programs/{program}")).status == 204
        assert (await user.get("/programs"))["items"] == (await user.get("/links"))["items"] == []

    async def test_an_answer_that_a_new_policy_overtakes_is_not_kept(
        self, serve: Serve, kernel: FakeKernel, actor: Start
    ) -> None:
        gate = Gate()
        kernel.hooks["test_feature"] = gate
        served = await serve(kernel, policy=Policy((rule("same", everyone=True),)))
        user = await actor(NOBODY, served.path)
        user.begin_request("GET", "/capabilities")
        await asyncio.to_thread(gate.entered.wait, 10)
        stricter = rule("same", everyone=True, rights=frozenset({"attach"}))
        await self.reload(served, Policy((stricter,)))
        gate.open()
        await user.result()
        assert (await user.get("/capabilities"))["policy"]["calls"] == ["attach"]

    async def test_whatever_is_wrong_with_a_new_one_the_old_one_stays(
        self, served: Served, client: Client
    ) -> None:
        def read() -> Policy:
            raise OSError("the user database does not answer")

        served.state.policies._read = read
        await served.state.policies.renew(served.state.executor)
        assert "does not answer" in (await client.get("/healthz"))["warnings"][0]
        await self.reload(served, OPEN)
        assert (await client.get("/healthz"))["warnings"] == []

    async def test_capabilities_follow(self, served: Served, actor: Start) -> None:
        user = await actor(NOBODY)
        assert (await user.get("/capabilities"))["policy"]["rule"] == EVERYTHING.name
        await self.reload(served, Policy((rule("everything", everyone=True),)))
        assert (await user.get("/capabilities"))["policy"]["programs"]["any"] is False


class TestExplain:
    async def test_beforehand(self, serve: Serve, kernel: FakeKernel) -> None:
        which = rule(
            groups=frozenset(),
            users=frozenset({NOBODY}),
            functions=Functions((Glob.parse("vfs_*"),), (Glob.parse("vfs_open"),)),
        )
        served = await serve(kernel, policy=Policy((which,)))
        async with Client(served.path) as admin:

            async def ask(**body: Any) -> Any:
                answer = await admin.request("POST", "/policy/explain", {"user": "nobody", **body})
                assert answer.status == 200, answer.body
                return answer.json

            found = await ask(patterns=["vfs_*"], source="builtin")
            assert (found["allowed"], found["rule"]) == (True, "watchers")
            assert [each["symbol"] for each in found["refused"]] == ["vfs_open"]
            assert found["functions"] == 2
            assert (await ask(patterns=["vfs_read"], source="builtin"))["allowed"]
            assert not (await ask(patterns=["vfs_read", "vfs_open"]))["allowed"]
            assert not (await ask(patterns=["vfs_*", "inet6_*"]))["allowed"]
            assert (await ask(patterns=["vfs_read", "no_such_*"]))["unmatched"] == ["no_such_*"]
            assert not (await ask(source="object", sha256="0" * 64))["allowed"]
            assert not (await ask(source="instructions"))["allowed"]
            assert (await ask(call="leases"))["allowed"]
            assert (await ask())["allowed"]
            root = await admin.request(
                "POST", "/policy/explain", {"user": 0, "source": "instructions"}
            )
            assert (root.json["allowed"], root.json["rule"]) == (True, "administrators")
            none = await admin.request("POST", "/policy/explain", {"user": 1, "call": "load"})
            assert (none.json["allowed"], none.json["rule"]) == (False, "no rule")

    async def test_only_administrators_ask_about_others(self, member: Start) -> None:
        user = await member(rule())
        assert (await user.request("POST", "/policy/explain", {"call": "load"})).status == 200
        for name in ("root", "no-such-user", 1):
            await refused(user, "POST", "/policy/explain", {"user": name})
            await refused(user, "GET", f"/policy?user={name}")

    async def test_unknown_users_and_bad_globs(self, client: Client) -> None:
        await client.refused(
            "POST", "/policy/explain", {"user": "no-such-user"}, status=404, kind="not-found"
        )
        await client.refused(
            "POST", "/policy/explain", {"patterns": ["a b c"]}, status=422, kind="invalid"
        )


async def test_a_refusal_costs_the_kernel_nothing(member: Start, kernel: FakeKernel) -> None:
    user = await member(rule(functions=Functions((Glob.parse("tcp_*"),))))
    program = (await user.post("/programs", BUILTIN))["programs"][0]["id"]
    before = kernel.calls.copy()
    await refused(user, "POST", "/programs", elf())
    await refused(user, "POST", "/links", link(program))
    made = [call for call in kernel.calls[len(before) :] if "load" in call or "create" in call]
    assert made == []
