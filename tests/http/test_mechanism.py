"""How a link is made: in one piece or several, by kprobe multi or one by one, or tried again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kpmd.bpf.features import Answer as FeatureAnswer
from kpmd.bpf.perf import PerfAttachError
from tests.fakes.kernel import ADDED, FUNCTIONS, MODULES, FakeKernel, symbol_files
from tests.http.actor import Actor
from tests.http.samples import ELF, PERSISTENT, Gate, a_link, a_program, link
from tests.http.serving import Client, Served, until
from tests.http.test_patterns import collect

Serve = Callable[..., Awaitable[Served]]
Actors = Callable[..., Awaitable[Actor]]

NO = FeatureAnswer(False, "no CONFIG_FPROBE")


def without_multi(kernel: FakeKernel, **others: FeatureAnswer) -> None:
    """A kernel that has kprobes one by one only."""
    kernel.answers.update({"bpf_link_kprobe_multi": NO, "bpf_link_kprobe_session": NO, **others})


# Kprobes one by one


@pytest.mark.parametrize("kind", ["kprobe", "kretprobe"])
async def test_kprobes_one_by_one_where_there_is_no_kprobe_multi(
    client: Client, kernel: FakeKernel, kind: str
) -> None:
    without_multi(kernel)
    body = link(
        await a_program(client), kind=kind, symbols=["vfs_write", "nf_hook"], cookies=[1, 2]
    )
    made = await client.post("/links", body)
    assert (made["mechanism"], made["kind"], made["count"]) == ("perf_event", kind, 2)
    assert "create_perf_links" in kernel.calls
    (attached,) = kernel.attached
    assert attached.addresses == [FUNCTIONS[name][0] for name in ("vfs_write", "nf_hook")]
    assert attached.cookies == [1, 2]
    assert attached.retprobe is (kind == "kretprobe")
    assert await client.get(f"/links/{made['id']}") == made
    await client.delete(f"/links/{made['id']}")
    assert kernel.attached == []


@pytest.mark.parametrize(
    "source",
    [
        None,
        {"kind": "object", "elf": ELF},
        {"kind": "builtin", "builtin": "count"},
    ],
)
async def test_programs_are_loaded_for_the_mechanism_that_there_is(
    serve: Serve, source: dict[str, Any] | None
) -> None:
    fields = {} if source is None else {"source": source}
    for kernel, mechanism in ((FakeKernel(), "kprobe_multi"), (FakeKernel(), "perf_event")):
        if mechanism == "perf_event":
            without_multi(kernel)
        served = await serve(kernel)
        async with Client(served.path) as client:
            await a_link(client, await a_program(client, **fields))
            assert kernel.mechanisms == [mechanism]
            assert (await client.get("/links"))["items"][0]["mechanism"] == mechanism


async def test_kprobe_multi_is_tried_where_its_test_told_nothing(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.answers["bpf_link_kprobe_multi"] = FeatureAnswer(None, "EPERM")
    made = await client.post("/links", link(await a_program(client)))
    assert made["mechanism"] == "kprobe_multi"
    assert "create_perf_links" not in kernel.calls


async def test_patterns_one_by_one(client: Client, kernel: FakeKernel) -> None:
    without_multi(kernel)
    made = await client.post("/links", link(await a_program(client), patterns=["vfs_*"]))
    assert (made["mechanism"], made["count"]) == ("perf_event", 3)


async def test_who_insists_on_kprobe_multi_gets_it_or_nothing(
    client: Client, kernel: FakeKernel
) -> None:
    made = await client.post("/links", link(await a_program(client), mechanism="kprobe_multi"))
    assert made["mechanism"] == "kprobe_multi"


@pytest.mark.parametrize("wanted", [{"symbols": ["vfs_read"]}, {"patterns": ["vfs_*"]}])
async def test_who_insists_on_kprobe_multi_does_not_get_kprobes_one_by_one(
    client: Client, kernel: FakeKernel, wanted: dict[str, Any]
) -> None:
    without_multi(kernel)
    program = await a_program(client)
    body = link(program, mechanism="kprobe_multi", **wanted)
    problem = await client.refused("POST", "/links", body, status=501, kind="not-supported")
    assert "5.18" in problem["needs"]
    assert kernel.links == []
    body["mechanism"] = None
    assert (await client.post("/links", body))["mechanism"] == "perf_event"


async def test_insisting_is_about_how_the_program_was_loaded(
    client: Client, kernel: FakeKernel
) -> None:
    """The feature came since: the program is still one for kprobes one by one."""
    without_multi(kernel)
    program = await a_program(client)
    kernel.answers.clear()
    await client.get("/capabilities?refresh=true")
    answer = await client.request("POST", "/links", link(program, mechanism="kprobe_multi"))
    assert answer.status != 201 or answer.json["mechanism"] == "kprobe_multi"
    assert (await client.post("/links", link(program)))["mechanism"] == "perf_event"


@pytest.mark.parametrize("kind", ["kprobe", "kretprobe"])
async def test_a_kernel_that_has_neither(client: Client, kernel: FakeKernel, kind: str) -> None:
    without_multi(kernel, kprobe_perf_event=FeatureAnswer(False, "no CONFIG_KPROBES"))
    program = await a_program(client)
    problem = await client.refused(
        "POST", "/links", link(program, kind=kind), status=501, kind="not-supported"
    )
    assert "5.18" in problem["needs"]
    assert kernel.links == []
    await client.delete(f"/programs/{program}")


async def test_a_session_is_kprobe_multi_or_nothing(client: Client, kernel: FakeKernel) -> None:
    without_multi(kernel)
    program = await a_program(client, attach="kprobe_session")
    problem = await client.refused(
        "POST", "/links", link(program, kind="session"), status=501, kind="not-supported"
    )
    assert "6.10" in problem["needs"]
    assert kernel.mechanisms == ["kprobe_multi"]
    assert "create_perf_links" not in kernel.calls


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMFILE, errno.EBUSY])
async def test_errors_one_by_one(client: Client, kernel: FakeKernel, number: int) -> None:
    without_multi(kernel)
    program = await a_program(client)
    kernel.fail["create_perf_links"] = OSError(number, "no")
    problem = await client.refused("POST", "/links", link(program), status=500, kind="kernel")
    assert problem["errno"] == errno.errorcode[number]
    await client.delete(f"/programs/{program}")


# Several pieces


@pytest.fixture
def small(kernel: FakeKernel) -> FakeKernel:
    """A kernel that finds no memory for more than 30 targets in one piece."""
    kernel.files = symbol_files(many=200)
    kernel.most_targets = 30
    return kernel


MANY = [f"many_{number}" for number in range(200)]
#: Halves of halves of 200: four are too many for 30 each, eight are not.
PIECES = [25] * 8


@pytest.mark.parametrize("multi", [True, False])
async def test_a_link_in_several_pieces_is_one_link(
    client: Client, small: FakeKernel, multi: bool
) -> None:
    if not multi:
        without_multi(small)
    cookies = list(range(200))
    body = link(await a_program(client), symbols=MANY, cookies=cookies)
    made = await client.post("/links", body)
    assert made["count"] == 200
    assert made["kernel_id"] == small.attached[0].details.kernel_id
    assert [len(each.addresses) for each in small.attached] == PIECES
    # Each target once, in its order, with its cookie.
    addresses = [address for each in small.attached for address in each.addresses]
    assert addresses == [ADDED + 0x40 * number for number in range(200)]
    assert [cookie for each in small.attached for cookie in each.cookies] == cookies
    found = await collect(client, f"/links/{made['id']}/targets", 99)
    assert [each["symbol"] for each in found] == MANY
    assert [each["cookie"] for each in found] == [str(cookie) for cookie in cookies]
    assert (await client.get("/links"))["items"] == [made]
    await client.delete(f"/links/{made['id']}")
    assert small.attached == []
    assert (await client.get("/links"))["items"] == []


async def test_counts_are_those_of_all_pieces_now(client: Client, small: FakeKernel) -> None:
    made = await a_link(client, patterns=["many_*"])
    for number, each in enumerate(small.attached):
        small.tell(each, count=each.details.count, missed=10 + number)
    found = await client.get(f"/links/{made}")
    assert (found["count"], found["missed"]) == (200, sum(range(10, 18)))
    # One that the kernel is silent about makes the sum unknown; the count is then the request's.
    small.tell(small.attached[-1], count=None, missed=None)
    found = await client.get(f"/links/{made}")
    assert (found["count"], found["missed"]) == (200, None)


async def test_names_in_several_pieces(client: Client, small: FakeKernel) -> None:
    small.files = symbol_files(many=200, hidden=True)
    made = await client.post("/links", link(await a_program(client), symbols=MANY))
    assert made["count"] == 200
    assert [name for each in small.attached for name in each.symbols] == MANY


@pytest.mark.parametrize("made", [0, 1, 4, 7])
@pytest.mark.parametrize(
    ("number", "status", "kind"),
    [
        (errno.EMFILE, 500, "kernel"),
        (errno.ENOENT, 422, "symbol-not-found"),
        (errno.EPERM, 500, "kernel"),
    ],
)
async def test_a_piece_that_fails_leaves_nothing(
    client: Client, small: FakeKernel, made: int, number: int, status: int, kind: str
) -> None:
    small.budget = (made, number)
    program = await a_program(client)
    body = link(program, patterns=["many_*"], lifetime=PERSISTENT)
    problem = await client.refused("POST", "/links", body, status=status, kind=kind)
    assert problem["errno"] == errno.errorcode[number]
    assert len(small.links) == made
    assert small.attached == []
    assert (await client.get("/links"))["items"] == []
    await client.delete(f"/programs/{program}")
    assert small.loaded == []


async def test_no_memory_for_a_single_target(client: Client, small: FakeKernel) -> None:
    small.most_targets = 0
    program = await a_program(client)
    body = link(program, patterns=["many_*"])
    problem = await client.refused("POST", "/links", body, status=500, kind="kernel")
    assert problem["errno"] == "ENOMEM"
    assert "memory" in problem["detail"]
    await client.delete(f"/programs/{program}")


async def test_all_pieces_end_with_their_client(
    served: Served, small: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    await a_link(child, patterns=["many_*"])
    assert len(small.attached) == len(PIECES)
    child.kill()
    await until(lambda: not small.attached and not small.loaded)


async def test_all_pieces_end_with_a_client_that_ends_meanwhile(
    served: Served, small: FakeKernel, actor: Actors
) -> None:
    child = await actor()
    program = await a_program(child)
    await child.get("/symbols?limit=1")
    gate = small.hooks["create_link"] = Gate()
    child.begin_request("POST", "/links", link(program, patterns=["many_*"]))
    await asyncio.to_thread(gate.entered.wait, 10)
    child.kill()
    gate.open()
    await until(lambda: len(small.links) == len(PIECES) and not small.attached)
    await until(lambda: not small.loaded)


async def test_a_piece_that_fails_to_close_does_not_keep_the_others(
    client: Client, small: FakeKernel
) -> None:
    made = await a_link(client, patterns=["many_*"])
    small.fail["close_link"] = OSError(errno.EIO, "no")
    await client.delete(f"/links/{made}")
    left = small.attached
    assert len(left) <= 1
    for each in left:  # the fake's own: a kernel lets go of an FD whatever close(2) says
        each.fd.close()


# Tried again


def module_goes(kernel: FakeKernel, **now: Any) -> None:
    """Have nf_tables go while the next link is made, which fails for it."""

    def change() -> None:
        kernel.hooks.clear()
        kernel.files = symbol_files(without=["nf_tables"], **now)
        kernel.signature = ()

    kernel.hooks["create_link"] = change


STALE = [errno.ENOENT, errno.EINVAL, errno.ESRCH]


@pytest.mark.parametrize("number", STALE)
async def test_patterns_are_tried_again_without_a_module_that_went_meanwhile(
    client: Client, kernel: FakeKernel, number: int
) -> None:
    program = await a_program(client)
    module_goes(kernel)
    kernel.fail["create_link"] = OSError(number, "no")
    made = await client.post("/links", link(program, patterns=["vfs_*", "*"]))
    assert made["count"] == len(FUNCTIONS)
    assert len(kernel.attached) == 1
    names = [each["symbol"] for each in await collect(client, f"/links/{made['id']}/targets")]
    assert "nf_hook" not in names
    assert "vfs_read" in names
    assert FUNCTIONS["nf_hook"][0] not in kernel.attached[0].addresses


@pytest.mark.parametrize("number", STALE)
async def test_symbols_that_went_meanwhile_are_named(
    client: Client, kernel: FakeKernel, number: int
) -> None:
    program = await a_program(client)
    module_goes(kernel)
    kernel.fail["create_link"] = OSError(number, "no")
    body = link(program, symbols=["vfs_read", "nf_hook"])
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert problem["symbols"] == ["nf_hook"]
    assert kernel.links == []
    await client.delete(f"/programs/{program}")


async def test_a_module_that_is_elsewhere_meanwhile(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    module_goes(kernel, added=[("nf_hook", "nf_tables")])
    kernel.fail["create_link"] = OSError(errno.ENOENT, "no")
    made = await client.post("/links", link(program, symbols=["vfs_read", "nf_hook"]))
    assert kernel.attached[0].addresses == [FUNCTIONS["vfs_read"][0], MODULES]
    found = await collect(client, f"/links/{made['id']}/targets")
    assert found[1]["address"] == f"0x{MODULES:016x}"


async def test_an_address_that_is_another_functions_meanwhile_is_not_attached_to(
    client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    module_goes(kernel, added=[("nf_hook", "nf_tables")])
    kernel.fail["create_link"] = OSError(errno.ENOENT, "no")
    body = link(program, addresses=[FUNCTIONS["nf_hook"][0]])
    problem = await client.refused("POST", "/links", body, status=422, kind="address-not-traceable")
    assert problem["addresses"] == [f"0x{FUNCTIONS['nf_hook'][0]:016x}"]
    assert kernel.links == []


@pytest.mark.parametrize("number", STALE)
async def test_it_is_not_tried_again_for_nothing(
    client: Client, kernel: FakeKernel, number: int
) -> None:
    program = await a_program(client)
    kernel.fail["create_link"] = OSError(number, "no")
    body = link(program, patterns=["vfs_*"])
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert problem["errno"] == errno.errorcode[number]
    assert kernel.calls.count("create_link") == 1
    assert kernel.links == []


async def test_a_change_that_touches_no_target_is_no_reason_to_try_again(
    client: Client, kernel: FakeKernel
) -> None:
    program = await a_program(client)
    module_goes(kernel)
    kernel.fail["create_link"] = OSError(errno.EINVAL, "no")
    body = link(program, patterns=["vfs_*"])
    await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert kernel.calls.count("create_link") == 1


async def test_it_is_tried_again_once_only(client: Client, kernel: FakeKernel) -> None:
    """Modules that come and go for ever do not keep a request for ever."""
    program = await a_program(client)
    loads = iter(range(1000))

    def change() -> None:
        number = next(loads)
        kernel.files = symbol_files(added=[(f"nf_{number}", "mod")])
        kernel.signature = (b"mod %d" % number,)
        kernel.fail["create_link"] = OSError(errno.ENOENT, "no")

    change()
    kernel.hooks["create_link"] = change
    body = link(program, patterns=["nf_*"])
    await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert kernel.calls.count("create_link") == 2
    assert kernel.links == []
    kernel.hooks.clear()
    kernel.fail.clear()
    await client.delete(f"/programs/{program}")


async def test_other_errors_are_no_reason_to_try_again(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    module_goes(kernel)
    kernel.fail["create_link"] = OSError(errno.EMFILE, "no")
    body = link(program, patterns=["*"])
    await client.refused("POST", "/links", body, status=500, kind="kernel")
    assert kernel.calls.count("create_link") == 1


# The most targets of a link


@pytest.fixture
async def limited(serve: Serve, kernel: FakeKernel) -> Served:
    return await serve(kernel, max_targets=3)


@pytest.mark.parametrize(
    "wanted",
    [
        {"patterns": ["vfs_*", "nf_*"]},
        {"symbols": ["vfs_read", "vfs_open", "vfs_write", "nf_hook"]},
        {"addresses": [FUNCTIONS[name][0] for name in FUNCTIONS]},
        {"symbols": ["vfs_read", "vfs_open", "cleanup"], "on_ambiguous": "all"},
    ],
)
async def test_more_targets_than_a_link_may_have(
    limited: Served, kernel: FakeKernel, wanted: dict[str, Any]
) -> None:
    async with Client(limited.path) as client:
        program = await a_program(client)
        problem = await client.refused(
            "POST", "/links", link(program, **wanted), status=429, kind="quota"
        )
        assert "3" in problem["detail"]
        assert str(len(wanted.get("addresses", range(4)))) in problem["detail"]
        assert "create_link" not in kernel.calls
        await client.delete(f"/programs/{program}")


@pytest.mark.parametrize(
    "wanted",
    [
        {"patterns": ["vfs_*"]},
        {"patterns": ["vfs_*", "nf_*"], "exclude": ["*[nf_tables]"]},
        {"symbols": ["vfs_read", "vfs_open", "no_1", "no_2"], "on_untraceable": "skip"},
    ],
)
async def test_just_as_many_targets_as_a_link_may_have(
    limited: Served, wanted: dict[str, Any]
) -> None:
    async with Client(limited.path) as client:
        made = await client.post("/links", link(await a_program(client), **wanted))
        assert made["count"] <= 3


async def test_a_dry_run_tells_that_it_would_be_too_many(
    limited: Served, kernel: FakeKernel
) -> None:
    async with Client(limited.path) as client:
        body = link(await a_program(client), patterns=["*"], dry_run=True)
        answer = await client.request("POST", "/links", body)
        assert answer.status == 429 or answer.json["attachable"] is False


async def test_the_limit_is_told(limited: Served) -> None:
    async with Client(limited.path) as client:
        assert (await client.get("/capabilities"))["limits"]["targets_per_link"] == 3


# Which target it was, one by one


@pytest.mark.parametrize(
    ("number", "call", "kind"),
    [
        (errno.EINVAL, "perf_event_open", "symbol-not-found"),
        (errno.ENOENT, "perf_event_open", "symbol-not-found"),
        (errno.EADDRNOTAVAIL, "perf_event_open", "symbol-not-found"),
        (errno.EILSEQ, "perf_event_open", "symbol-not-found"),
        (errno.EINVAL, "LINK_CREATE", "wrong-attach-type"),
        (errno.EINVAL, "SET_BPF", "wrong-attach-type"),
    ],
)
async def test_one_by_one_the_kernel_says_which_and_whose_fault_it_is(
    client: Client, kernel: FakeKernel, number: int, call: str, kind: str
) -> None:
    without_multi(kernel)
    kernel.fail["create_perf_links"] = PerfAttachError(number, call, 1)
    body = link(await a_program(client), symbols=["vfs_open", "vfs_read"])
    problem = await client.refused("POST", "/links", body, status=422, kind=kind)
    if kind == "symbol-not-found":
        assert problem["symbols"] == ["vfs_read"]
    assert kernel.attached == []


async def test_what_stands_in_the_way_of_kprobes_one_by_one_is_told(
    client: Client, kernel: FakeKernel
) -> None:
    without_multi(kernel)
    kernel.fail["create_perf_links"] = PerfAttachError(errno.EACCES, "perf_event_open", 0)
    body = link(await a_program(client))
    problem = await client.refused("POST", "/links", body, status=500, kind="kernel")
    assert "perf_event_paranoid" in problem["detail"]


async def test_which_target_it_was_in_a_later_piece(client: Client, kernel: FakeKernel) -> None:
    """ENOMEM for all at once; then the second half's first target cannot be attached to."""
    without_multi(kernel)
    failures: list[OSError | None] = [
        PerfAttachError(errno.ENOMEM, "perf_event_open", 0),
        None,
        PerfAttachError(errno.ENOENT, "perf_event_open", 0),
    ]

    def fail() -> None:
        if error := failures.pop(0):
            raise error

    kernel.hooks["create_perf_links"] = fail
    body = link(await a_program(client), symbols=["vfs_open", "vfs_read"])
    problem = await client.refused("POST", "/links", body, status=422, kind="symbol-not-found")
    assert problem["symbols"] == ["vfs_read"]
    assert kernel.attached == []
