"""What the daemon is doing at this moment: to be looked at, nothing depends on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from kpmd.bpf.progress import Progress
from kpmd.core.model import Client, Link, new_id
from kpmd.core.shelf import Shelf

What = Literal["load", "attach", "detach"]


@dataclass(eq=False, slots=True)
class Work:
    """A load, an attach or a detach under way."""

    what: What
    uid: int
    #: Which client asked for it; for a detach, the one that had made the link.
    client: str
    since: float
    progress: Progress
    #: The program that is linked, and the link that is taken apart.
    program: str = ""
    link: str = ""
    id: str = field(default_factory=lambda: new_id("wrk"))


class Board:
    """All work under way, in the order it came. For the event loop only.

    It costs an entry for each piece of work; who does it writes its ``Progress`` and nothing else.
    There is no more of it than requests under way and links that are listed.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self.shelf: Shelf[Work] = Shelf(lambda work: [("uid", work.uid)])

    @contextmanager
    def showing(
        self, what: What, client: Client, progress: Progress, program: str = ""
    ) -> Iterator[None]:
        """Show a client's load or attach as long as the block lasts."""
        work = Work(what, client.uid, client.id, self._now(), progress, program)
        self.shelf.add(work)
        try:
            yield
        finally:
            self.shelf.remove(work.id)

    def begin_detach(self, link: Link, progress: Progress) -> Work:
        """Show that a link is being taken apart, until ``end``."""
        work = Work("detach", link.uid, link.client, self._now(), progress, link.program, link.id)
        self.shelf.add(work)
        return work

    def end(self, work: Work) -> None:
        """It is done."""
        self.shelf.remove(work.id)
