"""What the kernel's refusals mean for maps, in words that say what to do."""

from __future__ import annotations

import errno

from kpmd.bpf.abi import OUTER_TYPES
from kpmd.bpf.objects import MapDetails
from kpmd.errors import (
    Conflict,
    Invalid,
    KernelError,
    KpmdError,
    NotFound,
    NotSupported,
    TooLarge,
    errno_name,
)

_HAND_OVER = "POST /maps/{id}/fd hands the map itself over"

#: What there is instead of entries, by type.
_INSTEAD = {
    "queue": "POST /maps/{id}/push and /pop and GET /maps/{id}/peek are for it",
    "stack": "POST /maps/{id}/push and /pop and GET /maps/{id}/peek are for it",
    "ringbuf": "GET /maps/{id}/records reads it as a stream",
    "perf_event_array": "GET /maps/{id}/records reads it as a stream",
}

#: Types whose entries are there from the start and for good.
_ARRAYS = frozenset({"array", "percpu_array"})
_LPM = "lpm_trie"


def no_entries(details: MapDetails) -> NotSupported:
    """The map's type has no entries to be read or written by key."""
    instead = _INSTEAD.get(details.type, _HAND_OVER)
    return NotSupported(
        f"a map of type {details.type} has no entries that can be read by key: {instead}"
    )


def no_queue(details: MapDetails) -> NotSupported:
    """The map's type has no values to push and pop."""
    return NotSupported(
        f"values are pushed to and popped from queues and stacks; this map's type is {details.type}"
    )


def not_deletable(details: MapDetails) -> NotSupported | None:
    """Why none of the map's entries can be deleted; None: they can."""
    if details.type not in _ARRAYS:
        return None
    return NotSupported(
        f"entries of type {details.type} cannot be deleted: write zeros in their place"
    )


def not_writable(details: MapDetails) -> NotSupported | None:
    """Why none of the map's entries can be written; None: they can.

    The values of maps of maps are file descriptors of who writes them, which are this process's.
    """
    if details.type == "stack_trace":
        return NotSupported("stack traces are written by bpf_get_stackid alone")
    if details.type_number in OUTER_TYPES:
        return NotSupported(
            f"entries of type {details.type} are maps, which cannot be named here: {_HAND_OVER}"
        )
    return None


def refusal(number: int, details: MapDetails, done: int | None, *, write: bool) -> KpmdError:
    """What an errno means. ``done``: how many entries were written or deleted before."""
    if number == errno.EPERM and write:
        return NotSupported(
            "this map cannot be written: it is frozen, as .rodata is, or was made read-only; "
            "constants are given when the object is loaded (source.globals)",
            done=done,
        )
    if number == errno.EPERM:
        return NotSupported("this map cannot be read: it was made write-only")
    if number == errno.EEXIST:
        return Conflict(
            "there is an entry of that key already: mode any or replace writes over it", done=done
        )
    if write and number == errno.ENOENT:
        return NotFound(
            "there is no entry of that key to be replaced: mode any makes one", done=done
        )
    if number == errno.E2BIG and details.type in _ARRAYS:
        last = details.max_entries - 1
        return Invalid(f"the key is no index of this array, which has 0 to {last}", done=done)
    if write and number in (errno.E2BIG, errno.ENOSPC):
        return TooLarge(
            f"the map is full: it takes {details.max_entries} entries; delete some, or load it "
            "with a larger max_entries",
            errno=errno_name(number),
            done=done,
        )
    if number == errno.EINVAL and details.type == _LPM:
        return Invalid(
            "the kernel does not take this key: its first four bytes are the length of its prefix "
            f"in bits, at most {8 * (details.key_size - 4)}",
            done=done,
        )
    what = "write" if write else "read"
    return KernelError(
        f"the kernel did not {what} the map: {errno_name(number)}", number, done=done
    )
