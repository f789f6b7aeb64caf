"""A parser's life, as its broker leads it: started, answered, waited for, and not believed.

May import: ``kpmd.bpf.{broker,confine,filters,libbpf,loader_child,loader_end,remote,rights,
seccomp}``, ``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from kpmd.bpf import confine
from kpmd.bpf.broker import PLACEHOLDER, Broker, Made, MadeMap, MadeProgram, Tell
from kpmd.bpf.filters import Filters
from kpmd.bpf.libbpf import Library
from kpmd.bpf.loader_child import ERRORS, Job, parse
from kpmd.bpf.loader_end import EXITED, NOT_STARTED, describe, how_ended, last_words
from kpmd.bpf.remote import Memory
from kpmd.bpf.rights import Rights
from kpmd.bpf.seccomp import Call, Listener
from kpmd.errors import BadObject, KernelError, KpmdError

_TYPES = "/sys/kernel/btf/vmlinux"
#: What libbpf reads of the system: nothing else can be opened.
_READABLE = (
    _TYPES,
    "/sys/devices/system/cpu/possible",
    "/proc/version_signature",
    f"/boot/config-{os.uname().release}",
    "/proc/config.gz",
)
#: What it finds there, where that is another file. Addresses of the kernel are nobody's to have.
_FOUND = {"/proc/kallsyms": os.devnull}
_PATH_MOST = 255

#: Bytes of what a parser says in the end.
_CLAIM_MOST = 1 << 20

#: In which argument a call names its path; the flags or the mode come next.
_PATH_AT = {"open": 0, "access": 0, "openat": 1, "faccessat": 1, "faccessat2": 1}

_U32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Kit:
    """What all requests share, made once by the server; an error in place of what is missing."""

    library: Library | KpmdError
    filters: Filters | KpmdError
    #: The kernel's types in a memory file, which is read at once and not page by page.
    types: int | None
    cpus: int
    job: Job

    def get_filters(self) -> Filters:
        """The filters. Raises NotSupported: nothing is loaded without."""
        if isinstance(self.filters, KpmdError):
            raise self.filters
        return self.filters


class System:
    """What can be read of the system once nothing can be opened any more."""

    def __init__(self, kit: Kit) -> None:
        self._library = kit.library
        self._types: int | None = None
        self._files: dict[str, int] = {}
        # Opened anew, so that its position is not that of other requests.
        types = {} if kit.types is None else {_TYPES: f"/proc/self/fd/{kit.types}"}
        for path, found in {**{each: each for each in _READABLE}, **_FOUND, **types}.items():
            with contextlib.suppress(OSError):
                self._files[path] = os.open(found, os.O_RDONLY | os.O_CLOEXEC)

    def file(self, path: str) -> int:
        """An FD at a file's beginning. Raises OSError (ENOENT)."""
        fd = self._files.get(path)
        if fd is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def kfunc_name(self, number: int) -> str | None:
        """The kernel function of this BTF id; None where it cannot be found out."""
        if isinstance(self._library, KpmdError) or _TYPES not in self._files:
            return None
        if self._types is None:
            # Not with read(2): the parser's copy of this FD has the same position.
            self._types = self._library.types(read_all(self._files[_TYPES]))
        return None if self._types is None else self._library.function_name(self._types, number)


def read_all(fd: int) -> bytes:
    """A file's content; its position stays."""
    content = bytearray()
    while piece := os.pread(fd, 1 << 20, len(content)):
        content += piece
    return bytes(content)


