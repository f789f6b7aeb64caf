"""Flame graphs: what is drawn where, and that a hostile name is nothing but a name."""

from __future__ import annotations

import re

import pytest

from kpmd.kpmctl.flame import Node, draw
from tests.unit.oneliners import parsed

SVG = "{http://www.w3.org/2000/svg}"


def frames(picture: bytes) -> dict[str, tuple[float, float, float]]:
    """Name -> left end, width, height above the ground."""
    found = {}
    for group in parsed(picture).iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        x, width, y = (float(rect.attrib[each]) for each in ("x", "width", "y"))
        found[group.attrib["data-n"]] = (x, width, -y)
    return found


def test_calls_add_up() -> None:
    root = Node("all")
    root.add(["a", "b"], 3)
    root.add(["a"], 1)
    root.add(["a", "c"], 2)
    (a,) = root.children.values()
    assert (root.calls, a.calls) == (6, 6)
    assert {name: each.calls for name, each in a.children.items()} == {"b": 3, "c": 2}


def test_frames_stand_on_their_callers() -> None:
    drawn = frames(draw("t", [(["a", "b"], 3), (["a", "c"], 1), (["d"], 4)]))
    assert drawn.keys() == {"all", "a", "b", "c", "d"}
    whole, half = drawn["all"], drawn["a"]
    assert half[0] == whole[0]
    assert half[1] == drawn["d"][1] == whole[1] / 2
    assert drawn["d"][0] == half[0] + half[1]
    assert drawn["b"][1] == 3 * drawn["c"][1]
    assert drawn["c"][0] == pytest.approx(drawn["b"][0] + drawn["b"][1], abs=0.02)
    assert whole[2] < half[2] == drawn["d"][2] < drawn["b"][2] == drawn["c"][2]


def test_the_same_calls_make_the_same_picture() -> None:
    paths = [(["a", "b"], 3), (["a", "c"], 1)]
    assert draw("t", paths) == draw("t", reversed(paths))


def test_what_cannot_be_seen_is_left_out() -> None:
    many = [([f"f{at}"], 1) for at in range(3)] + [(["big"], 10_000_000)]
    assert frames(draw("t", many)).keys() == {"all", "big"}
    assert frames(draw("t", [])).keys() == {"all"}


def test_tooltips_and_short_texts() -> None:
    root = parsed(draw("t", [(["long_name_" * 30], 1)]))
    group = list(root.iter(f"{SVG}g"))[1]
    assert group.findtext(f"{SVG}title") == f"{'long_name_' * 30}: 1 call, 100.00%"
    text = group.findtext(f"{SVG}text")
    assert text is not None
    assert text.endswith("…")
    assert len(text) < 170


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "]]></script><script>alert(1)//",
        "&amp;\0\x08\x1b[31m\ud800",
        "' onload='alert(1)",
    ],
)
def test_a_hostile_name_is_text(name: str) -> None:
    picture = draw(name, [([name], 2)])
    root = parsed(picture)
    assert len(list(root.iter(f"{SVG}script"))) == 1
    assert {each.tag.removeprefix(SVG) for each in root.iter()} == {
        "svg", "style", "script", "text", "g", "title", "rect",
    }  # fmt: skip
    for each in root.iter():
        assert not any(key.startswith("on") for key in each.attrib)
    shown = [group.attrib["data-n"] for group in root.iter(f"{SVG}g")]
    assert shown[1].replace("\\x00", "\0").startswith(name[:3])


def test_it_needs_nothing_else() -> None:
    text = draw("t", [(["a"], 1)]).decode()
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert "import" not in text
    assert "EDGE" not in text
