"""The real kernel, behind the Protocol of ``kpmd.runtime.kernel``. All calls block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kpmd.bpf import features, kallsyms, maps, objects, perf, rings, tracefs
from kpmd.bpf.abi import LINK_TYPE_PERF_EVENT, AttachType
from kpmd.bpf.content import MapContent
from kpmd.bpf.fd import OwnedFd
from kpmd.bpf.loader import InstructionsRequest, Loader, LoaderLimits, ObjectRequest
from kpmd.bpf.objects import LinkDetails, MapDetails, ProgramInfo
from kpmd.bpf.progress import Progress
from kpmd.bpf.rights import Rights
from kpmd.errors import NotSupported

#: Attach types under the names of the API.
ATTACH_TYPES = {
    "kprobe_multi": AttachType.KPROBE_MULTI,
    "kprobe_session": AttachType.KPROBE_SESSION,
}
_ATTACH_NAMES = {number: name for name, number in ATTACH_TYPES.items()}
#: A program for kprobe multi, loaded for perf events.
_ATTACH_NAMES[AttachType.NONE] = "kprobe_multi"

#: What /proc/self/fd says of file descriptors (kernel/bpf/syscall.c, kernel/events/core.c), without
#: what kernels write it in differently.
_KINDS = {"bpf-prog": "program", "bpf-map": "map", "bpf-link": "link", "perf-event": "event"}

#: How programs get to their functions: all at once, or one by one.
MECHANISMS = ("kprobe_multi", "perf_event")


def _one_by_one(attach: str | None, mechanism: str) -> bool:
    """Whether to load for perf events. Raises NotSupported for what cannot be attached so."""
    if mechanism not in MECHANISMS:
        raise ValueError(mechanism)
    if mechanism == "perf_event" and attach == "kprobe_session":
        raise NotSupported(
            "this kernel attaches to functions one by one, which has no sessions: load one program"
            " for the entry and one for the return",
            needs="kernel 6.10",
        )
    return mechanism == "perf_event"


@dataclass(frozen=True)
class LoadedProgram:
    """A program in the kernel: its FD, what it is for, and what the kernel tells of it."""

    name: str
    attach: str
    fd: OwnedFd
    info: ProgramInfo
    log: str | None = None


@dataclass(frozen=True)
class LoadedMap:
    """A map in the kernel."""

    name: str
    fd: OwnedFd
    details: MapDetails
    #: Ids in the object's BTF; 0: it says nothing of them.
    key_type: int = 0
    value_type: int = 0


@dataclass(frozen=True)
class Loaded:
    """What one load made: programs, and the maps they share.

    ``btf``: the object's, as hostile as the object; empty without any.
    """

    programs: Sequence[LoadedProgram]
    maps: Sequence[LoadedMap] = ()
    btf: bytes = b""

    def close(self) -> None:
        """Close all FDs: links that use them keep what they need alive."""
        for program in self.programs:
            program.fd.close()
        for each in self.maps:
            each.fd.close()


class LinuxKernel:
    """The machine's own kernel, and the loader's processes."""

    def __init__(
        self, limits: LoaderLimits | None = None, files: tracefs.Files | None = None
    ) -> None:
        """``files``: root's lists of functions, where they were opened for this process."""
        uname = os.uname()
        self.release = uname.release
        self.machine = uname.machine
        self.features = tuple((each.name, each.min_kernel) for each in features.FEATURES)
        self._loader = Loader(limits or LoaderLimits())
        self._files = files or tracefs.Files()
        self._cpus = maps.possible_cpus()

    def start(self) -> None:
        """Warm the loader up, so that the first object does not wait for it."""
        self._loader.start()

    def close(self) -> None:
        """End the loader. FDs handed out stay open."""
        self._loader.close()

    def test_feature(self, name: str) -> features.Answer:
        """Run one feature test; not cached here."""
        return next(each.test() for each in features.FEATURES if each.name == name)

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
        """Load one program from raw instructions; see ``Loader.load_instructions`` for its errors.

        ``mechanism`` "perf_event": for ``create_perf_links`` instead of ``create_link``; raises
        NotSupported for a session program. The program's ``attach`` stays what was asked for.
        ``rights`` None: everything is allowed. ``progress`` is kept up to date meanwhile.
        """
        one_by_one = _one_by_one(attach, mechanism)
        made = self._loader.load_instructions(
            InstructionsRequest(
                instructions=instructions,
                name=name,
                license=license_,
                attach=AttachType.NONE if one_by_one else ATTACH_TYPES[attach],
                want_log=want_log,
                rights=rights,
            ),
            progress,
        )
        try:
            info = objects.program_info(made.fd)
            return Loaded([LoadedProgram(name, attach, made.fd, info, made.log)])
        except BaseException:
            made.fd.close()
            raise

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
        """Load an ELF object through the loader; see ``loader.Loader.load`` for its errors.

        ``mechanism``, ``rights`` and ``progress`` are those of ``load_instructions``.
        """
        one_by_one = _one_by_one(attach, mechanism)
        made = self._loader.load(
            ObjectRequest(
                elf=elf,
                programs=None if programs is None else tuple(programs),
                attach=None if attach is None else ATTACH_TYPES[attach],
                one_by_one=one_by_one,
                globals=globals_,
                max_entries=max_entries,
                want_log=want_log,
                rights=rights,
            ),
            progress,
        )
        try:
            return Loaded(
                [
                    LoadedProgram(
                        each.name,
                        _ATTACH_NAMES[each.attach],
                        each.fd,
                        objects.program_info(each.fd),
                        each.log,
                    )
                    for each in made.programs
                ],
                [
                    LoadedMap(
                        each.name,
                        each.fd,
                        objects.map_info(each.fd),
                        each.key_type,
                        each.value_type,
                    )
                    for each in made.maps
                ],
                made.btf,
            )
        except BaseException:
            made.close()
            raise

    def create_link(
        self,
        program: OwnedFd,
        attach: str,
        *,
        retprobe: bool,
        addresses: Sequence[int],
        symbols: Sequence[str],
        cookies: Sequence[int],
    ) -> tuple[OwnedFd, LinkDetails]:
        """One kprobe-multi link to all targets. Raises OSError with the kernel's errno."""
        fd = objects.link_create(
            program,
            ATTACH_TYPES[attach],
            retprobe=retprobe,
            addresses=addresses,
            symbols=[name.encode() for name in symbols],
            cookies=cookies,
        )
        try:
            return fd, objects.link_info(fd)
        except BaseException:
            fd.close()
            raise

    def create_perf_links(
        self,
        program: OwnedFd,
        *,
        retprobe: bool,
        addresses: Sequence[int],
        symbols: Sequence[str],
        cookies: Sequence[int],
        progress: Progress | None = None,
    ) -> tuple[perf.PerfLinks, LinkDetails]:
        """A kprobe on each target; see ``perf.attach_all`` for its errors.

        The program is one that was loaded with the mechanism "perf_event".
        """
        links = perf.attach_all(program, addresses, symbols, cookies, retprobe, progress)
        try:
            return links, links.details()
        except BaseException:
            links.close()
            raise

    def link_details(self, link: OwnedFd | perf.PerfLinks) -> LinkDetails:
        """The kernel's present count and missed count of a link."""
        return link.details() if isinstance(link, perf.PerfLinks) else objects.link_info(link)

    def what_is(self, fd: OwnedFd) -> str:
        """What an FD is: "program", "map", "link", "event" (a perf event), or what it reads as."""
        name = os.readlink(f"/proc/self/fd/{fd.fileno()}")
        plain = name.removeprefix("anon_inode:").strip("[]").replace("_", "-")
        return _KINDS.get(plain, name)

    def program_details(self, program: OwnedFd) -> ProgramInfo:
        """What the kernel tells of a program."""
        return objects.program_info(program)

    def map_details(self, map_: OwnedFd) -> MapDetails:
        """What the kernel tells of a map."""
        return objects.map_info(map_)

    def link_mechanism(self, fd: OwnedFd) -> Literal["kprobe_multi", "perf_event"]:
        """How a link's FD was made: the link itself, or one of those to single functions."""
        one = self.what_is(fd) == "event" or objects.link_type(fd) == LINK_TYPE_PERF_EVENT
        return "perf_event" if one else "kprobe_multi"

    def adopt_perf_links(self, fds: Sequence[OwnedFd]) -> perf.PerfLinks:
        """The FDs of ``create_perf_links`` as one link again. Takes them over."""
        return perf.adopt(fds)

    def content(self, map_: OwnedFd, details: MapDetails) -> MapContent:
        """What is in a map. Raises TooLarge where a single entry is."""
        return MapContent(map_, details, self._cpus)

    def open_ring(self, map_: OwnedFd, details: MapDetails) -> rings.RingMemory:
        """A ring buffer's memory, mapped. Raises KernelError."""
        return rings.RingMemory(map_, details.max_entries)

    def open_perf(self, map_: OwnedFd) -> rings.PerfBuffers:
        """Perf buffers for a perf event array. Raises KernelError, NotSupported."""
        return rings.PerfBuffers(map_)

    def symbol_files(self) -> kallsyms.SymbolFiles:
        """The raw lists of functions."""
        return kallsyms.read_symbol_files(self._files)

    def modules_signature(self) -> tuple[bytes, ...]:
        """Changes with every module load and unload."""
        return kallsyms.modules_signature()

    def release_memory(self) -> None:
        """Give back what building an index has freed."""
        kallsyms.release_memory()
