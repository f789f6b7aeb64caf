"""What the loader's parser does: give everything up, then run libbpf on one object.

Its broker (``loader_session``) starts it for one request. Until it is confined it reads nothing
that a client wrote; after that it is taken for hostile: the broker makes its system calls and
checks what it says, and the server ends both when their time is up. May import:
``kpmd.bpf.{abi,broker,confine,filters,libbpf,loader_answer,loader_end,maps}``, ``kpmd.errors``;
keep the imports few, every process of the loader carries them.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import mmap
import os
import re
import socket
from collections.abc import Callable, Iterable
from typing import Any

from kpmd.bpf import confine
from kpmd.bpf.abi import MAX_INSNS, AttachType, ProgType
from kpmd.bpf.broker import LOG_ALL, LOG_MOST
from kpmd.bpf.filters import Filters
from kpmd.bpf.libbpf import LibbpfError, Library, Map, Object, Program
from kpmd.bpf.loader_answer import BTF_MOST
from kpmd.bpf.loader_end import out_of_memory, problem
from kpmd.bpf.maps import memory_of
from kpmd.errors import (
    BadObject,
    Invalid,
    KernelError,
    KpmdError,
    NotSupported,
    TooLarge,
    VerifierRejected,
    WrongAttachType,
)

#: The end of a verifier log that is kept, and the memory that all programs' logs share.
_LOG_KEPT = 64 * 1024
_LOG_SHARED = 96 * 1024 * 1024

#: libbpf's own words in an error, in bytes and lines.
_WORDS_KEPT, _WORDS_LINES = 2048, 6
_NAME_MOST, _SHOWN = 255, 64

#: What the kernel says of maps and programs that it would never take from kpmd (524: ENOTSUPP).
_AT_FAULT = frozenset(
    {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOENT, errno.EBADF, errno.EOPNOTSUPP, 524}
)

_MULTI = ("kprobe.multi", "kretprobe.multi")
_SESSION = ("kprobe.session",)
_SINGLE = ("kprobe", "kretprobe")

#: What a parser can tell of; other errors are for its broker to find.
ERRORS = frozenset(
    each.kind
    for each in (
        BadObject,
        Invalid,
        KernelError,
        NotSupported,
        TooLarge,
        VerifierRejected,
        WrongAttachType,
    )
)

#: What a parser does with the limits, the line of the request for it and the object: it gives an
#: answer, in which FDs are the numbers that it knows.
Job = Callable[[Library | KpmdError, dict[str, Any], dict[str, Any], bytes], dict[str, Any]]


def parse(
    job: Job,
    library: Library | KpmdError,
    filters: Filters,
    limits: dict[str, Any],
    broker: int,
    request: int,
    start: int,
    channel: socket.socket,
) -> None:
    """Confine this process, do the job and say on ``channel`` what came of it.

    The first thing on ``channel`` is the FD to answer this process's calls by; what comes back when
    the broker is ready is one byte. Raises OSError where it cannot be confined.
    """
    confine.give_up_everything(broker)
    confine.set_dumpable(True)  # for the broker, which opens this process's memory now
    listener = filters.asking.load_and_listen()
    socket.send_fds(channel, [b"\0"], [listener])
    os.close(listener)
    if not channel.recv(1):
        return
    confine.set_dumpable(False)
    filters.parser.load()
    answer: dict[str, Any]
    try:
        size = os.lseek(request, 0, os.SEEK_END) - start
        head, _, elf = os.pread(request, size, start).partition(b"\n")
        answer = job(library, limits, json.loads(head), elf)
    except MemoryError:
        answer = problem(out_of_memory(limits))
    except KpmdError as error:
        answer = problem(error)
    except OSError as error:
        what = f"libbpf cannot use the object: {error}"
        short = error.errno == errno.ENOMEM
        answer = problem(out_of_memory(limits) if short else BadObject(what))
    raw = memoryview(json.dumps(answer).encode())
    while raw:
        raw = raw[os.write(channel.fileno(), raw) :]


def load_object(
    library: Library | KpmdError, limits: dict[str, Any], request: dict[str, Any], elf: bytes
) -> dict[str, Any]:
    """A parser's true job. Raises the errors that a client may see, MemoryError and OSError."""
    if isinstance(library, KpmdError):
        raise library
    return _Job(library, limits, request, elf).load()


def _words() -> str:
    """The end of what libbpf wrote to standard error, without its prefix."""
    size = os.lseek(2, 0, os.SEEK_END)
    text = os.pread(2, _WORDS_KEPT, max(0, size - _WORDS_KEPT)).decode("ascii", "backslashreplace")
    lines = [line.removeprefix("libbpf: ").strip() for line in text.splitlines()]
    return "; ".join([line for line in lines if line][-_WORDS_LINES:])


