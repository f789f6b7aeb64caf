"""What is in a map: its entries are read, written and deleted.

In batches where the kernel has them: since 5.6 for hashes and arrays, since 5.11 to 5.15 for other
types. Where there is none (ENOTSUPP), each entry takes a system call or two of its own.
"""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Sequence
from typing import Literal

from kpmd.bpf.abi import (
    BUCKET_TYPES,
    KEYED_TYPES,
    QUEUE_TYPES,
    Cmd,
    MapBatchAttr,
    MapElemAttr,
    MapFlag,
    UpdateFlag,
)
from kpmd.bpf.batches import Batch, address, buffer, joined
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.map_errors import no_entries, no_queue, not_deletable, not_writable, refusal
from kpmd.bpf.maps import Chunk, Layout
from kpmd.bpf.objects import MapDetails
from kpmd.bpf.syscall import BpfError, bpf
from kpmd.errors import Invalid, TooLarge

Mode = Literal["any", "create", "replace"]
_FLAGS = {"any": UpdateFlag.ANY, "create": UpdateFlag.NOEXIST, "replace": UpdateFlag.EXIST}

#: Bytes that one page is read into at the most; a single entry has no more either.
MOST_BYTES = 16 << 20

#: A cursor: a hash's bucket, and how many of its entries have been read; or the last key.
_CURSOR = re.compile(r"b(?P<bucket>[0-9]{1,10})(\.(?P<skip>[0-9]{1,7}))?|k(?P<key>([0-9a-f]{2})+)")

#: How often a bucket is tried that something else on this CPU has locked (EBUSY).
_TRIES = 5

#: What says that there is no such batch command; the first is ENOTSUPP, unknown to ``errno``.
_NO_BATCH = (524, errno.EINVAL)


