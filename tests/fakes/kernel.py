"""A kernel that does what the real one does as far as kpmd can see, and fails when told to."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.features import Answer
from kpmd.bpf.kallsyms import SymbolFiles
from kpmd.bpf.kernel import Loaded, LoadedMap, LoadedProgram
from kpmd.bpf.objects import LinkDetails, MapDetails, ProgramInfo
from kpmd.bpf.progress import Progress
from kpmd.bpf.rights import Rights
from kpmd.core.model import Mechanism
from kpmd.errors import BadObject, VerifierRejected
from tests.fakes.content import FakeContent
from tests.fakes.rings import FakePerf, FakeRing, OpenRing

TEXT = 0xFFFFFFFF81000000

#: Traceable functions: name -> (address, offset of the traceable place, module)
FUNCTIONS = {
    "vfs_read": (TEXT + 0x1000, 4, ""),
    "vfs_write": (TEXT + 0x2000, 4, ""),
    "vfs_open": (TEXT + 0x3000, 0, ""),
    "vprintk": (TEXT + 0x4000, 4, ""),
    "inet6_release": (TEXT + 0x5000, 4, ""),
    "nf_hook": (0xFFFFFFFFC0001000, 4, "nf_tables"),
}
#: Where modules lie.
MODULES = 0xFFFFFFFFC0100000
#: Names that stand for two functions each.
AMBIGUOUS = {"cleanup": (TEXT + 0x6000, TEXT + 0x7000)}
#: Another name of a function that tracefs lists under the first.
ALIASES = {"ksys_read_alias": TEXT + 0x1000}
#: In kallsyms, but not traceable.
UNTRACEABLE = {"do_idle_loop": TEXT + 0x8000}


#: Where functions may lie that tests add.
ADDED = TEXT + 0x100000


def symbol_files(
    *,
    addresses: bool = True,
    hidden: bool = False,
    many: int = 0,
    added: Sequence[tuple[str, str]] = (),
    untraceable: Sequence[str] = (),
    without: Sequence[str] = (),
    blacklist: Sequence[str] = (),
) -> SymbolFiles:
    """The kernel's text files; ``many`` adds that many functions ``many_0`` and so on.

    ``added``: further traceable functions, each with its module, from ``ADDED`` on, 0x40 bytes
    apart (those of modules: as far above ``MODULES``); ``untraceable``: further functions that are
    not; ``without``: modules that are not loaded.
    """
    kallsyms: list[tuple[int, str, str]] = []
    functions: list[tuple[int, str, str]] = []
    for name, (address, delta, module) in FUNCTIONS.items():
        if module not in without:
            kallsyms.append((address, name, module))
            functions.append((address + delta, name, module))
    for number, (name, module) in enumerate(added):
        address = (MODULES if module else ADDED) + number * 0x40
        kallsyms.append((address, name, module))
        functions.append((address + 4, name, module))
    kallsyms += [
        (TEXT + 0x10000000 + number * 0x40, name, "") for number, name in enumerate(untraceable)
    ]
    for name, both in AMBIGUOUS.items():
        for address in both:
            kallsyms.append((address, name, ""))
            functions.append((address + 4, name, ""))
    kallsyms += [(address, name, "") for name, address in {**ALIASES, **UNTRACEABLE}.items()]
    for number in range(many):
        address = ADDED + number * 0x40
        kallsyms.append((address, f"many_{number}", ""))
        functions.append((address + 4, f"many_{number}", ""))
    kallsyms.sort()
    functions.sort()
    lines = [
        f"{0 if hidden else address:016x} T {name}" + (f"\t[{module}]" if module else "")
        for address, name, module in kallsyms
    ]
    listed = [
        (f"{address:016x} " if addresses else "") + name + (f" [{module}]" if module else "")
        for address, name, module in functions
    ]
    return SymbolFiles(
        "\n".join(lines).encode() + b"\n",
        "\n".join(listed).encode() + b"\n",
        addresses,
        "".join(f"0x{TEXT:016x}-0x{TEXT + 64:016x}\t{name}\n" for name in blacklist).encode(),
    )


class _LinkFd(OwnedFd):
    """Calls hooks of its kernel before it closes, as a kernel takes its time.

    ``close_link`` for each link, and ``close_link N`` for the one of that kernel id.
    """

    __slots__ = ("_kernel", "_number")

    def __init__(self, kernel: FakeKernel, number: int) -> None:
        super().__init__(os.eventfd(number), "link")
        self._kernel = kernel
        self._number = number

    def close(self) -> None:
        if not self.closed:
            self._kernel.enter("close_link")
            self._kernel.enter(f"close_link {self._number}")
        super().close()


@dataclass
class FakeLink:
    """A link as the fake kernel sees it."""

    fd: OwnedFd
    program: OwnedFd
    details: LinkDetails
    addresses: list[int]
    symbols: list[str]
    cookies: list[int]
    retprobe: bool


@dataclass
class FakeKernel:
    """Implements ``kpmd.runtime.kernel.Kernel`` over eventfds, so that leaks are real leaks.

    ``fail`` maps a method's name to an exception that its next call raises; ``hooks`` to something
    that it calls first (to block on, say).
    """

    release: str = "6.12.0-fake"
    machine: str = "x86_64"
    features: tuple[tuple[str, str], ...] = (
        ("bpf_link_kprobe_multi", "5.18"),
        ("bpf_link_kprobe_session", "6.10"),
        ("kprobe_perf_event", "4.17"),
        ("bpf_get_func_ip", "5.15"),
    )
    answers: dict[str, Answer] = field(default_factory=dict)
    files: SymbolFiles = field(default_factory=symbol_files)
    signature: tuple[bytes, ...] = (b"nf_tables 1 0x1",)
    fail: dict[str, BaseException] = field(default_factory=dict)
    hooks: dict[str, Callable[[], object]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    entries: dict[bytes, list[bytes]] = field(default_factory=dict)
    map_type: tuple[str, int] = ("hash", 1)
    #: Bytes of its keys and values.
    map_sizes: tuple[int, int] = (8, 8)
    #: What is in its queue or stack, the oldest first.
    queue: list[bytes] = field(default_factory=list)
    #: The sections of variables that its objects have: name, value, and its type.
    variables: Sequence[tuple[str, bytes, int]] = ()
    #: What is in them by now.
    sections: dict[str, dict[bytes, list[bytes]]] = field(default_factory=dict)
    links: list[FakeLink] = field(default_factory=list)
    programs: list[OwnedFd] = field(default_factory=list)
    maps: list[OwnedFd] = field(default_factory=list)
    started: bool = False
    #: How each program was loaded.
    mechanisms: list[str] = field(default_factory=list)
    #: What each load was allowed, in their order.
    rights: list[Rights | None] = field(default_factory=list)
    #: More targets in one link than this are ENOMEM.
    most_targets: int = 1 << 20
    #: How many more links there can be before ``create_link`` fails with the errno beside it.
    budget: tuple[int, int] | None = None
    #: Everything there ever was, by its number, which is its kernel id.
    objects: dict[int, ProgramInfo | MapDetails | LinkDetails] = field(default_factory=dict)

    #: What is in its ring buffer, and in its perf buffers.
    ring: FakeRing = field(default_factory=FakeRing)
    perf: FakePerf = field(default_factory=FakePerf)
    #: The BTF of its objects, and of which types their map's keys and values are.
    btf: bytes = b""
    map_types: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self._ids = itertools.count(100)
        self._lock = threading.Lock()

    def enter(self, name: str) -> None:
        with self._lock:
            self.calls.append(name)
            error = self.fail.pop(name, None)
        if hook := self.hooks.get(name):
            hook()
        if error is not None:
            raise error

    def _tell(self, progress: Progress | None, now: Progress) -> None:
        """Show how far a call is, as the real kernel's code does; then its hook ``progress``."""
        if progress is not None:
            progress.phase, progress.done = now.phase, now.done
            progress.total, progress.name = now.total or progress.total, now.name or progress.name
        if hook := self.hooks.get("progress"):
            hook()

    def start(self) -> None:
        self.started = True

    def close(self) -> None:
        self.started = False

    def test_feature(self, name: str) -> Answer:
        self.enter("test_feature")
        return self.answers.get(name, Answer(True))

    def _program(self, name: str, attach: str, map_ids: tuple[int, ...] = ()) -> LoadedProgram:
        number = next(self._ids)
        fd = OwnedFd(os.eventfd(number), f"program {name}")
        info = ProgramInfo(number, name[:15], f"{number:016x}", 2, 20, map_ids)
        with self._lock:
            self.programs.append(fd)
            self.objects[number] = info
        return LoadedProgram(name, attach, fd, info, None)

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
    ) -> Loaded:
        self.enter("load_instructions")
        self.mechanisms.append(mechanism)
        self.rights.append(rights)
        if instructions == b"\x95" + bytes(7):
            raise VerifierRejected("the verifier refused it", "R0 !read_ok\n", False)
        return Loaded([self._program(name, attach)])

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
    ) -> Loaded:
        """Any ELF file has two programs, ``count`` and ``other``, that share the map ``counts``."""
        self.enter("load_object")
        self.mechanisms.append(mechanism)
        self.rights.append(rights)
        if not elf.startswith(b"\x7fELF"):
            raise BadObject("the object is no ELF file")
        number = next(self._ids)
        type_name, type_number = self.map_type
        details = MapDetails(
            number,
            "counts",
            type_name,
            type_number,
            *self.map_sizes,
            max_entries.get("counts", 16384),
        )
        names = programs or ("count", "other")
        for done, name in enumerate(names):
            self._tell(progress, Progress("verifying", done, name=name))
        maps = [LoadedMap("counts", self._map(details), details, *self.map_types)]
        for name, value, type_id in self.variables:
            self.sections[name] = {bytes(4): [value]}
            details = MapDetails(next(self._ids), name, "array", 2, 4, len(value), 1)
            maps.append(LoadedMap(name, self._map(details), details, 0, type_id))
        ids = tuple(each.details.kernel_id for each in maps)
        return Loaded(
            [self._program(name, attach or "kprobe_multi", ids) for name in names], maps, self.btf
        )

    def _map(self, details: MapDetails) -> OwnedFd:
        fd = OwnedFd(os.eventfd(details.kernel_id), f"map {details.name}")
        with self._lock:
            self.maps.append(fd)
            self.objects[details.kernel_id] = details
        return fd

    def create_link(
        self,
        program: Any,
        attach: str,
        *,
        retprobe: bool,
        addresses: Sequence[int],
        symbols: Sequence[str],
        cookies: Sequence[int],
    ) -> tuple[OwnedFd, LinkDetails]:
        self.enter("create_link")
        known = {address for address, _, _ in FUNCTIONS.values()} | {
            address for both in AMBIGUOUS.values() for address in both
        }
        names = FUNCTIONS.keys() | AMBIGUOUS.keys()
        if any(name not in names for name in symbols if not name.startswith("many_")):
            raise OSError(errno.ESRCH, "no such symbol")
        if len(set(symbols)) < len(symbols):
            raise OSError(errno.ESRCH, "a symbol twice")
        if max(len(addresses), len(symbols)) > self.most_targets:
            raise OSError(errno.ENOMEM, "too many targets")
        with self._lock:
            if self.budget is not None:
                left, number = self.budget
                if left == 0:
                    raise OSError(number, "no more links")
                self.budget = (left - 1, number)
        if any(each not in known and each < ADDED for each in addresses):
            raise OSError(errno.EINVAL, "bad address")
        number = next(self._ids)
        with program.borrow():
            fd = _LinkFd(self, number)
        details = LinkDetails(number, self.number_of(program), len(addresses) or len(symbols), 0)
        made = FakeLink(
            fd, program, details, list(addresses), list(symbols), list(cookies), retprobe
        )
        with self._lock:
            self.links.append(made)
            self.objects[number] = details
        return fd, details

    @staticmethod
    def number_of(fd: OwnedFd) -> int:
        """Which object an FD is of, wherever it has been: eventfds keep a number."""
        with open(f"/proc/self/fdinfo/{fd.fileno()}", encoding="ascii") as file:
            for line in file:
                if line.startswith("eventfd-count:"):
                    return int(line.split()[1], 16)
        return 0

    def tell(self, link: FakeLink, *, count: int | None, missed: int | None) -> None:
        """Tell these of a link from now on."""
        link.details = replace(link.details, count=count, missed=missed)
        self.objects[link.details.kernel_id] = link.details

    def what_is(self, fd: OwnedFd) -> str:
        kinds = {ProgramInfo: "program", MapDetails: "map", LinkDetails: "link"}
        return kinds.get(type(self.objects.get(self.number_of(fd))), "something else")

    def program_details(self, program: OwnedFd) -> ProgramInfo:
        found = self.objects[self.number_of(program)]
        assert isinstance(found, ProgramInfo)
        return found

    def map_details(self, map_: OwnedFd) -> MapDetails:
        found = self.objects[self.number_of(map_)]
        assert isinstance(found, MapDetails)
        return found

    def link_mechanism(self, fd: OwnedFd) -> Mechanism:
        return "kprobe_multi"

    def adopt_perf_links(self, fds: Sequence[OwnedFd]) -> OwnedFd:
        raise NotImplementedError("the fake's links are all of one FD")

    @property
    def attached(self) -> list[FakeLink]:
        """Links that are not closed."""
        return [link for link in self.links if not link.fd.closed]

    @property
    def loaded(self) -> list[OwnedFd]:
        """Programs that are not closed."""
        return [program for program in self.programs if not program.closed]

    @property
    def open_maps(self) -> list[OwnedFd]:
        """Maps that are not closed."""
        return [each for each in self.maps if not each.closed]

    def link_details(self, link: Any) -> LinkDetails:
        self.enter("link_details")
        found = self.objects[self.number_of(link)]  # raises Closed where it is
        assert isinstance(found, LinkDetails)
        return found

    def content(self, map_: Any, details: MapDetails) -> FakeContent:
        entries = self.sections.get(details.name, self.entries)
        return FakeContent(self.enter, map_, details, entries, self.queue)

    def open_ring(self, map_: Any, details: MapDetails) -> OpenRing:
        self.enter("open_ring")
        map_.fileno()  # raises Closed where it is
        return self.ring.open(details.max_entries)

    def open_perf(self, map_: Any) -> FakePerf:
        self.enter("open_perf")
        map_.fileno()  # raises Closed where it is
        return self.perf.open()

    def symbol_files(self) -> SymbolFiles:
        self.enter("symbol_files")
        return self.files

    def release_memory(self) -> None:
        pass

    def create_perf_links(
        self,
        program: Any,
        *,
        retprobe: bool,
        addresses: Sequence[int],
        symbols: Sequence[str],
        cookies: Sequence[int],
        progress: Progress | None = None,
    ) -> tuple[OwnedFd, LinkDetails]:
        """As one link: how many there are behind it is the real kernel's matter."""
        self.enter("create_perf_links")
        total = len(addresses) or len(symbols)
        for done in range(total):
            self._tell(progress, Progress("attaching", done, total))
        return self.create_link(
            program,
            "kprobe_multi",
            retprobe=retprobe,
            addresses=addresses,
            symbols=symbols,
            cookies=cookies,
        )

    def modules_signature(self) -> tuple[bytes, ...]:
        return self.signature
