"""Finds this machine's Debian mirror in its own apt sources.

Both formats are read: deb822 (``*.sources``) and one-line (``*.list``).  No address is written
down anywhere in the project: what the machine uses already is what it may reach.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.vm.errors import VmError

APT = Path("/etc/apt")
MIRROR_VARIABLE = "KPMD_VM_MIRROR"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_SUITE = re.compile(
    r"(?:(?:old)*stable|testing|unstable|sid|bullseye|bookworm|trixie|forky|duke)"
    r"(?:-updates|-backports|-security|/updates)?"
)


@dataclass(frozen=True)
class Source:
    """One place that packages come from: an address and the suites used of it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


@dataclass(frozen=True)
class Mirror:
    """The addresses of the Debian archive and of its security archive."""

    main: str
    security: str

    def of(self, suite: str) -> str:
        """Return the address that has a suite."""
        return self.security if suite.endswith("-security") else self.main


def parse_deb822(text: str) -> Iterator[Source]:
    """Yield the sources of a ``*.sources`` file."""
    for stanza in re.split(r"\n(?:[ \t]*\n)+", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").strip().lower() in ("no", "false", "0"):
            continue
        suites = tuple(fields.get("suites", "").split())
        components = tuple(fields.get("components", "").split())
        for uri in fields.get("uris", "").split():
            yield Source(uri, suites, components)


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            if name:
                fields[name] += " " + line.strip()
            continue
        key, colon, value = line.partition(":")
        if colon:
            name = key.strip().lower()
            fields[name] = value.strip()
    return fields


def parse_one_line(text: str) -> Iterator[Source]:
    """Yield the sources of a ``*.list`` file."""
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        match = re.fullmatch(r"deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)((?:\s+\S+)*)", line)
        if match:
            yield Source(match[1], (match[2],), tuple(match[3].split()))


def find_mirror(sources: Iterable[Source]) -> Mirror:
    """Pick the Debian archive among the sources; other archives use the suites' names too."""
    main: list[str] = []
    security: list[str] = []
    for source in sources:
        suites = [suite for suite in source.suites if _SUITE.fullmatch(suite)]
        if "main" not in source.components or not suites:
            continue
        is_security = all(suite.endswith(("-security", "/updates")) for suite in suites)
        (security if is_security else main).append(source.uri.rstrip("/"))
    # The path tells Debian's own archive from a third party's that names its suites alike.
    main.sort(key=lambda uri: not uri.endswith("/debian"))
    security.sort(key=lambda uri: not uri.endswith("debian-security"))
    if not main:
        raise VmError(
            f"no Debian mirror in this machine's apt sources; name one in {MIRROR_VARIABLE}"
        )
    return Mirror(main[0], security[0] if security else _security_beside(main[0]))


def _security_beside(main: str) -> str:
    return f"{main}-security" if main.endswith("/debian") else main


def machine_sources(apt: Path = APT) -> Iterator[Source]:
    """Yield all sources that this machine's apt uses."""
    lists = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    for path in lists:
        if path.is_file():
            yield from parse_one_line(path.read_text(encoding="utf-8", errors="replace"))
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        yield from parse_deb822(path.read_text(encoding="utf-8", errors="replace"))


def mirror(environ: Mapping[str, str] = os.environ, apt: Path = APT) -> Mirror:
    """Return the mirror to use: the variable's, else the machine's own."""
    named = environ.get(MIRROR_VARIABLE, "").rstrip("/")
    if named:
        return Mirror(named, _security_beside(named))
    return find_mirror(machine_sources(apt))


def sources_list(mirror: Mirror, suites: Iterable[str], keyring: Path = KEYRING) -> str:
    """Return a one-line sources file for these suites."""
    signed = f"[signed-by={keyring}] " if keyring.is_file() else ""
    return "".join(f"deb {signed}{mirror.of(suite)} {suite} main\n" for suite in suites)
