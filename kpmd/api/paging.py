"""Cursors: opaque to clients, cheap to us."""

from __future__ import annotations

from kpmd.errors import Invalid

_MOST = 1 << 63


def position(after: str | None) -> int:
    """The number in a cursor, 0 for none. Raises Invalid for what was never a cursor of ours."""
    if after is None:
        return 0
    if not (after.isascii() and after.isdecimal() and len(after) < 20 and int(after) < _MOST):
        raise Invalid.at(["after"], "is not a cursor; take `next` of the page before")
    return int(after)


def span(after: str | None, limit: int, total: int) -> tuple[range, str | None]:
    """The places of a page in something of ``total`` entries, and the cursor of the next."""
    first = position(after)
    last = min(first + limit, total)
    return range(first, last), cursor(last if last < total else None)


def cursor(number: int | None) -> str | None:
    """The cursor for a number."""
    return None if number is None else str(number)
