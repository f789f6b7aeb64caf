"""How much one user may have, and what each has: what is there, and what is being made."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from kpmd.errors import Quota

#: What lasts beyond a request, and is counted while it does.
Kept = Literal["programs", "links", "targets", "map_bytes", "leases"]
KEPT: tuple[Kept, ...] = ("programs", "links", "targets", "map_bytes", "leases")


@dataclass(frozen=True)
class Limits:
    """The most that one user may have. The defaults are for users without privileges."""

    programs: int = 64
    links: int = 256
    targets_per_link: int = 1 << 17
    targets: int = 1 << 18
    map_bytes: int = 64 << 20
    leases: int = 64
    streams: int = 16
    #: Requests in flight.
    requests: int = 32
    connections: int = 128
    body_bytes: int = 4 << 20
    object_bytes: int = 2 << 20
    load_seconds: float = 10.0

    @staticmethod
    def unlimited() -> Limits:
        """No limits but those of the kernel and of the daemon's configuration."""
        return UNLIMITED


UNLIMITED = Limits(
    programs=sys.maxsize,
    links=sys.maxsize,
    targets_per_link=1 << 20,  # MAX_KPROBE_MULTI_CNT of the kernel
    targets=sys.maxsize,
    map_bytes=sys.maxsize,
    leases=sys.maxsize,
    streams=sys.maxsize,
    requests=sys.maxsize,
    connections=sys.maxsize,
    body_bytes=sys.maxsize,
    object_bytes=sys.maxsize,
    load_seconds=math.inf,
)

#: Users who have nothing of which the limits are remembered, at the most.
_REMEMBERED = 1024

#: For each limit on a number of things: what they are, and what to do to have fewer.
_WORDS = {
    "programs": ("programs", "delete some"),
    "links": ("links", "detach some"),
    "targets": ("targets", "detach links"),
    "map_bytes": (
        "bytes of maps",
        "delete programs, let go of maps that were handed over, or make max_entries smaller",
    ),
    "leases": ("leases", "end some"),
    "streams": ("streams", "close some"),
    "requests": ("requests in flight", "wait for their answers"),
    "connections": ("connections", "close some"),
}


def exceeded(limit: str, used: int, most: int, asked: int = 1) -> Quota:
    """The refusal of ``asked`` more of what a user has ``used`` already, of ``most``."""
    noun, advice = _WORDS[limit]
    more = "" if asked == 1 else f", and {asked} more are asked for"
    return Quota(
        f"you have {used} {noun} of {most} ({limit}){more}: {advice}, or ask the administrator",
        limit=limit,
        used=used,
        most=most,
        asked=None if asked == 1 else asked,
    )


def check_targets_per_link(number: int, most: int) -> None:
    """Raise Quota where one link would have more targets than the most that it may have."""
    if number > most:
        raise Quota(
            f"the link would have {number} targets; {most} are the most (targets_per_link): "
            "make several links, or ask the administrator",
            limit="targets_per_link",
            used=0,
            most=most,
            asked=number,
        )


class Accounts:
    """What each user has. May be used in any thread: targets are claimed where they are found."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        #: Of each user who has anything; what is being made is in it.
        self._used: dict[int, dict[str, int]] = {}
        #: What users may have, as of when they last asked for something.
        self._limits: dict[int, Limits] = {}

    def add(self, uid: int, what: Kept, number: int) -> None:
        """Count ``number`` more of something; fewer where it is negative."""
        if not number:
            return
        with self.lock:
            used = self._used.setdefault(uid, dict.fromkeys(KEPT, 0))
            used[what] += number
            if not any(used.values()):
                del self._used[uid]

    def used(self, uid: int) -> dict[str, int]:
        """What a user has, and is having made, by the names of the limits on it."""
        with self.lock:
            return dict(self._used.get(uid) or dict.fromkeys(KEPT, 0))

    def fullest(self) -> dict[str, float]:
        """For each limit what part of it the user has who has most of it, from 0 to 1."""
        with self.lock:
            users = [(used, self._limits.get(uid, UNLIMITED)) for uid, used in self._used.items()]
            return {
                what: max(
                    (used[what] / max(1, getattr(most, what)) for used, most in users), default=0
                )
                for what in KEPT
            }

    def check(self, uid: int, limits: Limits, what: Kept, number: int, had: int = 0) -> None:
        """Raise Quota where ``number`` in place of ``had`` would be more than the user may have."""
        with self.lock:
            if len(self._limits) >= _REMEMBERED:
                self._limits = {
                    each: self._limits[each] for each in self._used.keys() & self._limits
                }
            self._limits[uid] = limits
        used = self.used(uid)[what] - had
        most: int = getattr(limits, what)
        if number > had and used + number > most:
            raise exceeded(what, used, most, number)

    def claim(self, uid: int, limits: Limits) -> Claim:
        """A claim for what is about to be made for a user; it begins with nothing."""
        return Claim(self, uid, limits)

    @contextmanager
    def settle(self, claim: Claim | None) -> Iterator[None]:
        """Inside, the records are listed that count in the place of the claim.

        No thread sees them missing in between, or counted twice.
        """
        with self.lock:
            if claim is not None:
                claim.release()
            yield


class Claim:
    """What is being made for a user. It counts as theirs until it is settled, or its block ends."""

    def __init__(self, accounts: Accounts, uid: int, limits: Limits) -> None:
        self._accounts = accounts
        self._uid = uid
        self._limits = limits
        self._claimed: dict[Kept, int] = {}

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def want(self, what: Kept, number: int) -> None:
        """Claim ``number`` of something, in place of what was claimed of it before.

        Raises Quota where the user may not have that many; the claim is then as it was.
        """
        with self._accounts.lock:
            had = self._claimed.get(what, 0)
            self._accounts.check(self._uid, self._limits, what, number, had)
            self._accounts.add(self._uid, what, number - had)
            self._claimed[what] = number

    def room(self, what: Kept) -> int:
        """How much the user may still have of something."""
        most: int = getattr(self._limits, what)
        return max(0, most - self._accounts.used(self._uid)[what])

    def release(self) -> None:
        """Claim nothing any more."""
        with self._accounts.lock:
            for what, number in self._claimed.items():
                self._accounts.add(self._uid, what, -number)
            self._claimed.clear()
