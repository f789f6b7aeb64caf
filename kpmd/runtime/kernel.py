"""What kpmd needs of a kernel: the real one and the tests' fake both implement this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.features import Answer
from kpmd.bpf.kallsyms import SymbolFiles
from kpmd.bpf.kernel import Loaded
from kpmd.bpf.maps import Entry
from kpmd.bpf.objects import LinkDetails, MapDetails, ProgramInfo
from kpmd.bpf.rights import Rights
from kpmd.core.model import Mechanism


class Handle(Protocol):
    """An owned kernel object; ``close`` blocks, and may be called twice."""

    def close(self) -> None:
        """Give it back to the kernel."""


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
    ) -> tuple[Handle, LinkDetails]: ...

    def link_details(self, link: Any) -> LinkDetails: ...

    def what_is(self, fd: OwnedFd) -> str: ...

    def program_details(self, program: OwnedFd) -> ProgramInfo: ...

    def map_details(self, map_: OwnedFd) -> MapDetails: ...

    def link_mechanism(self, fd: OwnedFd) -> Mechanism: ...

    def adopt_perf_links(self, fds: Sequence[OwnedFd]) -> Handle: ...

    def read_entries(
        self, map_: Any, details: MapDetails, after: bytes | None, limit: int
    ) -> list[Entry]: ...

    def read_entry(self, map_: Any, details: MapDetails, key: bytes) -> list[bytes] | None: ...

    def symbol_files(self) -> SymbolFiles: ...

    def modules_signature(self) -> tuple[bytes, ...]: ...

    def release_memory(self) -> None: ...
