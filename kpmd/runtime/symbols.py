"""The resident symbol index, kept fresh."""

from __future__ import annotations

import asyncio

import structlog

from kpmd.core.symbols import SymbolIndex, names_in
from kpmd.runtime.executor import Executor, Lane
from kpmd.runtime.kernel import Kernel

log = structlog.get_logger("kpmd.symbols")


class Symbols:
    """Builds the index when it is first needed, and anew when modules came or went since."""

    def __init__(self, kernel: Kernel, executor: Executor) -> None:
        self._kernel = kernel
        self._executor = executor
        self._index: SymbolIndex | None = None
        self._signature: tuple[bytes, ...] = ()
        self._lock = asyncio.Lock()

    async def index(self) -> SymbolIndex:
        """The index as of now: a module's functions are known once its load has ended."""
        signature = await self._executor.run(self._kernel.modules_signature)
        if self._index is None or signature != self._signature:
            async with self._lock:
                if self._index is None or signature != self._signature:
                    self._index = await self._executor.run(self._build, lane=Lane.ATTACH)
                    self._signature = signature
                    log.info(
                        "symbol index built",
                        functions=len(self._index),
                        addresses=self._index.has_addresses,
                    )
        return self._index

    def latest(self) -> SymbolIndex | None:
        """The index as last built, without a look at the kernel."""
        return self._index

    def _build(self) -> SymbolIndex:
        files = self._kernel.symbol_files()
        return SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)

    async def existing(self, names: set[str]) -> set[str]:
        """Which of ``names`` the kernel has at all, traceable or not. Reads kallsyms: slow."""
        return await self._executor.run(
            lambda: names_in(self._kernel.symbol_files().kallsyms, names), lane=Lane.ATTACH
        )
