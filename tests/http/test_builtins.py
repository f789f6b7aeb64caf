"""Which variant of a builtin is loaded: by what the kernel has, and by what is asked for."""

from __future__ import annotations

import platform
from typing import Any

import pytest

from kpmd.bpf.features import Answer
from kpmd.builtin import BUILTINS
from kpmd.errors import BadObject, VerifierRejected
from tests.fakes.kernel import FakeKernel
from tests.http.samples import link
from tests.http.serving import Client

NO = Answer(False, "too old")
SESSION, MULTI, FUNC_IP = "bpf_link_kprobe_session", "bpf_link_kprobe_multi", "bpf_get_func_ip"


@pytest.fixture
def loaded(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The objects that the kernel was given."""
    seen: list[bytes] = []
    load = kernel.load_object

    def load_object(elf: bytes, *args: Any) -> Any:
        seen.append(elf)
        return load(elf, *args)

    monkeypatch.setattr(kernel, "load_object", load_object)
    return seen


def body(name: str, attach: str | None = None) -> dict[str, Any]:
    return {"source": {"kind": "builtin", "builtin": name}, "attach": attach}


@pytest.mark.parametrize("name", list(BUILTINS))
@pytest.mark.parametrize("attach", [None, "kprobe_multi", "kprobe_session"])
@pytest.mark.parametrize("lacks", [(), (SESSION,), (SESSION, MULTI), (SESSION, MULTI, FUNC_IP)])
async def test_the_best_that_the_kernel_has(
    client: Client,
    kernel: FakeKernel,
    loaded: list[bytes],
    name: str,
    attach: str | None,
    lacks: tuple[str, ...],
) -> None:
    kernel.answers.update(dict.fromkeys(lacks, NO))
    made = BUILTINS[name]
    if made.by_session and attach == "kprobe_session" and SESSION in lacks:
        problem = await client.refused(
            "POST", "/programs", body(name, attach), status=501, kind="not-supported"
        )
        assert "6.10" in problem["needs"]
        assert loaded == []
        return
    await client.post("/programs", body(name, attach))
    session = made.by_session and attach != "kprobe_multi" and SESSION not in lacks
    # What is loaded for sessions in so many words is linked by no other means.
    func_ip = FUNC_IP not in lacks or attach == "kprobe_session"
    assert loaded == made.variant(session=session, func_ip=func_ip).read()[:1]
    one_by_one = MULTI in lacks and attach != "kprobe_session"
    assert kernel.mechanisms == ["perf_event" if one_by_one else "kprobe_multi"]


async def test_the_next_object_where_the_kernel_does_not_take_the_first(
    client: Client, kernel: FakeKernel, loaded: list[bytes]
) -> None:
    kernel.fail["load_object"] = BadObject("func_proto incompatible with kernel")
    await client.post("/programs", body("latency"))
    assert loaded == BUILTINS["latency"].variant(session=True).read()


async def test_what_the_verifier_says_is_not_tried_again(
    client: Client, kernel: FakeKernel, loaded: list[bytes]
) -> None:
    kernel.fail["load_object"] = VerifierRejected("the verifier refused it", "no", False)
    await client.refused("POST", "/programs", body("latency"), status=422, kind="verifier-rejected")
    assert len(loaded) == 1


@pytest.mark.parametrize("attach", [None, "kprobe_session"])
async def test_sessions_are_tried_where_nothing_is_known_only_if_asked_for(
    client: Client, kernel: FakeKernel, loaded: list[bytes], attach: str | None
) -> None:
    kernel.answers[SESSION] = Answer(None, "EPERM")
    await client.post("/programs", body("trace", attach))
    assert loaded == BUILTINS["trace"].variant(session=attach is not None).read()[:1]


async def test_no_object_for_this_machine(
    client: Client, monkeypatch: pytest.MonkeyPatch, loaded: list[bytes]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    problem = await client.refused(
        "POST", "/programs", body("trace"), status=501, kind="not-supported"
    )
    assert "x86_64" in problem["detail"]
    assert loaded == []


async def test_at_a_return_that_does_not_tell_its_function(
    client: Client, kernel: FakeKernel
) -> None:
    kernel.answers.update(dict.fromkeys((SESSION, MULTI, FUNC_IP), NO))
    made = await client.post("/programs", body("count"))
    (program,) = (each["id"] for each in made["programs"] if each["name"] == "count")
    problem = await client.refused(
        "POST", "/links", link(program, kind="kretprobe"), status=501, kind="not-supported"
    )
    assert "5.15" in problem["needs"]
    await client.post("/links", link(program))
