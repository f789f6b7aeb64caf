"""What the measurements need and the guest cannot make: libbpf, the C programs, saved lists.

All of it goes into ``tests/bench/build``, which the guest sees (this machine's cache it does not).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm import kernels, sources

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
BUILD = FOLDER / "build"
LIBRARIES = BUILD / "libbpf" / "lib"
SYMBOLS = BUILD / "symbols"
KALLSYMS = SYMBOLS / "kallsyms"
FUNCTIONS = SYMBOLS / "available_filter_functions_addrs"

#: libbpf 1.5 is in trixie; it needs trixie's libc, which comes along with its own loader.
_SUITE = "trixie"
_PACKAGES = ("libbpf1", "libbpf-dev", "libc6", "libelf1t64", "zlib1g", "libzstd1")
_LOADER = "ld-linux-x86-64.so.2"
_WANTED = ("libbpf.so*", "libelf*.so*", "libz.so*", "libzstd.so*", "libc.so*", _LOADER)

_KERNEL_FILES = {
    KALLSYMS: "/proc/kallsyms",
    FUNCTIONS: "/sys/kernel/tracing/available_filter_functions_addrs",
}


def prepare(kernel: str, refresh: bool = False) -> None:
    """Have everything in ``build``; what is there already stays, unless ``refresh``."""
    if refresh and BUILD.exists():
        shutil.rmtree(BUILD)
    BUILD.mkdir(exist_ok=True)
    if not (BUILD / "libbpf").exists():
        _fetch_libbpf()
    subprocess.run(["make", "-s", "-C", str(FOLDER), "OUT=build"], check=True)
    for path, source in _KERNEL_FILES.items():
        if not path.exists():
            _save(kernel, source, path)


def _fetch_libbpf() -> None:
    print("bench: fetching libbpf", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=BUILD) as text:
        work = Path(text)
        apt = kernels._Apt(work, sources.sources_list(sources.mirror(), [_SUITE]))
        apt.update()
        tree = work / "tree"
        apt.unpack(_PACKAGES, tree)
        ready = work / "ready"
        (ready / "lib").mkdir(parents=True)
        shutil.copytree(tree / "usr/include/bpf", ready / "include/bpf")
        for pattern in _WANTED:
            for found in tree.rglob(pattern):
                if not found.name.endswith(".py"):
                    shutil.copy2(found, ready / "lib" / found.name, follow_symlinks=True)
        ready.rename(BUILD / "libbpf")


def _save(kernel: str, source: str, path: Path) -> None:
    print(f"bench: saving {source} of {kernel}", file=sys.stderr, flush=True)
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.vm", "run", "--kernel", kernel, "--", "cat", source]
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        subprocess.run(command, cwd=PROJECT, stdout=stream, check=True)
    partial.rename(path)
