"""Debian's copyright file for the bundled Python packages, of what their wheels say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution
from pathlib import Path

#: Where the package's source tree has them.
_FOLDER = "python"
#: By a phrase that begins a licence: the file in /usr/share/common-licenses that has all of it.
_COMMON = {
    r"Apache License\s+Version 2\.0, January 2004": "Apache-2.0",
    r"Mozilla Public License,? [vV](?:ersion|\.)? ?2\.0": "MPL-2.0",
}
#: What older metadata say in the place of an SPDX expression.
_SPDX = {
    "Apache 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "3-Clause BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: MIT License": "MIT",
}


def paragraphs(tree: Path) -> str:
    """A paragraph (DEP-5) for each distribution that pip has installed in ``tree``.

    Raises ValueError where one names no licence, or has no text of it.
    """
    infos = sorted(tree.glob("*.dist-info"), key=lambda path: path.name.lower())
    return "".join(_paragraph(Distribution.at(info), info) for info in infos)


def _paragraph(distribution: Distribution, info: Path) -> str:
    texts = [path.read_text(encoding="utf-8") for path in _texts(info)]
    if not texts:
        raise ValueError(f"{distribution.name} has no text of its licence")
    owners = [line for text in texts for line in _owners(text)] or [_author(distribution)]
    return (
        f"\nFiles: {_indented(_files(distribution))}\n"
        f"Copyright: {_indented(dict.fromkeys(owners))}\n"
        f"License: {_name(distribution)}\n"
        f" {_indented(line for text in texts for line in _shortened(text))}\n"
    )


def _name(distribution: Distribution) -> str:
    classifiers = distribution.metadata.get_all("Classifier") or []
    said = [_said(distribution, "License-Expression"), _said(distribution, "License")]
    said += [each for each in classifiers if each.startswith("License ::")]
    name = next((each for each in said if each), None)
    if name is None:
        raise ValueError(f"{distribution.name} does not name its licence")
    name = _SPDX.get(name, name)
    return name.replace(" AND ", " and ").replace(" OR ", " or ")


def _said(distribution: Distribution, field: str) -> str:
    return next(iter(distribution.metadata.get_all(field) or ()), "")


def _files(distribution: Distribution) -> list[str]:
    """Its own folders and modules. A folder above those of several is none's."""
    own = {path.parts[:-1] for path in distribution.files or () if len(path.parts) > 1}
    own -= {parts for parts in own if parts[0] in ("..", "bin")}
    tops = {parts for parts in own if not any(parts[:n] in own for n in range(1, len(parts)))}
    alone = {path.parts[0] for path in distribution.files or () if len(path.parts) == 1}
    return [
        f"{_FOLDER}/{name}" for name in sorted({*("/".join((*top, "*")) for top in tops), *alone})
    ]


def _texts(info: Path) -> Iterator[Path]:
    for path in sorted(info.rglob("*")):
        if path.is_file() and re.match(r"(?i)licen[cs]e|copying|notice", path.name):
            yield path


def _owners(text: str) -> Iterator[str]:
    for line in text.splitlines():
        match = re.match(
            r"(?i)\s*(?:copyright|©)\s+(?:\(c\)\s*|©\s*)?(\d{4}.*|\S+ .*\d{4}.*)", line
        )
        if match:
            yield match[1].strip()


def _author(distribution: Distribution) -> str:
    named = _said(distribution, "Author") or _said(distribution, "Author-email")
    return named or f"the authors of {distribution.name}"


def _shortened(text: str) -> list[str]:
    for phrase, name in _COMMON.items():
        if re.search(phrase, text):
            return [f"The whole text is in /usr/share/common-licenses/{name}."]
    return text.strip().splitlines()


def _indented(lines: Iterable[str]) -> str:
    return "\n ".join(line.rstrip() or "." for line in lines)
