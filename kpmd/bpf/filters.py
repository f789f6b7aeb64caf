"""Which system calls the loader's processes may make.

The parser runs libbpf on what a client sent, and is taken for hostile: what it may not do kills it,
and what it needs of the kernel it asks the broker for. The broker is kpmd's own code; what it does
not need fails. May import: ``kpmd.bpf.{abi,seccomp}``.
"""

from __future__ import annotations

import errno
import mmap
import signal

from kpmd.bpf.abi import Cmd
from kpmd.bpf.seccomp import ALLOW, ASK, KILL, Library, equal, refuse, without

#: What the broker does in the parser's place.
ASKED = ("bpf", "openat", "open", "access", "faccessat", "faccessat2", "memfd_create", "dup3")

#: Memory, time, signals and the end: harmless everywhere. Without mmap and mprotect, which may
#: make no code.
_OWN = (
    *("munmap", "mremap", "madvise", "brk", "futex", "futex_time64", "sched_yield"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"),
    *("clock_gettime", "clock_gettime64", "gettimeofday", "time", "getrandom"),
    *("getpid", "gettid", "exit", "exit_group"),
)
#: Of FDs that a process has.
_OF_FDS = ("read", "pread64", "write", "writev", "close", "lseek", "_llseek", "fstat")
_MEMORY = ("mmap", "mmap2", "mprotect")

#: What libraries ask for and can do without (abort(3) ends by other means). A filter cannot look at
#: a path, so that nothing is told of any.
_ABSENT = ("newfstatat", "stat", "lstat", "statx", "statfs", "readlink", "readlinkat", "getcwd")
_LIMITS = ("prlimit64", "getrlimit", "setrlimit", "tgkill", "tkill")

_PARSER = (*_OWN, *_OF_FDS, "uname", "getuid", "geteuid", "getgid", "getegid")
_BROKER = (
    *(*_OWN, *_OF_FDS, "preadv", "preadv2", "pwrite64", "poll", "ppoll", "ppoll_time64"),
    *("ioctl", "fcntl", "waitid", "sendmsg", "sendto", "recvmsg", "recvfrom"),
    *("getsockname", "getpeername", "getsockopt"),
)
_COMMANDS = (
    *(Cmd.MAP_CREATE, Cmd.MAP_UPDATE_ELEM, Cmd.MAP_FREEZE, Cmd.PROG_LOAD, Cmd.PROG_BIND_MAP),
    Cmd.BTF_LOAD,
)
#: fcntl(2): what tells of an FD, and makes no other one.
_HARMLESS_FCNTL = (1, 2, 3)  # F_GETFD, F_SETFD, F_GETFL


class Filters:
    """The filters of both processes, made once. Raises NotSupported and OSError."""

    def __init__(self, library: Library) -> None:
        #: The name of each call that is asked about, by its number.
        self.asked = {library.number(name): name for name in ASKED}
        asking = library.filter(ALLOW)
        asking.add(ASK, ASKED)
        parser = library.filter(KILL)
        parser.add(ALLOW, (*_PARSER, *ASKED))
        parser.add(refuse(errno.ENOENT), _ABSENT)
        parser.add(refuse(errno.ENOTTY), ["ioctl"])
        parser.add(refuse(errno.EPERM), _LIMITS)
        for command in _HARMLESS_FCNTL:
            parser.add(ALLOW, ["fcntl"], equal(1, command))
        broker = library.filter(refuse(errno.EPERM))
        broker.add(ALLOW, _BROKER)
        broker.add(ALLOW, ["kill"], equal(1, signal.SIGKILL))
        for cmd in _COMMANDS:
            broker.add(ALLOW, ["bpf"], equal(0, cmd))
        for each in (parser, broker):
            each.add(ALLOW, _MEMORY, without(2, mmap.PROT_EXEC))
        #: For the parser, loaded first: what its broker is asked.
        self.asking = asking.made()
        #: For the parser, loaded second: from there on it is taken for hostile.
        self.parser = parser.made()
        self.broker = broker.made()
