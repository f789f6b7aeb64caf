"""The resident symbol index, kept fresh."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from kpmd.core.deny import Denials, DenyList
from kpmd.core.policy import Fence, Rule
from kpmd.core.symbols import SymbolIndex, blacklist
from kpmd.log import Log
from kpmd.runtime.kernel import Kernel

log = Log("kpmd.symbols")


#: How often an index is built anew where modules come and go meanwhile.
_TRIES = 3

#: Rules whose fences are kept at the most. Those of policies before the one in force go with them.
_FENCES = 64


@dataclass(frozen=True)
class Snapshot:
    """The index as of a set of loaded modules, and what belongs to it."""

    signature: tuple[bytes, ...]
    index: SymbolIndex
    denials: Denials
    blacklist: frozenset[str]


class Symbols:
    """Builds the index when it is first needed, and anew when modules came or went since.

    The list of modules is looked at in each request that needs the index: a module's functions can
    be attached to by the first request after its load has ended. Blocks: for the pool only.
    """

    def __init__(self, kernel: Kernel, deny: DenyList) -> None:
        self._kernel = kernel
        self._deny = deny
        self._snapshot: Snapshot | None = None
        self._fences: dict[int, Fence] = {}
        self._lock = threading.Lock()
        #: How often an index was built; when the last time, how long it took, and what is in it.
        self.builds = 0
        self.built_at = self.build_seconds = 0.0
        self.functions = 0

    def current(self) -> Snapshot:
        """The index as of now."""
        signature = self._kernel.modules_signature()
        snapshot = self._snapshot
        if snapshot is not None and snapshot.signature == signature:
            return snapshot
        with self._lock:
            # Anew: while this thread waited, another may have built what is true now.
            signature = self._kernel.modules_signature()
            snapshot = self._snapshot
            if snapshot is None or snapshot.signature != signature:
                snapshot = self._fresh(signature)
        return snapshot

    def fence(self, rule: Rule, snapshot: Snapshot) -> Fence | None:
        """Which functions of the index a rule lets attach to; worked out once for each rule.

        None: all of them.
        """
        if rule.functions.unrestricted:
            return None
        fence = self._fences.get(id(rule))
        if fence is None or fence.rule is not rule or fence.index is not snapshot.index:
            if len(self._fences) >= _FENCES:
                self._fences.clear()
            fence = Fence(rule, snapshot.index, self._deny, snapshot.denials)
            self._fences[id(rule)] = fence
        return fence

    def _fresh(self, signature: tuple[bytes, ...]) -> Snapshot:
        """A new index; kept only when no module came or went while it was built.

        One that came and has gone since would be in it: then it serves this request, and no other.
        """
        self._snapshot = None
        self._fences.clear()  # they hold the old index
        for _ in range(_TRIES):
            snapshot = self._build(signature)
            signature = self._kernel.modules_signature()
            if snapshot.signature == signature:
                self._snapshot = snapshot
                break
        return snapshot

    def _build(self, signature: tuple[bytes, ...]) -> Snapshot:
        began = time.monotonic()
        files = self._kernel.symbol_files()
        index = SymbolIndex.build(files.kallsyms, files.functions, files.functions_have_addresses)
        snapshot = Snapshot(signature, index, self._deny.denials(index), blacklist(files.blacklist))
        del files
        self._kernel.release_memory()
        self.builds += 1
        self.built_at, self.build_seconds = time.time(), time.monotonic() - began
        self.functions = len(index)
        log.info(
            "symbol index built",
            functions=len(index),
            addresses=index.has_addresses,
            denied=len(snapshot.denials),
            milliseconds=round(self.build_seconds * 1000),
        )
        return snapshot
