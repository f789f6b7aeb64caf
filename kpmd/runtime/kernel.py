"""What kpmd needs of a kernel: the real one and the tests' fake both implement this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kpmd.bpf.content import Mode
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.features import Answer
from kpmd.bpf.kallsyms import SymbolFiles
from kpmd.bpf.kernel import Loaded
from kpmd.bpf.maps import Chunk, Layout
from kpmd.bpf.objects import LinkDetails, MapDetails, ProgramInfo
from kpmd.bpf.progress import Progress
from kpmd.bpf.rights import Rights
from kpmd.core.model import Mechanism


class Handle(Protocol):
    """An owned kernel object; ``close`` blocks, and may be called twice."""

    def close(self) -> None:
        """Give it back to the kernel."""


class MapContent(Protocol):
    """What is in a map; see ``kpmd.bpf.content.MapContent``."""

    @property
    def layout(self) -> Layout: ...

    def lookup(self, key: bytes) -> bytes | None: ...

    def page(self, after: str | None, limit: int, most: int) -> Chunk: ...

    def update(self, items: Sequence[tuple[bytes, bytes]], mode: Mode) -> None: ...

    def delete(self, keys: Sequence[bytes]) -> int: ...

    def clear(self, after: str | None, limit: int, most: int) -> tuple[int, str | None]: ...

    def push(self, value: bytes, *, overwrite: bool) -> None: ...

    def pop(self, *, keep: bool) -> bytes | None: ...

    def write_at(self, offset: int, data: bytes) -> None: ...


class RingBuffer(Protocol):
    """A ring buffer's memory; see ``kpmd.bpf.rings.RingMemory``."""

    @property
    def size(self) -> int: ...

    @property
    def words(self) -> memoryview: ...

    @property
    def data(self) -> memoryview: ...

    def positions(self) -> tuple[int, int]: ...

    def consume(self, position: int) -> None: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class PerfRing(Protocol):
    """One CPU's perf buffer; see ``kpmd.bpf.rings.PerfMemory``."""

    def content(self) -> bytes: ...

    def consume(self, length: int) -> None: ...


class PerfRings(Protocol):
    """The perf buffers of all CPUs; see ``kpmd.bpf.rings.PerfBuffers``."""

    @property
    def buffers(self) -> Sequence[PerfRing]: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Kernel(Protocol):
    """All calls block, and are made in the pool. ``kpmd.bpf.kernel.LinuxKernel`` tells of each."""

    @property
    def release(self) -> str: ...

    @property
    def machine(self) -> str: ...

    @property
    def features(self) -> Sequence[tuple[str, str]]: ...

    def start(self) -> None: ...

    def close(self) -> None: ...

    def test_feature(self, name: str) -> Answer: ...

    def load_instructions(
        self,
        instructions: bytes,
        name: str,
        license_: str,
        attach: str,
        want_log: bool,
        mechanism: str = "kprobe_multi",
        rights: Rights | None = None,
        progress: Progress | None = None,
    ) -> Loaded: ...

    def load_object(
        self,
        elf: bytes,
        programs: Sequence[str] | None,
        attach: str | None,
        globals_: dict[str, int | bytes],
        max_entries: dict[str, int],
        want_log: bool,
        mechanism: str = "kprobe_multi",
        rights: Rights | None = None,
        progress: Progress | None = None,
    ) -> Loaded: ...

    def create_link(
        self,
        program: Any,
        attach: str,
        *,
        retprobe: bool,
        addresses: Sequence[int],
        symbols: Sequence[str],
        cookies: Sequence[int],
    ) -> tuple[Handle, LinkDetails]: ...

    def create_perf_links(
        self,
        program: Any,
        *,
        retprobe: bool,
        addresses: Sequence[int],
        symbols: Sequence[str],
        cookies: Sequence[int],
        progress: Progress | None = None,
    ) -> tuple[Handle, LinkDetails]: ...

    def link_details(self, link: Any) -> LinkDetails: ...

    def what_is(self, fd: OwnedFd) -> str: ...

    def program_details(self, program: OwnedFd) -> ProgramInfo: ...

    def map_details(self, map_: OwnedFd) -> MapDetails: ...

    def link_mechanism(self, fd: OwnedFd) -> Mechanism: ...

    def adopt_perf_links(self, fds: Sequence[OwnedFd]) -> Handle: ...

    def content(self, map_: Any, details: MapDetails) -> MapContent: ...

    def open_ring(self, map_: Any, details: MapDetails) -> RingBuffer: ...

    def open_perf(self, map_: Any) -> PerfRings: ...

    def symbol_files(self) -> SymbolFiles: ...

    def modules_signature(self) -> tuple[bytes, ...]: ...

    def release_memory(self) -> None: ...
