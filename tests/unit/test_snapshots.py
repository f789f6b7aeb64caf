"""The resident index: built when it is needed, anew when modules change, once for all who ask."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from kpmd.bpf.kallsyms import SymbolFiles
from kpmd.core.deny import DenyList
from kpmd.core.globs import Glob
from kpmd.runtime.symbols import Snapshot, Symbols
from tests.fakes.kernel import FakeKernel, symbol_files
from tests.http.samples import Gate


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def symbols(kernel: FakeKernel) -> Symbols:
    return Symbols(kernel, DenyList.parse("vfs_* no\n"))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def builds(kernel: FakeKernel) -> int:
    return kernel.calls.count("symbol_files")


def test_nothing_is_read_before_it_is_needed(kernel: FakeKernel, symbols: Symbols) -> None:
    assert builds(kernel) == 0
    symbols.current()
    assert builds(kernel) == 1


def test_a_snapshot_has_all_that_belongs_together(kernel: FakeKernel, symbols: Symbols) -> None:
    kernel.files = symbol_files(blacklist=["do_idle_loop"])
    snapshot = symbols.current()
    assert {snapshot.index.names[at] for at in snapshot.denials} == {
        "vfs_read",
        "vfs_write",
        "vfs_open",
    }
    assert snapshot.blacklist == {"do_idle_loop"}
    assert snapshot.signature == kernel.signature


def test_it_is_built_anew_only_when_modules_change(kernel: FakeKernel, symbols: Symbols) -> None:
    first = symbols.current()
    assert symbols.current() is first
    kernel.files = symbol_files(added=[("vfs_new", "mod")])
    # Without a sign of it, nothing is read.
    assert symbols.current() is first
    kernel.signature = (*kernel.signature, b"mod 1 0x1")
    second = symbols.current()
    assert second.index.find("vfs_new")
    assert not first.index.find("vfs_new")
    assert {second.index.names[at] for at in second.denials} >= {"vfs_new"}
    assert symbols.current() is second
    kernel.signature, kernel.files = kernel.signature[:1], symbol_files()
    assert not symbols.current().index.find("vfs_new")
    assert builds(kernel) == 3


def test_a_module_that_is_loaded_again_elsewhere_is_a_change(
    kernel: FakeKernel, symbols: Symbols
) -> None:
    symbols.current()
    kernel.signature = (b"nf_tables 1 0x2",)
    symbols.current()
    assert builds(kernel) == 2


def test_a_build_that_fails_is_tried_again(kernel: FakeKernel, symbols: Symbols) -> None:
    kernel.fail["symbol_files"] = OSError(24, "too many open files")
    with pytest.raises(OSError, match="too many open files"):
        symbols.current()
    assert symbols.current().index.find("vfs_read")


def test_a_build_that_fails_leaves_no_stale_index(kernel: FakeKernel, symbols: Symbols) -> None:
    symbols.current()
    kernel.signature, kernel.files = (), symbol_files(without=["nf_tables"])
    kernel.fail["symbol_files"] = OSError(24, "too many open files")
    with pytest.raises(OSError, match="too many open files"):
        symbols.current()
    assert not symbols.current().index.find("nf_hook")


class Asking:
    """A thread for each of some calls of ``current``; tells when all have asked the kernel."""

    def __init__(self, kernel: FakeKernel, symbols: Symbols, pool: ThreadPoolExecutor) -> None:
        self._symbols = symbols
        self._pool = pool
        self._asked = threading.Semaphore(0)
        ask = kernel.modules_signature

        def signature() -> tuple[bytes, ...]:
            found = ask()
            self._asked.release()
            return found

        kernel.modules_signature = signature  # type: ignore[method-assign]

    def start(self, count: int) -> list[Future[Snapshot]]:
        started = [self._pool.submit(self._symbols.current) for _ in range(count)]
        for _ in range(count):
            assert self._asked.acquire(timeout=10)
        return started


def test_one_build_for_all_who_ask_at_once(
    kernel: FakeKernel, symbols: Symbols, pool: ThreadPoolExecutor
) -> None:
    asking = Asking(kernel, symbols, pool)
    gate = kernel.hooks["symbol_files"] = Gate()
    asked = asking.start(12)
    assert gate.entered.wait(10)
    assert not any(each.done() for each in asked)
    gate.open()
    found = {id(each.result(10)) for each in asked}
    assert len(found) == 1
    assert builds(kernel) == 1


def test_one_build_for_all_who_ask_at_once_after_a_change(
    kernel: FakeKernel, symbols: Symbols, pool: ThreadPoolExecutor
) -> None:
    before = symbols.current()
    kernel.signature, kernel.files = (), symbol_files(without=["nf_tables"])
    asking = Asking(kernel, symbols, pool)
    gate = kernel.hooks["symbol_files"] = Gate()
    asked = asking.start(12)
    assert gate.entered.wait(10)
    gate.open()
    found = [each.result(10) for each in asked]
    assert len({id(each) for each in found}) == 1
    assert found[0] is not before
    assert not found[0].index.find("nf_hook")
    assert builds(kernel) == 2


def test_a_change_during_a_build_is_not_missed(
    kernel: FakeKernel, symbols: Symbols, pool: ThreadPoolExecutor
) -> None:
    """The files that a build reads may be older: whoever asks after a change gets newer ones."""
    gate = Gate()
    read = kernel.symbol_files

    def slowly() -> SymbolFiles:
        files = read()
        gate()
        return files

    kernel.symbol_files = slowly  # type: ignore[method-assign]
    first = pool.submit(symbols.current)
    assert gate.entered.wait(10)
    load_module(kernel)
    late = pool.submit(symbols.current)
    gate.open()
    assert first.result(10).index.find("vfs_new")
    assert late.result(10).index.find("vfs_new")


def load_module(kernel: FakeKernel) -> None:
    kernel.files = symbol_files(added=[("vfs_new", "mod")])
    kernel.signature = (*kernel.signature, b"mod 1 0x1")


def test_a_module_that_comes_during_a_build_and_goes_again_is_gone(
    kernel: FakeKernel, symbols: Symbols
) -> None:
    """The list of modules is then what it was before the build, but the files were others."""
    before, files = kernel.signature, kernel.files
    kernel.hooks["symbol_files"] = lambda: load_module(kernel)
    symbols.current()
    kernel.hooks.clear()
    kernel.signature, kernel.files = before, files
    assert not symbols.current().index.find("vfs_new")


def test_who_looked_before_a_change_does_not_undo_what_came_of_it(
    kernel: FakeKernel, symbols: Symbols, pool: ThreadPoolExecutor
) -> None:
    """A newer index is there already: it is not thrown away for one under the old list's name."""
    gate = Gate()
    ask = kernel.modules_signature
    first_time = threading.Lock()

    def signature() -> tuple[bytes, ...]:
        found = ask()
        if first_time.acquire(blocking=False):
            gate()
        return found

    kernel.modules_signature = signature  # type: ignore[method-assign]
    early = pool.submit(symbols.current)
    assert gate.entered.wait(10)
    load_module(kernel)
    newer = symbols.current()
    gate.open()
    assert early.result(10).index.find("vfs_new")
    assert symbols.current() is newer
    assert builds(kernel) == 1


