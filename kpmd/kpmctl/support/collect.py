"""From nothing to a bundle: gets all parts at once, takes names out, says what was got."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kpmd import __version__
from kpmd.client import AsyncClient
from kpmd.kpmctl.output import clean
from kpmd.kpmctl.support import archive, daemon, machine
from kpmd.kpmctl.support.parts import MOST_BYTES, Part, Result, take
from kpmd.kpmctl.support.redact import Redactor

#: Of the manifest's form.
FORMAT = 1

_README = """\
What `kpmctl support-bundle` found out about kpmd on one machine.

manifest.json  what was asked, what came of it, and why some of it is not here
daemon/        the daemon's answers to who made this
machine/       the kernel, and what kpmd needs of it
unit/          kpmd's units, and the end of their journal
config/        what the administrator has written

{names}
Names of functions, programs, maps and the policy's rules, ids and times are as they are.
"""

_REDACTED = """\
Users, groups, commands, labels, paths and the machine's name have placeholders: user-1 and uid-1
are the same user wherever they stand. kpmd's own names, root's and the system's paths are left."""

_AS_IT_IS = "Names of users, commands, labels and paths are as they are."


@dataclass(frozen=True)
class Wanted:
    """What to put into a bundle. ``limit``: seconds for each part that has no limit of its own."""

    address: str
    redact: bool = True
    lists: bool = True
    journal: int = 1000
    config: bool = True
    limit: float = 10.0


@dataclass(frozen=True)
class Bundle:
    """What was found out: the content of each file, the manifest among them.

    ``results`` are for who made it: in words that have no placeholders.
    """

    files: dict[str, bytes]
    manifest: dict[str, Any]
    results: tuple[Result, ...]
    when: int


async def collect(wanted: Wanted, tell: Callable[[Sequence[str]], None]) -> Bundle:
    """Get everything. ``tell`` is called with the files of the parts that are still to come."""
    begun = time.time()
    async with AsyncClient(wanted.address, max_answer=MOST_BYTES) as client:
        parts = daemon.parts(client, wanted.lists)
        here = machine.parts(config=wanted.config, journal=wanted.journal, redacted=wanted.redact)
        left_out = "the daemon is on another machine: make a bundle there, too"
        remote = client.address.startswith("ssh://")
        results = await _take_all(parts if remote else parts + here, wanted.limit, tell)
        if remote:
            results += [Result(each, "left-out", left_out, None, 0.0) for each in here]
    return _made(wanted, results, begun)


async def _take_all(
    parts: Sequence[Part], limit: float, tell: Callable[[Sequence[str]], None]
) -> list[Result]:
    """All at once: a daemon that does not answer costs the time of one part, not of each."""
    left = [part.file for part in parts]

    async def one(part: Part) -> Result:
        result = await take(part, limit)
        left.remove(part.file)
        tell(left)
        return result

    tell(left)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(part)) for part in parts]
    return [task.result() for task in tasks]


def _made(wanted: Wanted, results: Sequence[Result], begun: float) -> Bundle:
    redactor = _redactor() if wanted.redact else None
    if redactor is not None:
        for each in results:
            _learn(redactor, each)
    files: dict[str, bytes] = {}
    entries = []
    written = []
    for each in results:
        data, result = _content(each, redactor)
        written.append(result)
        if data is not None:
            files[result.part.file] = data
        entries.append(_entry(result, data, redactor))
    manifest = {
        "format": FORMAT,
        "kpmctl": __version__,
        "daemon_at": redactor.text(wanted.address) if redactor else wanted.address,
        "root": os.geteuid() == 0,
        "redacted": wanted.redact,
        "began_at": datetime.fromtimestamp(begun, UTC).isoformat(),
        "seconds": round(time.time() - begun, 3),
        "parts": entries,
    }
    files["manifest.json"] = _json(manifest)
    names = _REDACTED if wanted.redact else _AS_IT_IS
    files["README.txt"] = _README.format(names=names).encode()
    return Bundle(files, manifest, tuple(written), int(begun))


def _redactor() -> Redactor:
    name = os.uname().nodename
    try:
        users = [pwd.getpwuid(os.getuid()).pw_name]
    except KeyError:
        users = []
    users += [each for each in (os.environ.get("SUDO_USER"),) if each]
    return Redactor({name, name.partition(".")[0]}, users)


def _learn(redactor: Redactor, result: Result) -> None:
    try:
        redactor.learn(result.data)
    except RecursionError:
        return  # nor will it be taken in


def _content(result: Result, redactor: Redactor | None) -> tuple[bytes | None, Result]:
    """A part as it is written, if it is; nothing that names are not taken out of ever is."""
    if result.outcome != "got":
        return None, result
    data = result.data
    try:
        if isinstance(data, str):
            text = redactor.text(data) if redactor else data
            return clean(text, keep="\n\t").encode(), result
        return _json(redactor.applied(data) if redactor else data), result
    except (RecursionError, ValueError, TypeError) as error:
        return None, replace(result, outcome="failed", detail=f"what came makes no sense: {error}")


def _entry(result: Result, data: bytes | None, redactor: Redactor | None) -> dict[str, Any]:
    detail, asked = result.detail, result.part.asked
    return {
        "file": result.part.file,
        "asked": redactor.text(asked) if redactor else asked,
        "outcome": result.outcome,
        "detail": redactor.text(detail) if redactor and detail else detail,
        "seconds": round(result.seconds, 3),
        "bytes": len(data or b""),
    }


def _json(data: object) -> bytes:
    """Printable ASCII on lines, whatever the names in it."""
    return json.dumps(data, indent=1).encode() + b"\n"


def save(bundle: Bundle, path: Path) -> None:
    """Write it. Raises OSError; then there is no file."""
    folder = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    archive.write(path, archive.packed(folder, bundle.files, bundle.when))
