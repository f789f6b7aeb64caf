"""What is in the fake kernel's maps: the types' rules are those of the real kernel."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from kpmd.bpf.abi import KEYED_TYPES, QUEUE_TYPES
from kpmd.bpf.content import Mode
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.map_errors import no_entries, no_queue, not_deletable, not_writable, refusal
from kpmd.bpf.maps import Chunk, Layout
from kpmd.bpf.objects import MapDetails
from kpmd.errors import Invalid

#: Possible CPUs of the fake machine.
CPUS = 2

_STACK = 23


class FakeContent:
    """Implements ``kpmd.runtime.kernel.MapContent`` over a dictionary. Cursors are keys in hex.

    ``enter`` is called with each method's name, to fail or to block there.
    """

    def __init__(
        self,
        enter: Callable[[str], None],
        fd: OwnedFd,
        details: MapDetails,
        entries: dict[bytes, list[bytes]],
        queue: list[bytes],
    ) -> None:
        self.layout = Layout.of(details, CPUS)
        self._enter = enter
        self._fd = fd
        self._details = details
        self._entries = entries
        self._queue = queue

    def _begin(self, name: str, *, queue: bool = False) -> None:
        self._enter(name)
        self._fd.fileno()  # raises Closed where it is
        if queue and self._details.type_number not in QUEUE_TYPES:
            raise no_queue(self._details)
        if not queue and self._details.type_number not in KEYED_TYPES:
            raise no_entries(self._details)

    def lookup(self, key: bytes) -> bytes | None:
        self._begin("lookup")
        found = self._entries.get(key)
        return None if found is None else self.layout.join(found)

    def page(self, after: str | None, limit: int, most: int) -> Chunk:
        self._begin("page")
        limit = max(1, min(limit, most // (self.layout.key_size + self.layout.values)))
        try:
            behind = None if after is None else bytes.fromhex(after)
        except ValueError:
            behind = b""
        if behind is not None and len(behind) != self.layout.key_size:
            raise Invalid.at(["after"], "is not a cursor of this map")
        keys = [key for key in sorted(self._entries) if behind is None or key > behind]
        given = keys[:limit]
        return Chunk(
            memoryview(b"".join(given)),
            memoryview(b"".join(self.layout.join(self._entries[key]) for key in given)),
            len(given),
            given[-1].hex() if len(keys) > limit else None,
        )

    def update(self, items: Sequence[tuple[bytes, bytes]], mode: Mode) -> None:
        self._begin("update")
        if (refused := not_writable(self._details)) is not None:
            raise refused
        for done, (key, value) in enumerate(items):
            assert len(key) == self.layout.key_size
            assert len(value) == self.layout.values
            error = 0
            if mode == "create" and key in self._entries:
                error = errno.EEXIST
            elif mode == "replace" and key not in self._entries:
                error = errno.ENOENT
            elif key not in self._entries and len(self._entries) >= self._details.max_entries:
                error = errno.E2BIG
            if error:
                raise refusal(error, self._details, done, write=True)
            self._entries[key] = self.layout.split(value)

    def delete(self, keys: Sequence[bytes]) -> int:
        self._begin("delete")
        if (error := not_deletable(self._details)) is not None:
            raise error
        return sum(self._entries.pop(key, None) is not None for key in keys)

    def clear(self, after: str | None, limit: int, most: int) -> tuple[int, str | None]:
        chunk = self.page(None, limit, most)
        size = self.layout.key_size
        keys = [bytes(chunk.keys[at : at + size]) for at in range(0, len(chunk.keys), size)]
        return self.delete(keys), chunk.next

    def push(self, value: bytes, *, overwrite: bool) -> None:
        self._begin("push", queue=True)
        assert len(value) == self.layout.values
        if len(self._queue) >= self._details.max_entries:
            if not overwrite:
                raise refusal(errno.E2BIG, self._details, None, write=True)
            del self._queue[0]
        self._queue.append(value)

    def pop(self, *, keep: bool) -> bytes | None:
        self._begin("peek" if keep else "pop", queue=True)
        if not self._queue:
            return None
        at = -1 if self._details.type_number == _STACK else 0
        return self._queue[at] if keep else self._queue.pop(at)

    def write_at(self, offset: int, data: bytes) -> None:
        self._begin("write_at")
        value = bytearray(self._entries[bytes(self.layout.key_size)][0])
        value[offset : offset + len(data)] = data
        self._entries[bytes(self.layout.key_size)] = [bytes(value)]
