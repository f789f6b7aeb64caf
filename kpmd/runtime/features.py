"""The cached feature test: yes and no are kept, anything else is asked again next time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from kpmd.bpf.features import Answer
from kpmd.errors import NotSupported
from kpmd.runtime.executor import Executor
from kpmd.runtime.kernel import Kernel

#: The feature that a link of a program needs, by the program's attach type.
MULTI_FEATURE = {
    "kprobe_multi": "bpf_link_kprobe_multi",
    "kprobe_session": "bpf_link_kprobe_session",
}


@dataclass(frozen=True)
class Feature:
    """The answer of a feature test. ``supported`` None: inconclusive, and not cached."""

    name: str
    min_kernel: str
    supported: bool | None
    reason: str | None
    checked_at: float


class Features:
    """Runs each feature test at most once at a time, and no more once it gave a yes or no."""

    def __init__(self, kernel: Kernel, executor: Executor) -> None:
        self._kernel = kernel
        self._executor = executor
        self._known: dict[str, Feature] = {}
        self._lock = asyncio.Lock()
        #: Counted up with each new answer; lets others cache what they derive.
        self.version = 0
        #: Whether every feature has a yes or no.
        self.settled = False

    async def all(self, *, refresh: bool = False) -> list[Feature]:
        """Every feature; runs the tests that have not given a yes or no (``refresh``: all)."""
        if refresh or not self.settled:
            async with self._lock:
                for name, _ in self._kernel.features:
                    known = self._known.get(name)
                    if refresh or known is None or known.supported is None:
                        await self._test(name)
        return [self._known[name] for name, _ in self._kernel.features]

    def known(self) -> list[Feature]:
        """Those that were tested; no test is run."""
        return list(self._known.values())

    async def get(self, name: str) -> Feature:
        """One feature, from the cache where it has a yes or no."""
        known = self._known.get(name)
        if known is None or known.supported is None:
            async with self._lock:
                known = self._known.get(name)
                if known is None or known.supported is None:
                    known = await self._test(name)
        return known

    async def _test(self, name: str) -> Feature:
        answer: Answer = await self._executor.run(self._kernel.test_feature, name)
        feature = Feature(
            name, dict(self._kernel.features)[name], answer.supported, answer.reason, time.time()
        )
        self._known[name] = feature
        self.version += 1
        self.settled = all(
            each in self._known and self._known[each].supported is not None
            for each, _ in self._kernel.features
        )
        return feature


def not_supported(feature: Feature, instead: Feature | None = None) -> NotSupported:
    """The error for a link that needs a feature which the kernel lacks.

    ``instead``: what could have stood in for it; where it cannot, the error tells why.
    """
    more = "" if instead is None or instead.supported else f"; one by one: {instead.reason}"
    return NotSupported(
        f"{feature.reason}; {feature.name} needs kernel {feature.min_kernel} with CONFIG_FPROBE"
        f"{more}",
        needs=f"kernel {feature.min_kernel}, CONFIG_FPROBE",
    )