class MapContent:
    """The content of one map, with buffers made once: for one thread.

    ``cpus``: the machine's possible ones. Raises TooLarge where a single entry is. All methods
    raise NotSupported where the map's type cannot do that, and KernelError for what else the kernel
    refuses. Keys and values have the sizes of ``layout``.
    """

    def __init__(self, fd: OwnedFd, details: MapDetails, cpus: int) -> None:
        self.layout = Layout.of(details, cpus)
        self._fd = fd
        self._details = details
        self._row = self.layout.key_size + self.layout.values
        if self._row > MOST_BYTES:
            raise TooLarge(
                f"an entry of this map has {self._row} bytes, and {MOST_BYTES} are read at once: "
                "POST /maps/{id}/fd hands the map itself over"
            )
        self._key = buffer(self.layout.key_size)
        self._next = buffer(self.layout.key_size)
        self._value = buffer(self.layout.values)

    # Entries

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, None where there is none; in an LPM trie that of the best prefix."""
        self._check_keyed()
        return self._lookup(key)

    def page(self, after: str | None, limit: int, most: int) -> Chunk:
        """At most ``limit`` entries, and ``most`` bytes or one entry, behind the cursor ``after``.

        They come in the kernel's order; those that come or go meanwhile are given or not. Where a
        hash has no batches, a key that goes is followed by the first one again. Raises Invalid for
        a cursor that is none.
        """
        self._check_keyed()
        limit = self._fitting(limit, most)
        if after is None:
            return self._by_bucket(Cmd.MAP_LOOKUP_BATCH, 0, 0, limit) or self._by_key(None, limit)
        cursor = _CURSOR.fullmatch(after)
        if cursor is not None and cursor["key"] and len(cursor["key"]) == 2 * len(self._key):
            return self._by_key(bytes.fromhex(cursor["key"]), limit)
        if cursor is not None and cursor["bucket"]:
            bucket, skip = int(cursor["bucket"]), int(cursor["skip"] or 0)
            if bucket < 1 << 32 and (skip + limit) * self._row <= MOST_BYTES:
                chunk = self._by_bucket(Cmd.MAP_LOOKUP_BATCH, bucket, skip, limit)
                if chunk is not None:
                    return chunk
        raise Invalid.at(["after"], "is not a cursor of this map: take `next` of the page before")

    def update(self, items: Sequence[tuple[bytes, bytes]], mode: Mode) -> None:
        """Write entries in their order, up to the first that the kernel refuses.

        Its error tells as ``done`` how many were written: Conflict and NotFound (modes create and
        replace), TooLarge where the map is full, Invalid for a prefix that is too long.
        """
        self._check_keyed()
        if (error := not_writable(self._details)) is not None:
            raise error
        done = self._update_batch(items) if mode == "any" and len(items) > 1 else 0
        # What the batch stopped at, if anything: its errno is not told apart from the batch's own.
        for position in range(done, len(items)):
            self._key[:], self._value[:] = items[position]
            if number := self._element(Cmd.MAP_UPDATE_ELEM, self._value, _FLAGS[mode]):
                raise refusal(number, self._details, position, write=True)

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete entries: how many there were of them. An error tells it, too, as ``done``."""
        self._check_deletable()
        found, position, batches = 0, 0, len(keys) > 1
        while position < len(keys):
            if batches:
                done = self._delete_batch(keys[position:])
                found, position, batches = found + done, position + done, done > 0
                continue
            self._key[:] = keys[position]
            error = self._element(Cmd.MAP_DELETE_ELEM)
            if error not in (0, errno.ENOENT):
                raise refusal(error, self._details, found, write=True)
            found, position = found + (not error), position + 1
        return found

    def clear(self, after: str | None, limit: int, most: int) -> tuple[int, str | None]:
        """Delete some entries: how many, and the cursor to go on from; None: that was all."""
        self._check_deletable()
        if after is None or after.startswith("b"):
            bucket = int(after[1:]) if after else 0
            chunk = self._by_bucket(
                Cmd.MAP_LOOKUP_AND_DELETE_BATCH, bucket, 0, self._fitting(limit, most)
            )
            if chunk is not None:
                return chunk.count, chunk.next
        # Always from the first on: the key that a cursor would name is gone.
        chunk = self.page(None, limit, most)
        size = self.layout.key_size
        keys = [bytes(chunk.keys[at : at + size]) for at in range(0, len(chunk.keys), size)]
        return self.delete(keys), chunk.next and "k"

    # Queues and stacks

    def push(self, value: bytes, *, overwrite: bool) -> None:
        """Put a value in; ``overwrite``: in place of the oldest where there is no room.

        Raises TooLarge where the map is full.
        """
        self._check_queue()
        self._value[:] = value
        flags = UpdateFlag.EXIST if overwrite else UpdateFlag.ANY
        if error := self._element(Cmd.MAP_UPDATE_ELEM, self._value, flags):
            raise refusal(error, self._details, None, write=True)

    def pop(self, *, keep: bool) -> bytes | None:
        """Take the next value out, or only look at it (``keep``); None where there is none."""
        self._check_queue()
        error = self._element(
            Cmd.MAP_LOOKUP_ELEM if keep else Cmd.MAP_LOOKUP_AND_DELETE_ELEM, self._value
        )
        if error == errno.ENOENT:
            return None
        if error:
            raise refusal(error, self._details, None, write=not keep)
        return bytes(self._value)

    # Variables

    def write_at(self, offset: int, data: bytes) -> None:
        """Write bytes of the only value of an array: libbpf keeps global variables in such.

        Where the map can be mapped (libbpf makes it so from kernel 5.5 on), no other bytes are
        written; else the value is read and written as a whole, over what a program has written to
        other variables in between.
        """
        if offset < 0 or offset + len(data) > self.layout.values:
            raise ValueError("the bytes are not within the value")
        if self._details.flags & MapFlag.MMAPABLE:
            self._write_mapped(offset, data)
            return
        key = bytes(self.layout.key_size)
        value = bytearray(self.lookup(key) or self.layout.values)
        value[offset : offset + len(data)] = data
        self.update([(key, bytes(value))], "any")

    def _write_mapped(self, offset: int, data: bytes) -> None:
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        place = slice(offset - start, offset - start + len(data))
        try:
            with self._fd.borrow() as fd, mmap.mmap(fd, place.stop, offset=start) as memory:
                memory[place] = data
        except OSError as error:
            raise refusal(error.errno or 0, self._details, None, write=True) from error

    # What the type can do

    def _check_keyed(self) -> None:
        if self._details.type_number not in KEYED_TYPES:
            raise no_entries(self._details)

    def _check_deletable(self) -> None:
        self._check_keyed()
        if (error := not_deletable(self._details)) is not None:
            raise error

    def _check_queue(self) -> None:
        if self._details.type_number not in QUEUE_TYPES:
            raise no_queue(self._details)

    def _fitting(self, limit: int, most: int) -> int:
        return max(1, min(limit, most // self._row))

    # System calls

    def _call(self, cmd: Cmd, attr: MapElemAttr | MapBatchAttr) -> int:
        """The errno; 0 where it succeeded."""
        for _ in range(_TRIES):
            try:
                with self._fd.borrow() as attr.map_fd:
                    bpf(cmd, attr)
            except BpfError as error:
                number = error.errno or errno.EIO
                if number != errno.EBUSY:
                    return number
            else:
                return 0
        return errno.EBUSY

    def _element(
        self, cmd: Cmd, value: memoryview | None = None, flags: UpdateFlag = UpdateFlag.ANY
    ) -> int:
        """A command on the key that stands in the buffer; its errno."""
        attr = MapElemAttr(key=address(self._key), value=address(value), flags=flags)
        return self._call(cmd, attr)

    def _lookup(self, key: bytes) -> bytes | None:
        self._key[:] = key
        error = self._element(Cmd.MAP_LOOKUP_ELEM, self._value)
        if error == errno.ENOENT:
            return None
        if error:
            raise refusal(error, self._details, None, write=False)
        return bytes(self._value)

    def _next_key(self, key: bytes | memoryview | None) -> bytes | None:
        """The key behind ``key`` (None: the first), or None behind the last.

        Behind a key that is gone comes the first one (kernel/bpf/hashtab.c).
        """
        attr = MapElemAttr(value=address(self._next))
        if key is not None:
            self._key[:] = key
            attr.key = address(self._key)
        error = self._call(Cmd.MAP_GET_NEXT_KEY, attr)
        if error == errno.ENOENT:
            return None
        if error:
            raise refusal(error, self._details, None, write=False)
        return bytes(self._next)

    # Batches

    def _batch(self, cmd: Cmd, after: bytes | None, room: int) -> Batch:
        """Read ``room`` entries behind one of the kernel's cursors."""
        at = buffer(len(after or b""))
        at[:] = after or b""
        made = Batch(
            buffer(room * self.layout.key_size),
            buffer(room * self.layout.values),
            buffer(max(4, self.layout.key_size)),
        )
        attr = MapBatchAttr(
            in_batch=address(at),
            out_batch=address(made.cursor),
            keys=address(made.keys),
            values=address(made.values),
            count=room,
        )
        made.error = self._call(cmd, attr)
        if made.error in (0, errno.ENOENT):
            made.count = attr.count
        return made

    def _update_batch(self, items: Sequence[tuple[bytes, bytes]]) -> int:
        """How many entries were written: all, or those before the first that failed."""
        keys = joined([key for key, _ in items], self.layout.key_size)
        values = joined([value for _, value in items], self.layout.values)
        attr = MapBatchAttr(keys=address(keys), values=address(values), count=len(items))
        # A batch that never began leaves the count as it is.
        done = attr.count if not self._call(Cmd.MAP_UPDATE_BATCH, attr) else attr.count % len(items)
        return int(done)

    def _delete_batch(self, keys: Sequence[bytes]) -> int:
        """How many were deleted: all, or those before the first that failed."""
        all_keys = joined(keys, self.layout.key_size)
        attr = MapBatchAttr(keys=address(all_keys), count=len(keys))
        done = attr.count if not self._call(Cmd.MAP_DELETE_BATCH, attr) else attr.count % len(keys)
        return int(done)

    def _by_bucket(self, cmd: Cmd, bucket: int, skip: int, limit: int) -> Chunk | None:
        """A page from a hash's bucket on, but for its first ``skip`` entries.

        None: there is no batch for this map. The kernel gives whole buckets; where there is no room
        for the first one (ENOSPC) it gets more, and the page is a part of it.
        """
        if self._details.type_number not in BUCKET_TYPES:
            return None
        while True:
            room = skip + limit
            batch = self._batch(cmd, bucket.to_bytes(4, "little"), room)
            while batch.error == errno.ENOSPC and room * self._row <= MOST_BYTES:
                room *= 2
                batch = self._batch(cmd, bucket.to_bytes(4, "little"), room)
            if batch.error == errno.ENOSPC:
                raise TooLarge(
                    "too many keys of this hash fall into one bucket: POST /maps/{id}/fd hands the "
                    "map itself over"
                )
            if batch.error in _NO_BATCH or not (batch.count or batch.error):
                return None
            if batch.error not in (0, errno.ENOENT):
                raise refusal(batch.error, self._details, None, write=False)
            last = batch.count
            if cmd is Cmd.MAP_LOOKUP_BATCH:  # else more were deleted than asked for
                last = min(last, skip + limit)
            following: str | None = None
            if last < batch.count:
                following = f"b{bucket}.{last}"
            elif not batch.error and self._has_more(batch):
                following = f"b{batch.bucket()}"
            if last > skip or following is None:
                return batch.chunk(self.layout, min(skip, last), last, following)
            bucket, skip = batch.bucket(), 0

    def _by_key(self, key: bytes | None, limit: int) -> Chunk:
        """A page behind a key, in a batch where types without buckets have one."""
        if self._details.type_number not in BUCKET_TYPES:
            batch = self._batch(Cmd.MAP_LOOKUP_BATCH, key, limit)
            if batch.error == errno.ENOENT:
                return batch.chunk(self.layout, 0, batch.count, None)
            if not batch.error and batch.count:
                following = None
                if self._has_more(batch):
                    following = f"k{batch.cursor[: self.layout.key_size].hex()}"
                return batch.chunk(self.layout, 0, batch.count, following)
        return self._one_by_one(key, limit)

    def _has_more(self, batch: Batch) -> bool:
        """Whether its last entry has one behind it: the kernel's cursor alone does not tell."""
        size = self.layout.key_size
        return self._next_key(batch.keys[(batch.count - 1) * size : batch.count * size]) is not None

    def _one_by_one(self, key: bytes | None, limit: int) -> Chunk:
        keys: list[bytes] = []
        values: list[bytes] = []
        following = self._next_key(key)
        # Bounded also where entries go as fast as they are found.
        for _ in range(2 * limit + 64):
            if following is None or len(keys) == limit:
                break
            key = following
            if (value := self._lookup(key)) is not None:
                keys.append(key)
                values.append(value)
            following = self._next_key(key)
        return Chunk(
            memoryview(b"".join(keys)),
            memoryview(b"".join(values)),
            len(keys),
            None if following is None or key is None else f"k{key.hex()}",
        )
