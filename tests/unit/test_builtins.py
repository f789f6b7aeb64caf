"""The builtins as data: which there are, and for which kernels."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from kpmd import builtin
from kpmd.builtin import BUILTINS, Builtin

FOLDER = Path(builtin.__file__).parent
EVERY = [(each, variant) for each in BUILTINS.values() for variant in each.variants]


@pytest.fixture(autouse=True)
def x86_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def test_each_object_is_of_a_variant_and_has_a_source() -> None:
    objects = {name for _, variant in EVERY for name in variant.objects}
    assert objects == {path.name.removesuffix(".bpf.o") for path in FOLDER.glob("*.bpf.o")}
    assert objects == {path.name.removesuffix(".bpf.c") for path in FOLDER.glob("*.bpf.c")}


@pytest.mark.parametrize(("each", "variant"), EVERY)
def test_the_programs_of_a_variant_are_in_its_objects(
    each: Builtin, variant: builtin.Variant
) -> None:
    for elf in variant.read():
        assert elf.startswith(b"\x7fELF")
        for name in variant.links:
            assert b"\0" + name.encode() + b"\0" in elf
        sections = set(re.findall(rb"\0(k(?:ret)?probe\.[a-z]+)\0", elf))
        kinds = {kind for kinds in variant.links.values() for kind in kinds[:1]}
        names = {
            "kprobe": b"kprobe.multi",
            "kretprobe": b"kretprobe.multi",
            "session": b"kprobe.session",
        }
        assert sections == {names[kind] for kind in kinds}
    assert variant.entry_only <= variant.links.keys()


@pytest.mark.parametrize("each", BUILTINS.values(), ids=list(BUILTINS))
def test_there_is_one_for_every_kernel(each: Builtin) -> None:
    for func_ip in (True, False):
        variant = each.variant(func_ip=func_ip)
        assert not variant.session
        assert variant.needs == ({"bpf_get_func_ip"} if func_ip else set())
        assert builtin.read(each.name, func_ip=func_ip) == variant.read()[0]
    assert each.by_session is (each.name in ("latency", "trace"))
    if each.by_session:
        variant = each.variant(session=True)
        assert variant.needs == {"bpf_link_kprobe_session"}
        assert list(variant.links) == [each.name]


@pytest.mark.parametrize("each", BUILTINS.values(), ids=list(BUILTINS))
def test_descriptions_are_short(each: Builtin) -> None:
    assert 0 < each.description.count(".") <= 2
    assert len(each.description) < 200


def test_other_machines_have_what_needs_no_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    readable = [variant for _, variant in EVERY if variant.machine is None]
    assert {each.objects[0] for each in readable} == {"count", "stacks", "latency_session_ctx"}
    for _, variant in EVERY:
        if variant in readable:
            variant.read()
        else:
            with pytest.raises(NotImplementedError, match="x86_64"):
                variant.read()


def test_a_name_that_there_is_not() -> None:
    for name in ("nope", "../../errors", ""):
        with pytest.raises(KeyError):
            builtin.read(name)


def test_docs_tell_of_each() -> None:
    text = (FOLDER.parents[1] / "docs/builtins.md").read_text()
    for each in BUILTINS.values():
        assert f"## {each.name}\n" in text
        for variant in each.variants:
            assert all(f"`{name}`" in text for name in variant.links)