def kernel_types() -> int | None:
    """The kernel's types in a memory file: the kernel gives its own file away page by page only.

    None where it tells none. Raises OSError.
    """
    try:
        with open(_TYPES, "rb", buffering=0) as file:
            content = read_all(file.fileno())
    except FileNotFoundError:
        return None
    fd = os.memfd_create("kpmd-types", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    while content:
        content = content[os.write(fd, content) :]
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@contextlib.contextmanager
def confining() -> Iterator[None]:
    """Say what is missing where a process cannot be confined."""
    try:
        yield
    except OSError as error:
        raise unconfined(error) from error


def unconfined(error: OSError) -> KernelError:
    """What to say where a process cannot be confined."""
    return KernelError(
        f"the process that is to load the program cannot be confined ({error}): kpmd needs CAP_BPF"
        " and CAP_PERFMON, as root also CAP_SETUID, CAP_SETGID, CAP_SETPCAP and CAP_KILL, and a"
        " kernel with seccomp user notification (5.9)",
        error.errno or errno.EIO,
    )


class Session:
    """One object, its parser, and what was made for it."""

    def __init__(
        self,
        kit: Kit,
        limits: dict[str, Any],
        rights: Rights | None,
        system: System,
        tell: Tell,
    ) -> None:
        self._kit, self._filters = kit, kit.get_filters()
        self._limits, self._rights, self._system = limits, rights, system
        self._tell = tell
        self._said = bytearray()

    def load(self, request: int, start: int) -> tuple[dict[str, Any], list[int]]:
        """The answer for the daemon, and the FDs in its order: programs first, then maps.

        ``start``: where the parser's part of the request begins. Raises the errors that a client
        may see.
        """
        ours, theirs = socket.socketpair()
        broker = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            raise describe(NOT_STARTED, error.errno or errno.EAGAIN, 2, self._limits) from error
        if pid == 0:
            self._become_parser(broker, request, start, theirs)
        theirs.close()
        self._pid, self._pidfd, self._channel = pid, os.pidfd_open(pid), ours
        with confining():
            self._meet()
            confine.no_more_processes()
            self._filters.broker.load()
        ours.send(b"\0")
        self._serve()
        how, number = how_ended(os.waitid(os.P_PID, pid, os.WEXITED))
        if (how, number) != (EXITED, 0):
            raise self._broker.refusal or describe(how, number, 2, self._limits)
        return self._answer()

    def _become_parser(
        self, broker: int, request: int, start: int, channel: socket.socket
    ) -> NoReturn:
        status = 70
        try:
            confine.close_others({0, 1, 2, request, channel.fileno()})
            job, library = self._kit.job, self._kit.library
            parse(job, library, self._filters, self._limits, broker, request, start, channel)
            status = 0
        except BaseException as error:  # noqa: BLE001, RUF100 - the broker's code must not run here
            os.write(2, str(error).encode())
        finally:
            os._exit(status)

    def _meet(self) -> None:
        """Take over the parser's calls and memory, while it is still to be trusted."""
        _, fds, _, _ = socket.recv_fds(self._channel, 1, 1)
        if not fds:
            os.waitid(os.P_PID, self._pid, os.WEXITED)
            raise OSError(errno.EPERM, last_words(2))
        memory = Memory(self._pid)
        self._listener = Listener(fds[0])
        self._broker = Broker(
            memory, self._limits, self._rights, self._kit.cpus, self._system.kfunc_name, self._tell
        )

    def _serve(self) -> None:
        """Answer the parser's calls until it has ended."""
        poll = select.poll()
        for each in (self._listener.fileno(), self._channel.fileno(), self._pidfd):
            poll.register(each, select.POLLIN)
        ended = False
        while not ended:
            for number, events in poll.poll():
                if number == self._pidfd:
                    ended = True
                elif number == self._channel.fileno():
                    if not self._listen():
                        poll.unregister(number)
                elif events & select.POLLIN:
                    self._answer_call()
                else:  # nobody is left who could call
                    poll.unregister(number)
        while self._listen():
            pass

    def _listen(self) -> bool:
        """Take what the parser says; False when there is nothing more. FDs in it are dropped."""
        try:
            data = self._channel.recv(65536, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return False
        self._said += data
        if len(self._said) > _CLAIM_MOST:
            self._said.clear()
            os.kill(self._pid, signal.SIGKILL)  # not waited for yet: the number is its own
        return bool(data)

    def _answer_call(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            call = self._listener.receive()
            try:
                result = self._do(call)
            except MemoryError:
                result = -errno.ENOMEM
            except OSError as error:
                result = -(error.errno or errno.EIO)
            self._listener.reply(call, result)

    def _do(self, call: Call) -> int:
        """Make a call in the parser's place. Raises OSError, as the kernel would."""
        name, arguments = self._filters.asked[call.number], call.arguments
        held = self._broker.held
        made: int | Made | None
        if name == "bpf":
            made = self._broker.command(arguments[0] & _U32, arguments[1], arguments[2] & _U32)
            if isinstance(made, int):
                return made
            number = self._listener.add(call, made.given)
        elif name == "dup3":
            # libbpf keeps a place for each map's FD, and moves it there.
            if (made := held.get(arguments[0] & _U32)) is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            number = self._listener.add(call, made.given, arguments[1] & _U32)
        else:
            fd = PLACEHOLDER if name == "memfd_create" else self._path(name, arguments)
            if fd is None:
                return 0
            number, made = self._listener.add(call, fd), None
        # A number that was something else's is so no more.
        held.pop(number, None)
        if made is not None:
            held[number] = made
        return number

    def _path(self, name: str, arguments: tuple[int, ...]) -> int | None:
        """What a call that names a path gets: an FD, or None where it only asks whether it may."""
        at = _PATH_AT[name]
        path = self._broker.path(arguments[at], _PATH_MOST)
        fd = self._system.file(path.decode("ascii", "replace"))
        wanted = arguments[at + 1] & _U32
        allowed = os.O_CLOEXEC | os.O_LARGEFILE if name.startswith("open") else os.R_OK
        if wanted & ~allowed:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return fd if name.startswith("open") else None

    def _answer(self) -> tuple[dict[str, Any], list[int]]:
        """What the parser says, as far as it is so."""
        try:
            said = json.loads(self._said)
            if "error" in said:
                if self._broker.refusal is not None:
                    raise self._broker.refusal
                if said["error"] not in ERRORS:
                    raise ValueError("it tells an error that is not its own")
                return said, []
            return self._made(said)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadObject(
                f"the process that read the object gave an answer that makes no sense: {error}"
            ) from error

    def _made(self, said: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Names from the parser; what they are of, from here. The daemon checks the names."""
        programs, maps, fds = [], [], []
        if len(said["programs"]) + len(said["maps"]) > len(self._broker.held):
            raise ValueError("it tells of more than was made")
        for each in said["programs"]:
            made = self._broker.held[each["fd"]]
            if not isinstance(made, MadeProgram) or made.attach is None:
                raise ValueError("what it calls a program is none")
            programs.append({"name": each["name"], "attach": made.attach, "log": each["log"]})
            fds.append(made.fd)
        for each in said["maps"]:
            made = self._broker.held[each["fd"]]
            if not isinstance(made, MadeMap):
                raise ValueError("what it calls a map is none")
            maps.append({name: each[name] for name in ("name", "key_type", "value_type")})
            fds.append(made.fd)
        return {"programs": programs, "maps": maps, "btf": said["btf"]}, fds
