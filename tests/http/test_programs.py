"""POST, GET, DELETE of programs."""

from __future__ import annotations

import base64
import errno
import os
import pwd

import pytest

from kpmd.errors import BadObject, KernelError, KpmdError, NotSupported, VerifierRejected
from tests.fakes.kernel import FakeKernel
from tests.http.samples import CODE, ELF, PERSISTENT, a_link, a_program, elf, instructions
from tests.http.serving import Client


@pytest.mark.every_loop
async def test_raw_instructions(client: Client, kernel: FakeKernel) -> None:
    made = await client.post("/programs", instructions(labels={"who": "me"}))
    (program,) = made["programs"]
    assert made["maps"] == []
    assert program["id"].startswith("prg-")
    assert program["name"] == "probe"
    assert program["attach"] == "kprobe_multi"
    assert program["owner"] == {"uid": os.getuid(), "user": pwd.getpwuid(os.getuid()).pw_name}
    assert program["labels"] == {"who": "me"}
    assert program["lifetime"] == {"kind": "process"}
    assert program["links"] == 0
    assert "verifier_log" not in program
    assert await client.get(f"/programs/{program['id']}") == program
    assert (await client.get("/programs"))["items"] == [program]


@pytest.mark.every_loop
async def test_an_object_has_all_of_its_programs_and_maps(client: Client) -> None:
    made = await client.post("/programs", elf())
    names = [program["name"] for program in made["programs"]]
    (map_,) = made["maps"]
    assert names == ["count", "other"]
    assert map_["id"].startswith("map-")
    assert sorted(map_["programs"]) == sorted(program["id"] for program in made["programs"])
    assert all(program["maps"] == [map_["id"]] for program in made["programs"])


async def test_only_the_named_programs_of_an_object(client: Client) -> None:
    source = {"kind": "object", "elf": ELF, "programs": ["other"]}
    made = await client.post("/programs", {"source": source, "attach": "kprobe_session"})
    assert [program["name"] for program in made["programs"]] == ["other"]
    assert made["programs"][0]["attach"] == "kprobe_session"


async def test_a_builtin(client: Client) -> None:
    source = {"kind": "builtin", "builtin": "count", "max_entries": {"counts": 77}}
    made = await client.post("/programs", {"source": source})
    assert made["maps"][0]["max_entries"] == 77
    assert "count" in (await client.get("/capabilities"))["builtins"]


@pytest.mark.parametrize("name", ["", "Count", "../count", "count.bpf.o", "nothing"])
async def test_a_builtin_that_does_not_exist(client: Client, name: str) -> None:
    problem = await client.refused(
        "POST",
        "/programs",
        {"source": {"kind": "builtin", "builtin": name}},
        status=422,
        kind="invalid",
    )
    assert problem["errors"][0]["loc"] == ["source", "builtin"]


async def test_the_verifiers_log_of_a_good_program_is_there_when_asked_for(client: Client) -> None:
    made = await client.post("/programs", elf(verifier_log=False))
    assert "verifier_log" not in made["programs"][0]


async def test_base64_with_line_breaks(client: Client) -> None:
    wrapped = "\n".join(CODE[start : start + 8] for start in range(0, len(CODE), 8)) + "\n"
    body = instructions()
    body["source"]["instructions"] = wrapped
    await client.post("/programs", body)


@pytest.mark.parametrize(
    "text", ["", "A", "AAA", "AAAA=", "****", "AAAA AAA", "\u00e9AAA", "AA\0A", "AA-_", "AAAA" * 3]
)
async def test_instructions_that_are_none(client: Client, kernel: FakeKernel, text: str) -> None:
    """Bad base64, nothing at all, or no multiple of 8 bytes."""
    body = instructions()
    body["source"]["instructions"] = text
    problem = await client.refused("POST", "/programs", body, status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == ["source", "instructions"]
    assert kernel.programs == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("license", "GPL\0"),
        ("license", "G\u00e9PL"),
        ("license", "x" * 128),
        ("license", "GPL\n"),
        ("name", "a b"),
        ("name", "x" * 65),
        ("name", "a\0b"),
        ("name", "\u00e9"),
        ("name", "a\n"),
        ("name", "a/b"),
    ],
)
async def test_words_that_the_kernel_would_not_take(client: Client, field: str, value: str) -> None:
    body = instructions()
    body["source"][field] = value
    problem = await client.refused("POST", "/programs", body, status=422, kind="invalid")
    assert problem["errors"][0]["loc"] == ["source", field]


