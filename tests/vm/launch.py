"""Starts one of the VM's processes so that it can't outlive the tool or harm the machine.

Run as a script, by path: ``launch.py PARENT PLAN PROGRAM ARGUMENT…``.  PARENT is the process id
of the tool; PLAN is JSON: null, or the mounts to make in a mount namespace of its own, in which
everything is then made read-only.  It imports nothing of the project, to start quickly.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
# These system calls have the same number on all architectures; libc may lack functions for them.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    arguments = [text if text is None else os.fsencode(text) for text in (source, target, kind)]
    extra = None if data is None else data.encode()
    flag_word = ctypes.c_ulong(flags)
    _checked(_libc.mount(*arguments, flag_word, extra), f"mounting {target}")


def _clone(path: str) -> int:
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE)
    result = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    return _checked(result, f"copying the mount of {path}")


def _attach(tree: int, path: str) -> None:
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    result = _libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(path), flags)
    _checked(result, f"binding {path}")


def _make_read_only() -> None:
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, b"/", ctypes.c_uint(_AT_RECURSIVE), attributes, size
    )
    _checked(result, "making the namespace read-only")


def _arrange(steps: list[dict[str, str]]) -> None:
    _checked(_libc.unshare(_CLONE_NEWNS), "making a mount namespace")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    # First take hold of everything to bind: the steps cover some of it.
    trees = {step["path"]: _clone(step["source"]) for step in steps if step["do"] == "bind"}
    folders = {step["path"]: os.path.isdir(step["source"]) for step in steps}
    for step in steps:
        path = step["path"]
        if step["do"] == "tmpfs":
            os.makedirs(path, mode=0o755, exist_ok=True)
            _mount("tmpfs", path, "tmpfs", 0, "mode=755")
            continue
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if step["do"] == "link":
            if not os.path.lexists(path):
                os.symlink(step["source"], path)
            continue
        if folders[path]:
            os.makedirs(path, mode=0o755, exist_ok=True)
        elif not os.path.exists(path):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        _attach(trees[path], path)
    _make_read_only()


def main(arguments: list[str]) -> None:
    """Prepare this process, then become the program."""
    parent, plan, *command = arguments
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    if os.getppid() != int(parent):
        os._exit(1)  # the tool died before the line above
    os.umask(0o022)
    steps: Any = json.loads(plan)
    if steps is not None:
        _arrange(steps)
    os.execvp(command[0], command)  # noqa: S606 - the whole point of this script


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as problem:
        sys.exit(f"vm: can't start {sys.argv[3]}: {problem}")
