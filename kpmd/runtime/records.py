"""Streams of records: out of a map's buffer, to everyone who reads it, and never lost in silence.

A map that is read has one *pump*, which takes what is in its buffer as soon as it is there, and
gives it to all readers of the map. Each has a queue of bounded size; what does not fit into it is
counted, and told in its place.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from kpmd.bpf.fd import Closed
from kpmd.bpf.objects import MapDetails
from kpmd.core.ring import Batch, RingError, as_octets
from kpmd.errors import NotFound, NotSupported
from kpmd.log import Log
from kpmd.runtime.buffers import BATCH_BYTES, Lost, Perf, Ring, Source
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.kernel import Handle, Kernel, PerfRings, RingBuffer
from kpmd.runtime.tallies import RecordCounts
from kpmd.runtime.turns import Gate

log = Log("kpmd.records")

#: Bytes that wait for one reader.
QUEUE_BYTES = 2 << 20

#: Seconds to wait before looking again where less than a batch was there: the next one is larger,
#: and a record more often than that does not wake anybody.
_PAUSE = 0.001

#: The same where a record is still being written: that is a matter of nanoseconds, unless its
#: writer was interrupted.
_BUSY_PAUSE = 0.002

#: Seconds after which a reader is cut off that takes nothing while there is something for it.
STALL_SECONDS = 60.0

#: Why a reader does not get records, beside the reasons of ``buffers``.
SLOW = "reader-too-slow"


#: Records, as they are or already as a raw stream has them; or the news of those that are lost.
Item = Batch | bytes | Lost


def _length(item: Item) -> int:
    """Bytes of it that wait."""
    if isinstance(item, Lost):
        return 0
    return len(item.raw if isinstance(item, Batch) else item)


class _Forms:
    """A batch in the forms that readers want it in: each is made once, and only if it is wanted."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._rows: Batch | None = None
        self._frames: bytes | None = None
        self.count = batch.count

    def get(self, *, framed: bool) -> Batch | bytes:
        """One of the two."""
        if framed:
            if self._frames is None:
                self._frames = as_octets(self._batch)
            return self._frames
        if self._rows is None:
            self._rows = self._batch.copy()
        return self._rows


class Reader:
    """One reader's queue."""

    def __init__(self, pump: _Pump, uid: int, framed: bool) -> None:
        self._pump = pump
        self._framed = framed
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._lost = 0
        self._wake = asyncio.Event()
        self._ended = False
        self._taken_at = pump.now()
        self.uid = uid
        #: Called when it is cut off.
        self.on_cut: Callable[[], None] = lambda: None

    def put(self, batch: _Forms, lost: Lost | None) -> None:
        """More records, and the news that some behind them are lost."""
        if batch.count:
            if self._bytes < QUEUE_BYTES:
                self._tell_lost()
                if not self._items:
                    self._taken_at = self._pump.now()
                item = batch.get(framed=self._framed)
                self._items.append(item)
                self._bytes += _length(item)
            else:
                self._lost += batch.count
                self._pump.counts.lost[SLOW] += batch.count
                if self._pump.now() - self._taken_at > STALL_SECONDS:
                    log.info("reader takes nothing", map=self._pump.id, uid=self.uid)
                    self.cut()
        if lost is not None:
            self._tell_lost()
            self._append_lost(lost)
        self._wake.set()

    def _tell_lost(self) -> None:
        if self._lost:
            self._append_lost(Lost(self._lost, SLOW))
            self._lost = 0

    def _append_lost(self, lost: Lost) -> None:
        last = self._items[-1] if self._items else None
        if isinstance(last, Lost) and last.reason == lost.reason:
            # Who never reads shall not be told in more and more words.
            self._items[-1] = Lost(last.number + lost.number, lost.reason)
        else:
            self._items.append(lost)

    async def next(self) -> Item | None:
        """What comes next; None: nothing will any more."""
        while True:
            if not self._items:
                self._tell_lost()
            if self._items:
                item = self._items.popleft()
                self._bytes -= _length(item)
                self._taken_at = self._pump.now()
                return item
            if self._ended:
                return None
            self._wake.clear()
            await self._wake.wait()

    def cut(self) -> None:
        """End it in a way that cannot be taken for the end of what there is."""
        self._pump.counts.cut += 1
        self.close()
        self.on_cut()

    def end(self) -> None:
        """Nothing more will come; what has come can still be taken."""
        self._ended = True
        self._wake.set()

    def close(self) -> None:
        """Read no more."""
        self._items.clear()
        self._lost = 0
        self.end()
        self._pump.leave(self)


