"""Flame graphs: one SVG file, for any browser, that needs nothing else.

Each frame is as wide as it has calls, and stands on the one that called it. A click on one makes it
as wide as the picture; Escape, or a click at the bottom, goes back.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from kpmd.kpmctl.output import clean

_WIDTH = 1200
#: A frame's height, and where its text stands in it.
_ROW, _BASE = 18, 13
#: Above the frames, for the title.
_TOP = 34
#: Room on all sides.
_EDGE = 10
#: Columns that a character takes, and what a text leaves free in its frame.
_CHARACTER, _FREE = 7.0, 6
#: What is narrower cannot be seen: it is left out.
_THIN = 0.1

_STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1b1b1b; pointer-events: none }
.title, .note { fill: currentColor }
.title { font-size: 15px; font-weight: 600 }
svg { background: #fff; color: #222 }
rect { stroke: #fff; stroke-width: .5; rx: 1.5px }
g:hover > rect { stroke: #000; stroke-width: 1.2 }
g { cursor: pointer }
@media (prefers-color-scheme: dark) { svg { background: #16181d; color: #ddd }
  rect { stroke: #16181d } g:hover > rect { stroke: #fff } }
"""

# A frame knows the calls to its left (data-x) and its own (data-w), how far up it stands (data-d)
# and its name (data-n).
_SCRIPT = """
'use strict';
const svg = document.documentElement, frames = [...svg.querySelectorAll('g')];
const value = (g, name) => Number(g.dataset[name]);
function zoom(to) {
  const x = value(to, 'x'), w = value(to, 'w'), d = value(to, 'd');
  for (const g of frames) {
    const at = value(g, 'x'), calls = value(g, 'w'), below = value(g, 'd') < d;
    const shown = below ? at <= x && at + calls >= x + w : at >= x && at + calls <= x + w;
    g.style.display = shown ? '' : 'none';
    g.style.opacity = below ? .5 : 1;
    const [, rect, text] = g.children;
    const left = EDGE + (below ? 0 : (at - x) / w * INNER);
    const room = below ? INNER : calls / w * INNER;
    rect.setAttribute('x', left);
    rect.setAttribute('width', room);
    const fits = Math.floor((room - FREE) / CHARACTER), name = g.dataset.n;
    text.setAttribute('x', left + FREE / 2);
    text.textContent = fits < 3 ? '' : name.length <= fits ? name : name.slice(0, fits - 1) + '…';
  }
}
svg.addEventListener('click', event => {
  const g = event.target.closest('g');
  if (g) zoom(g);
});
addEventListener('keydown', event => { if (event.key === 'Escape') zoom(frames[0]); });
"""


@dataclass
class Node:
    """A frame, with all the calls that came through it, and those that it calls."""

    name: str
    calls: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, path: Sequence[str], calls: int) -> None:
        """Calls that came this way, from the outermost frame on."""
        node = self
        node.calls += calls
        for name in path:
            node = node.children.setdefault(name, Node(name))
            node.calls += calls


def draw(title: str, paths: Iterable[tuple[Sequence[str], int]]) -> bytes:
    """The picture: an SVG document of these paths, with how many calls came each way."""
    root = Node("all")
    for path, calls in paths:
        root.add(path, calls)
    inner = _WIDTH - 2 * _EDGE
    placed = _placed(root, inner)
    height = _TOP + (max(depth for _, _, depth in placed) + 1) * _ROW + _EDGE
    svg = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        width="100%",
        preserveAspectRatio="xMidYMin",
        role="img",
    )
    ElementTree.SubElement(svg, "style").text = _STYLE
    heading = ElementTree.SubElement(svg, "text", {"class": "title", "x": str(_EDGE), "y": "22"})
    heading.text = clean(title)
    for node, start, depth in placed:
        top = height - _EDGE - (depth + 1) * _ROW
        _frame(svg, node, start, depth, top, root.calls, inner)
    numbers = {"EDGE": _EDGE, "INNER": inner, "FREE": _FREE, "CHARACTER": _CHARACTER}
    script = _SCRIPT
    for name, number in numbers.items():
        script = script.replace(name, f"{number:g}")
    ElementTree.SubElement(svg, "script").text = script
    picture: bytes = ElementTree.tostring(svg, encoding="utf-8", xml_declaration=True)
    return picture


def _placed(root: Node, inner: int) -> list[tuple[Node, int, int]]:
    """Each frame that can be seen, the calls to its left, and how far up it stands."""
    placed = []
    waiting = [(root, 0, 0)]
    least = _THIN * root.calls / inner
    while waiting:
        node, start, depth = waiting.pop()
        placed.append((node, start, depth))
        at = start
        # By name, so that the same program makes the same picture.
        for _, child in sorted(node.children.items()):
            if child.calls >= least:
                waiting.append((child, at, depth + 1))
            at += child.calls
    return placed


def _frame(
    svg: ElementTree.Element, node: Node, start: int, depth: int, top: int, whole: int, inner: int
) -> None:
    part, left = node.calls / max(whole, 1), start / max(whole, 1)
    name = clean(node.name)
    group = ElementTree.SubElement(
        svg,
        "g",
        {"data-x": str(start), "data-w": str(node.calls), "data-d": str(depth), "data-n": name},
    )
    calls = "1 call" if node.calls == 1 else f"{node.calls} calls"
    ElementTree.SubElement(group, "title").text = f"{name}: {calls}, {part:.2%}"
    x, width = _EDGE + left * inner, part * inner
    place = {"x": f"{x:.2f}", "y": str(top), "width": f"{width:.2f}", "height": str(_ROW - 1)}
    ElementTree.SubElement(group, "rect", {**place, "fill": _colour(name)})
    fits = int((width - _FREE) / _CHARACTER)
    text = ElementTree.SubElement(group, "text", x=f"{x + _FREE / 2:.2f}", y=str(top + _BASE))
    text.text = "" if fits < 3 else name if len(name) <= fits else f"{name[: fits - 1]}…"


def _colour(name: str) -> str:
    """A warm colour, the same for a name in each picture."""
    hash_ = zlib.crc32(name.encode())
    return f"hsl({14 + hash_ % 38},{76 + hash_ // 64 % 16}%,{62 + hash_ // 4096 % 12}%)"