def test_an_index_stays_whole_for_whoever_still_uses_it(
    kernel: FakeKernel, symbols: Symbols
) -> None:
    held = symbols.current()
    names = list(held.index.names)
    kernel.signature, kernel.files = (), symbol_files(many=10, without=["nf_tables"])
    assert len(symbols.current().index) != len(names)
    assert held.index.names == names
    assert held.index.glob(Glob.parse("*")) == list(range(len(names)))


def test_an_index_that_is_good_at_last_is_not_built_once_more(
    kernel: FakeKernel, symbols: Symbols
) -> None:
    """Modules come during the first two builds; the third is of what is there then."""
    comings = iter([b"a 1 0x1", b"b 1 0x2"])

    def come() -> None:
        kernel.signature = (*kernel.signature, *([each] if (each := next(comings, None)) else []))

    kernel.hooks["symbol_files"] = come
    snapshot = symbols.current()
    assert builds(kernel) == 3
    assert symbols.current() is snapshot


def test_an_index_that_may_be_wrong_is_not_kept(kernel: FakeKernel, symbols: Symbols) -> None:
    """Where modules never stop coming, the request gets the newest there is, the next one anew."""
    numbers = itertools.count()

    def come() -> None:
        kernel.signature = (f"m{next(numbers)} 1 0x1".encode(),)

    kernel.hooks["symbol_files"] = come
    first = symbols.current()
    kernel.signature = first.signature
    del kernel.hooks["symbol_files"]
    assert symbols.current() is not first