class _Pump:
    """Takes records out of one map's buffer as long as somebody reads it."""

    def __init__(
        self, records: Records, id_: str, uid: int, opening: Callable[[], Awaitable[Source]]
    ) -> None:
        self.id = id_
        self._records = records
        self.counts = records.counts
        self._uid = uid
        self._readers: set[Reader] = set()
        self._wake = asyncio.Event()
        #: A source that tells once has told since we last looked.
        self._told = False
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        #: It takes nothing any more but what is there already.
        self.ending = False
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.task = self._loop.create_task(self._run(opening))

    def join(self, uid: int, framed: bool) -> Reader:
        """One reader more."""
        reader = Reader(self, uid, framed)
        self._readers.add(reader)
        return reader

    @property
    def readers(self) -> int:
        """How many there are."""
        return len(self._readers)

    def leave(self, reader: Reader) -> None:
        """One reader less; without any the pump ends."""
        self._readers.discard(reader)
        if not self._readers:
            self.end()

    def end(self) -> None:
        """Take what is there now, and then no more."""
        self.ending = True
        self._wake.set()

    async def _run(self, opening: Callable[[], Awaitable[Source]]) -> None:
        try:
            source = await opening()
        except Exception as error:
            self.opened.set_exception(error)
            return
        self.opened.set_result(None)
        try:
            if source.told_once:
                # The kernel asks for news as it begins to watch, and forgets them: we watch all
                # the time, and look for the first time when it does (the loop has gone round).
                self._loop.add_reader(source.fileno(), self._tell)
                await asyncio.sleep(0)
            while not self.ending:
                if not await self._turn(source):
                    await self._wait(source)
            # What was written before the end. It may go on being written: not for ever.
            for _ in range(QUEUE_BYTES // BATCH_BYTES):
                if not self._readers or not await self._turn(source):
                    break
        except RingError as error:
            log.warning("stream cut", map=self.id, reason=str(error))
            self._cut()
        except Exception as error:
            log.error("bug", error, map=self.id)
            self._cut()
        finally:
            if source.told_once:
                self._loop.remove_reader(source.fileno())
            self.ending = True
            for reader in self._readers:
                reader.end()
            await self._records.executor.run(source.close, lane=Lane.CLOSE)

    def _cut(self) -> None:
        """What is not whole must not look as if it were."""
        for reader in list(self._readers):
            reader.cut()

    async def _turn(self, source: Source) -> bool:
        """Take a batch, if there is one. False: it is time to wait."""
        gate = self._records.gate
        await gate.enter(self._uid)
        self._told = False
        try:
            batch, lost = source.take()
            if batch is None:
                return False
            forms = _Forms(batch)
            self.counts.taken(batch.count, len(batch.raw))
            if lost is not None:
                self.counts.lost[lost.reason] += lost.number
            for reader in list(self._readers):
                reader.put(forms, lost)
            del forms, batch  # views of memory that may be closed while we sleep
            source.taken()
        finally:
            gate.leave()
        if not source.more and not self.ending:
            await self._sleep(_PAUSE)
        return True

    async def _sleep(self, seconds: float) -> None:
        """Wait so long, or until the end."""
        self._wake.clear()
        if not self.ending:
            handle = self._loop.call_later(seconds, self._wake.set)
            await self._wake.wait()
            handle.cancel()

    def _tell(self) -> None:
        self._told = True
        self._wake.set()

    async def _wait(self, source: Source) -> None:
        """Wait for records, or until the end."""
        if source.busy:
            # It is readable all the time, and yet there is nothing to be had.
            await self._sleep(_BUSY_PAUSE)
            return
        self._wake.clear()
        if source.told_once:
            if not self.ending and not self._told:
                await self._wake.wait()
        elif not self.ending:
            self._loop.add_reader(source.fileno(), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                self._loop.remove_reader(source.fileno())


class Records:
    """The pumps of all maps that are being read."""

    def __init__(self, kernel: Kernel, executor: Executor) -> None:
        self._kernel = kernel
        self.executor = executor
        self.gate = Gate()
        self.counts = RecordCounts()
        self._pumps: dict[str, _Pump] = {}
        self._stopped = False

    async def read(
        self, id_: str, handle: Handle, details: MapDetails, uid: int, *, framed: bool
    ) -> Reader:
        """Read a map's records from now on, and what is in its buffer already.

        ``framed``: as a raw stream has them, else as ``Batch``.
        Raises NotSupported for a map that has none, NotFound where it has ended, KernelError.
        """
        if details.type not in ("ringbuf", "perf_event_array"):
            raise NotSupported(
                f"a map of type {details.type} has no records: ringbuf and perf_event_array have"
            )
        pump = self._pumps.get(id_)
        if pump is None or pump.ending:
            pump = self._start(id_, handle, details, uid, pump)
        reader = pump.join(uid, framed)
        try:
            await asyncio.shield(pump.opened)
        except BaseException as error:
            reader.close()
            if isinstance(error, Closed):
                raise NotFound(f"map {id_} has ended with its last program") from None
            raise
        return reader

    def _start(
        self, id_: str, handle: Handle, details: MapDetails, uid: int, before: _Pump | None
    ) -> _Pump:
        async def opening() -> Source:
            if before is not None:
                await asyncio.wait([before.task])
            if details.type == "ringbuf":
                return Ring(
                    await self.executor.run(
                        self._kernel.open_ring, handle, details, undo=_close, uid=uid
                    )
                )
            return Perf(
                await self.executor.run(self._kernel.open_perf, handle, undo=_close, uid=uid)
            )

        pump = _Pump(self, id_, uid, opening)
        self._pumps[id_] = pump
        pump.task.add_done_callback(lambda _: self._forget(pump))
        if self._stopped:
            pump.end()
        return pump

    def _forget(self, pump: _Pump) -> None:
        if self._pumps.get(pump.id) is pump:
            del self._pumps[pump.id]

    @property
    def readers(self) -> int:
        """How many read."""
        return sum(pump.readers for pump in self._pumps.values())

    def end(self, id_: str) -> None:
        """A map has ended: its readers get what is left in it, and then their end."""
        if (pump := self._pumps.get(id_)) is not None:
            pump.end()

    def stop(self) -> None:
        """Let all streams come to their end, now and from now on."""
        self._stopped = True
        for pump in self._pumps.values():
            pump.end()

    async def drain(self) -> None:
        """Wait until all pumps have ended; after ``stop``."""
        while self._pumps:
            await asyncio.wait([pump.task for pump in self._pumps.values()])


def _close(memory: RingBuffer | PerfRings) -> None:
    memory.close()
