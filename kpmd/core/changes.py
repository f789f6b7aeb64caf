"""What the registry tells its caller: what is to be closed, and what has happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kpmd.core.model import Client, Lease, Link, Map, Program, Reason


@dataclass
class Ending:
    """What is to be closed: links to detach, and programs and maps that nothing needs any more."""

    links: list[Link] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.links or self.programs or self.maps)


@dataclass(frozen=True)
class Event:
    """Something was created, began to be detached (links only), or ended, and why."""

    what: Literal["program", "link", "client", "lease"]
    event: Literal["created", "detaching", "ended"]
    record: Program | Link | Client | Lease
    reason: Reason | None = None
