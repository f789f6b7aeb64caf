"""What the loader's short-lived process does: confine itself, then run libbpf on one object.

It is started by ``loader_server`` for one request and ends after it. Until ``confine`` has returned
it reads nothing that a client wrote; after that it is taken for hostile: the daemon checks its
answer, and the server ends it when its time is up. May import: ``kpmd.bpf.{abi,confine,libbpf}``,
``kpmd.errors``; keep the imports few, every child carries them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import re
import socket
from collections.abc import Iterable
from typing import Any

from kpmd.bpf.abi import MAX_INSNS, PERCPU_TYPES, AttachType, ProgType
from kpmd.bpf.confine import confine
from kpmd.bpf.libbpf import LibbpfError, Library, Map, Object, Program
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
_LOG_MOST = 16 * 1024 * 1024
_LOG_SHARED = 96 * 1024 * 1024
#: BPF_LOG_LEVEL1 | BPF_LOG_STATS, for the log of a program that the verifier takes; and the
#: statistics alone, for one whose whole log is too long: the kernel refuses that with ENOSPC.
_LOG_ALL, _LOG_STATS = 1 | 4, 4

#: libbpf's own words in an error, in bytes and lines.
_WORDS_KEPT, _WORDS_LINES = 2048, 6
_NAME_MOST, _SHOWN = 255, 64

_MULTI = ("kprobe.multi", "kretprobe.multi")
_SESSION = ("kprobe.session",)
_SINGLE = ("kprobe", "kretprobe")

# include/uapi/linux/bpf.h: the map types that need another formula for their memory.
_ARRAY, _ARENA, _PAGE = 2, 33, 4096
_RINGBUFS = frozenset({27, 31})
#: What an entry of a hash costs beside its key and value, generously.
_ENTRY_COST = 64


def run(
    library: Library | KpmdError,
    limits: dict[str, int],
    parent: int,
    request: int,
    reply: int,
    words: int,
) -> None:
    """Confine this process, load the object in ``request`` and send the answer to ``reply``."""
    os.dup2(words, 2)
    answer: dict[str, Any]
    fds: list[int] = []
    try:
        _confine(limits, parent)
        if isinstance(library, KpmdError):
            raise library
        size = os.fstat(request).st_size
        content = os.pread(request, size, 0)
        cut = content.index(b"\n")
        answer, fds = _Job(library, limits, json.loads(content[:cut]), content[cut + 1 :]).load()
    except MemoryError:
        answer = _problem(_out_of_memory(limits))
    except KpmdError as error:
        answer = _problem(error)
    except OSError as error:
        what = f"libbpf cannot use the object: {error}"
        short = error.errno == errno.ENOMEM
        answer = _problem(_out_of_memory(limits) if short else BadObject(what))
    raw = json.dumps(answer).encode()
    with socket.socket(fileno=reply) as channel:
        sent = socket.send_fds(channel, [raw], fds) if fds else 0
        if sent < len(raw):
            channel.sendall(raw[sent:])


def _confine(limits: dict[str, int], parent: int) -> None:
    try:
        confine(limits, parent)
    except OSError as error:
        raise KernelError(
            f"the process that is to read the object cannot be confined ({error}): kpmd needs"
            " CAP_BPF, CAP_PERFMON, CAP_SETUID, CAP_SETGID, CAP_SETPCAP and CAP_KILL",
            error.errno or errno.EIO,
        ) from error


def _problem(error: KpmdError) -> dict[str, Any]:
    number = error.number if isinstance(error, KernelError) else None
    return {
        "error": error.kind,
        "detail": error.detail,
        "errno": number,
        "fields": error.fields,
    }


def _out_of_memory(limits: dict[str, int]) -> BadObject:
    return BadObject(
        f"out of memory: reading the object took more than {limits['memory_bytes'] >> 20} MiB"
    )


def _words() -> str:
    """The end of what libbpf wrote to standard error, without its prefix."""
    size = os.fstat(2).st_size
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
        self._log_level = _LOG_ALL if request["want_log"] else 0

    def load(self) -> tuple[dict[str, Any], list[int]]:
        """The answer for the daemon and the FDs, programs first, in the answer's order."""
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
        try:
            loaded.load()
        except LibbpfError as error:
            lower = {_LOG_ALL: _LOG_STATS, _LOG_STATS: 0}.get(self._log_level)
            if lower is None or (self._log_level == _LOG_ALL and error.number != errno.ENOSPC):
                raise self._refused(error) from error
            self._log_level = lower  # at 0, libbpf asks for the whole log of a refused program
            self._logs.clear()
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
            return self.load()
        answer = {
            "programs": [
                {"name": program.name, "attach": kind, "log": log}
                for program, kind, log in zip(programs, attach, self._logs_kept(), strict=True)
            ],
            "maps": [{"name": each.name} for each in maps],
        }
        fds = [program.fd() for program in programs]
        return answer, fds + [each.fd() for each in maps]

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
        size = min(_LOG_MOST, _LOG_SHARED // programs) // mmap.PAGESIZE * mmap.PAGESIZE
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
            total += _bytes_of(each, cpus) + (_bytes_of(each.inner, cpus) if each.inner else 0)
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
            return _out_of_memory(self._limits)
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
            return KernelError(
                f"the kernel refused program {said[1]} without a reason: {error.strerror}",
                error.number,
            )
        if "load trivial BPF program" in words:
            what = f"kpmd may not load BPF programs on this machine: {error.strerror}"
            return KernelError(what, error.number)
        said = re.search(r"map '([^']*)': failed to create: ", words)
        if said and error.number == errno.E2BIG:
            return TooLarge(f"map {said[1]} is larger than the kernel allows")
        if said and error.number in (errno.EINVAL, errno.EOPNOTSUPP):
            return BadObject(f"the kernel does not take map {said[1]}: {words}")
        if said:
            what = f"the kernel did not create map {said[1]}: {error.strerror}"
            return KernelError(what, error.number)
        return self._unreadable(error)


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
    """About what a map takes of the kernel's memory when it is full."""
    if each.type in _RINGBUFS:
        return each.max_entries
    if each.type == _ARENA:
        return each.max_entries * _PAGE
    value = -(-each.value_size // 8) * 8 * (cpus if each.type in PERCPU_TYPES else 1)
    return each.max_entries * (each.key_size + value + (0 if each.type == _ARRAY else _ENTRY_COST))


def _end_of(memory: mmap.mmap, most: int) -> tuple[str, bool]:
    """The end of the text in a log buffer, and whether something before it was left out."""
    length = memory.find(b"\0")
    if length < 0:
        length = len(memory)
    text = memory[max(0, length - most) : length].decode("ascii", "replace")
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    return shown, length > most