async def test_raw_instructions_must_say_what_they_are_for(
    client: Client, kernel: FakeKernel
) -> None:
    problem = await client.refused(
        "POST", "/programs", instructions(attach=None), status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == ["attach"]
    assert kernel.programs == []


@pytest.mark.parametrize(
    ("labels", "good"),
    [
        ({str(number): "x" for number in range(64)}, True),
        ({str(number): "x" for number in range(65)}, False),
        ({"k" * 64: "v" * 256, "\u00e9\u4e2d": "\U0001f600\0"}, True),
        ({"k" * 65: "v"}, False),
        ({"": "v"}, False),
        ({"k": "v" * 257}, False),
        ({"k": 1}, False),
        ({"k": None}, False),
    ],
)
async def test_labels(client: Client, labels: dict[str, object], good: bool) -> None:
    answer = await client.request("POST", "/programs", instructions(labels=labels))
    if good:
        assert answer.json["programs"][0]["labels"] == labels
    else:
        assert (answer.status, answer.kind) == (422, "invalid")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("globals", {"a": True}),
        ("globals", {"a": 1.0}),
        ("globals", {"a": 2**64}),
        ("globals", {"a": -(2**63) - 1}),
        ("globals", {"a": 10**400}),
        ("globals", {"a": "not base64!"}),
        ("globals", {"a": None}),
        ("max_entries", {"a": 0}),
        ("max_entries", {"a": -1}),
        ("max_entries", {"a": 2**32}),
        ("max_entries", {"a": "1"}),
        ("max_entries", {"a": True}),
    ],
)
async def test_values_of_globals_and_map_sizes(
    client: Client, kernel: FakeKernel, field: str, value: dict[str, object]
) -> None:
    source = {"kind": "object", "elf": ELF, field: value}
    problem = await client.refused(
        "POST", "/programs", {"source": source}, status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"][:3] == ["source", field, "a"]
    assert kernel.programs == []


@pytest.mark.parametrize("field", ["globals", "max_entries"])
@pytest.mark.parametrize("name", ["int", "constrained-int", "a[0]", "object", "source", "", "0"])
async def test_the_place_of_an_error_is_the_clients_own_words(
    client: Client, field: str, name: str
) -> None:
    source = {"kind": "object", "elf": ELF, field: {name: True}}
    problem = await client.refused(
        "POST", "/programs", {"source": source}, status=422, kind="invalid"
    )
    assert problem["errors"][0]["loc"] == ["source", field, name]


@pytest.mark.parametrize("value", [0, -(2**63), 2**64 - 1, "AAAA", ""])
async def test_globals_at_their_limits(client: Client, value: object) -> None:
    await client.post(
        "/programs", {"source": {"kind": "object", "elf": ELF, "globals": {"a": value}}}
    )


async def test_what_is_no_elf_file(client: Client) -> None:
    for data in (b"", b"\x7fEL", b"hello", bytes(1000)):
        source = {"kind": "object", "elf": base64.b64encode(data).decode()}
        await client.refused("POST", "/programs", {"source": source}, status=422, kind="bad-object")


async def test_what_the_verifier_refuses(client: Client, kernel: FakeKernel) -> None:
    body = instructions()
    body["source"]["instructions"] = base64.b64encode(b"\x95" + bytes(7)).decode()
    problem = await client.refused("POST", "/programs", body, status=422, kind="verifier-rejected")
    assert problem["verifier_log"] == "R0 !read_ok\n"
    assert problem["verifier_log_truncated"] is False
    assert kernel.programs == []


@pytest.mark.parametrize(
    "error",
    [
        BadObject("no"),
        VerifierRejected("no", "log", True, errno="EACCES"),
        KernelError("no", errno.EPERM),
        KernelError("no", errno.ENOMEM),
        KernelError("no", errno.EMFILE),
        KernelError("no", 524),
        KernelError("no", 4000),
        NotSupported("no", needs="kernel 6.10"),
    ],
)
async def test_errors_of_the_kernel_reach_the_client_as_they_are(
    client: Client, kernel: FakeKernel, error: KpmdError
) -> None:
    kernel.fail["load_object"] = error
    problem = await client.refused("POST", "/programs", elf(), status=error.status, kind=error.kind)
    assert problem == error.problem()
    if isinstance(error, KernelError):
        name = {524: "ENOTSUPP", 4000: "errno 4000"}.get(error.number)
        assert problem["errno"] == (name or errno.errorcode[error.number])
    assert (await client.get("/programs"))["items"] == []


async def test_a_program_in_use_is_kept_unless_forced(client: Client, kernel: FakeKernel) -> None:
    program = await a_program(client)
    links = [await a_link(client, program, symbols=[name]) for name in ("vfs_read", "vfs_open")]
    assert (await client.get(f"/programs/{program}"))["links"] == 2
    for path in (f"/programs/{program}", f"/programs/{program}?force=false"):
        problem = await client.refused("DELETE", path, status=409, kind="conflict")
        assert "2" in problem["detail"]
    assert len(kernel.attached) == 2
    await client.delete(f"/programs/{program}?force=true")
    assert not kernel.attached
    assert not kernel.loaded
    for link in links:
        await client.refused("GET", f"/links/{link}", status=404, kind="not-found")
    await client.refused("DELETE", f"/programs/{program}", status=404, kind="not-found")


async def test_a_program_without_links_is_unloaded_with_its_maps(
    client: Client, kernel: FakeKernel
) -> None:
    made = await client.post("/programs", elf(lifetime=PERSISTENT))
    first, second = (program["id"] for program in made["programs"])
    await client.delete(f"/programs/{first}")
    assert (len(kernel.loaded), len(kernel.open_maps)) == (1, 1)
    assert (await client.get("/maps"))["items"][0]["programs"] == [second]
    await client.delete(f"/programs/{second}?force=true")
    assert (len(kernel.loaded), len(kernel.open_maps)) == (0, 0)
    assert (await client.get("/maps"))["items"] == []


async def test_a_link_of_another_program_is_no_reason_to_refuse(client: Client) -> None:
    program, other = await a_program(client), await a_program(client)
    await a_link(client, other)
    await client.delete(f"/programs/{program}")


@pytest.mark.parametrize("id_", ["prg-", "prg-0", "lnk-0", "%00", "x" * 3000, "%2e%2e", "%F0%9F"])
async def test_programs_that_do_not_exist(client: Client, id_: str) -> None:
    await client.refused("GET", f"/programs/{id_}", status=404, kind="not-found")
    await client.refused("DELETE", f"/programs/{id_}", status=404, kind="not-found")


async def test_pages_of_programs(client: Client) -> None:
    made = [await a_program(client, labels={"number": str(number)}) for number in range(7)]
    first = await client.get("/programs?limit=3")
    assert [each["id"] for each in first["items"]] == made[:3]
    # The last one of the page goes, and one behind it: nothing is missed or seen twice.
    await client.delete(f"/programs/{made[2]}")
    await client.delete(f"/programs/{made[4]}")
    added = await a_program(client)
    second = await client.get(f"/programs?limit=3&after={first['next']}")
    assert [each["id"] for each in second["items"]] == [made[3], made[5], made[6]]
    third = await client.get(f"/programs?limit=3&after={second['next']}")
    assert [each["id"] for each in third["items"]] == [added]
    assert third["next"] is None


async def test_a_page_that_ends_with_the_list_has_no_next(client: Client) -> None:
    for _ in range(3):
        await a_program(client)
    assert (await client.get("/programs?limit=3"))["next"] is None
    assert (await client.get("/programs?limit=1000"))["next"] is None
    page = await client.get("/programs?limit=2")
    assert page["next"] is not None
    assert (await client.get("/programs?after=999999"))["items"] == []
