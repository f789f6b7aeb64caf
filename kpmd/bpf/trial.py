"""What ``kpmd --check`` tries by itself: the libraries, and one load through the loader.

Runs in a process of its own, not in the daemon: it loads libbpf. May import: ``kpmd.bpf.{kernel,
libbpf,seccomp}``, ``kpmd.errors``.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Callable

from kpmd.bpf import libbpf, seccomp
from kpmd.bpf.kernel import LinuxKernel
from kpmd.errors import KpmdError


class _ScmpVersion(ctypes.Structure):
    """struct scmp_version (seccomp.h)."""

    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


def libbpf_version(soname: str = libbpf.SONAME) -> tuple[str, str | None]:
    """The version of libbpf, "" where there is none; and why kpmd cannot use it, else None."""

    def version(library: ctypes.CDLL) -> str:
        library.libbpf_version_string.restype = ctypes.c_char_p
        text: bytes = library.libbpf_version_string()
        return text.decode("ascii", "replace").removeprefix("v")

    return _version(soname, version), _fault(libbpf.Library, soname)


def libseccomp_version(soname: str = seccomp.SONAME) -> tuple[str, str | None]:
    """The same of libseccomp."""

    def version(library: ctypes.CDLL) -> str:
        library.seccomp_version.restype = ctypes.POINTER(_ScmpVersion)
        found = library.seccomp_version().contents
        return f"{found.major}.{found.minor}.{found.micro}"

    return _version(soname, version), _fault(seccomp.Library, soname)


def _version(soname: str, ask: Callable[[ctypes.CDLL], str]) -> str:
    try:
        return ask(ctypes.CDLL(soname))
    except (OSError, AttributeError):
        return ""


def _fault(library: Callable[[str], object], soname: str) -> str | None:
    try:
        library(soname)
    except KpmdError as error:
        return error.detail
    return None


def load(elf: bytes, mechanism: str) -> str | None:
    """Load an object as clients' are loaded, and drop it; returns why it was not, None: it was.

    ``mechanism``: see ``LinuxKernel.load_object``. Takes CAP_BPF and CAP_PERFMON.
    """
    # As the daemon does: kernels before 5.11 count BPF memory as locked memory.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    kernel = LinuxKernel()
    try:
        kernel.start()
        kernel.load_object(elf, None, None, {}, {}, False, mechanism).close()
    except KpmdError as error:
        return error.detail
    finally:
        kernel.close()
    return None