class _Job:
    """One object on its way into the kernel."""

    def __init__(
        self, library: Library, limits: dict[str, int], request: dict[str, Any], elf: bytes
    ) -> None:
        self._library, self._limits, self._request, self._elf = library, limits, request, elf
        self._logs: list[tuple[Program, mmap.mmap]] = []
        self._log_level = LOG_ALL if request["want_log"] else 0

    def load(self) -> dict[str, Any]:
        """The answer: programs and maps, each with the FD that libbpf has for it."""
        if not self._elf.startswith(b"\x7fELF"):
            raise BadObject("this is not an ELF object: send what `clang -target bpf -c` makes")
        try:
            loaded = self._library.open(self._elf)
        except LibbpfError as error:
            raise self._unreadable(error) from error
        programs = self._choose(loaded.programs())
        attach = [self._attach(program) for program in programs]
        for program, kind in zip(programs, attach, strict=True):
            program.set_type(ProgType.KPROBE, kind)
            self._give_log(program, len(programs))
        maps = self._prepare_maps(loaded)
        self._set_globals(loaded)
        types = loaded.types()
        try:
            loaded.load()
        except LibbpfError as error:
            raise self._refused(error) from error
        logs = self._logs_kept()
        return {
            "programs": [
                {"name": program.name, "fd": program.fd(), "log": log}
                for program, log in zip(programs, logs, strict=True)
            ],
            "maps": [
                {
                    "name": each.name,
                    "fd": each.fd(),
                    "key_type": each.key_type,
                    "value_type": each.value_type,
                }
                for each in maps
            ],
            "btf": base64.b64encode(types).decode() if len(types) <= BTF_MOST else "",
        }

    def _choose(self, present: list[Program]) -> list[Program]:
        """The programs asked for; without a wish all but those in a section ``?…``."""
        if not present:
            raise BadObject("the object holds no BPF program")
        by_name = {program.name: program for program in present}
        wanted = self._request["programs"]
        if wanted is None:
            chosen = [program for program in present if program.autoload]
            if not chosen:
                raise BadObject("every program's section starts with `?`: name those to load")
        else:
            for index, name in enumerate(wanted):
                if name not in by_name:
                    known = _listed(by_name)
                    raise Invalid.at(
                        ["source", "programs", index],
                        f"the object has no program of this name; it has: {known}",
                    )
            chosen = [by_name[name] for name in dict.fromkeys(wanted)]
        most = self._limits["max_programs"]
        if len(chosen) > most:
            raise BadObject(f"{len(chosen)} programs are too many: load at most {most} at a time")
        _check_names("program", [program.name for program in chosen])
        for program in present:
            program.set_autoload(program in chosen)
        return chosen

    def _attach(self, program: Program) -> int:
        """The attach type to load the program with."""
        kind = self._wanted_attach(program)
        if not self._request["one_by_one"]:
            return kind
        if kind == AttachType.KPROBE_SESSION:
            raise NotSupported(
                f"program {program.name} is for kprobe_session, and this kernel attaches to"
                " functions one by one, which has no sessions: load one program for the entry and"
                " one for the return",
                needs="kernel 6.10",
            )
        return AttachType.NONE

    def _wanted_attach(self, program: Program) -> int:
        """The program's attach type: the one asked for, else what its section says."""
        section = program.section.partition("/")[0]
        if section not in (*_MULTI, *_SESSION, *_SINGLE):
            raise WrongAttachType(
                f"program {program.name} is in section {program.section[:_NAME_MOST]!r}: kpmd loads"
                " kprobe.multi, kretprobe.multi and kprobe.session, and kprobe and kretprobe where"
                " `attach` is given"
            )
        if self._request["attach"] is not None:
            return int(self._request["attach"])
        if section in _SINGLE:
            raise Invalid.at(
                ["attach"],
                f"give it: section {section!r} of program {program.name} does not say whether the"
                " program is for kprobe_multi or kprobe_session",
            )
        return AttachType.KPROBE_SESSION if section in _SESSION else AttachType.KPROBE_MULTI

    def _give_log(self, program: Program, programs: int) -> None:
        """Give the program's log memory of its own, taken page by page as the verifier writes."""
        size = min(LOG_MOST, _LOG_SHARED // programs) // mmap.PAGESIZE * mmap.PAGESIZE
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        program.set_log(address, size, self._log_level)
        self._logs.append((program, memory))

    def _logs_kept(self) -> list[str | None]:
        """The programs' logs, where they are wanted: together no more than one may be long."""
        if not self._request["want_log"]:
            return [None] * len(self._logs)
        share = _LOG_KEPT // len(self._logs)
        return [_end_of(memory, share)[0] for _, memory in self._logs]

    def _prepare_maps(self, loaded: Object) -> list[Map]:
        """Set the sizes asked for, and look at the maps before the kernel does."""
        maps = loaded.maps()
        names = [each.name for each in maps]
        if len(maps) > self._limits["max_maps"]:
            most = self._limits["max_maps"]
            raise BadObject(f"{len(maps)} maps are too many: an object may have at most {most}")
        _check_names("map", names)
        own = {each.name: each for each in maps if not each.internal}
        for name, size in self._request["max_entries"].items():
            loc = ["source", "max_entries", name]
            if name not in own:
                known = _listed(own)
                raise Invalid.at(loc, f"the object has no map of this name; it has: {known}")
            try:
                own[name].set_max_entries(size)
            except LibbpfError as error:
                raise Invalid.at(loc, f"libbpf refuses this size: {error.strerror}") from error
        cpus = loaded.possible_cpus()
        total = 0
        for each in maps:
            if each.pinned:
                raise BadObject(
                    f"map {each.name} asks to be pinned: kpmd pins nothing and takes no pinned map"
                    " over; leave `pinning` out"
                )
            total += sum(_bytes_of(one, cpus) for one in (each, each.inner) if one)
        if total > self._limits["map_bytes"]:
            raise TooLarge(
                f"the object's maps take about {total >> 20} MiB of kernel memory, and"
                f" {self._limits['map_bytes'] >> 20} MiB are allowed: make max_entries smaller"
            )
        return maps

    def _set_globals(self, loaded: Object) -> None:
        wanted: dict[str, int | str] = self._request["globals"]
        if not wanted:
            return
        variables = loaded.variables()
        for name, value in wanted.items():
            loc = ["source", "globals", name]
            try:
                variables.set(name, bytes.fromhex(value) if isinstance(value, str) else value)
            except KeyError:
                reason = "the object has no global variable of this name"
                if not variables.known:
                    reason = "the object has no BTF to find variables with: compile it with -g"
                raise Invalid.at(loc, reason) from None
            except ValueError as error:
                raise Invalid.at(loc, str(error)) from error

    def _unreadable(self, error: LibbpfError) -> KpmdError:
        """What to say where libbpf failed on its own."""
        if error.number == errno.ENOMEM:
            return out_of_memory(self._limits)
        return BadObject(f"libbpf cannot use the object: {_words() or error.strerror}")

    def _refused(self, error: LibbpfError) -> KpmdError:
        """What to say where loading failed: who refused what can be told by libbpf's words only."""
        words = _words()
        failed = [(program, memory) for program, memory in self._logs if memory[0] != 0]
        said = re.search(r"prog '([^']*)': BPF program load failed", words)
        if failed and said:
            program, memory = failed[-1]
            log, truncated = _end_of(memory, _LOG_KEPT)
            reason = error.strerror
            if error.number == errno.ENOSPC:  # of the log, which hides the true reason
                reason, truncated = "see the end of its log", True
            return VerifierRejected(
                f"the verifier refused program {program.name}: {reason}", log, truncated
            )
        if said:
            if any(p.instructions > MAX_INSNS for p, _ in self._logs if p.name == said[1]):
                return TooLarge(f"program {said[1]} has more than {MAX_INSNS} instructions")
            what = f"the kernel refused program {said[1]} without a reason: {error.strerror}"
            return _by_errno(what, error.number)
        if "load trivial BPF program" in words:
            what = f"kpmd may not load BPF programs on this machine: {error.strerror}"
            return KernelError(what, error.number)
        said = re.search(r"map '([^']*)': failed to create: ", words)
        if said and error.number == errno.E2BIG:
            return TooLarge(f"map {said[1]} is larger than the kernel allows")
        if said:
            return _by_errno(f"the kernel does not take map {said[1]}: {words}", error.number)
        return self._unreadable(error)


def _by_errno(what: str, number: int) -> KpmdError:
    """Whether it is the object's fault, which asks for what cannot be, or for what kpmd may not."""
    return BadObject(what) if number in _AT_FAULT else KernelError(what, number)


def _listed(names: Iterable[str]) -> str:
    """Some of the names for an error: not so many or so long that it cannot be read."""
    return ", ".join(name[:_SHOWN] for name in sorted(names)[:20]) or "none"


def _check_names(what: str, names: list[str]) -> None:
    for name in names:
        if not name or len(name) > _NAME_MOST or not name.isprintable():
            raise BadObject(f"the name of a {what} is empty, too long or not printable")
    if len(set(names)) != len(names):
        raise BadObject(f"two {what}s have the same name")


def _bytes_of(each: Map, cpus: int) -> int:
    return memory_of(each.type, each.key_size, each.value_size, each.max_entries, cpus)


def _end_of(memory: mmap.mmap, most: int) -> tuple[str, bool]:
    """The end of the text in a log buffer, and whether something before it was left out."""
    length = memory.find(b"\0")
    if length < 0:
        length = len(memory)
    text = memory[max(0, length - most) : length].decode("ascii", "replace")
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    return shown, length > most
