"""What the one-liners have in common: which functions, and whose calls of them."""

from __future__ import annotations

import functools
import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

from kpmd.kpmctl.parameters import FUNCTION, is_glob, seconds

T = TypeVar("T")

#: What the kernel keeps of a thread's name, in bytes.
_COMMAND = 15

_CGROUPS = "/sys/fs/cgroup"

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}


@dataclass(frozen=True)
class Wanted:
    """Functions, but for those that ``exclude`` matches; ``variables`` tell whose calls of them.

    ``variables`` are the global variables that all builtins have (docs/builtins.md).
    """

    functions: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    variables: Mapping[str, int | bytes] = field(default_factory=dict)

    @property
    def globs(self) -> bool:
        """Whether the daemon has to find out which functions these are."""
        return bool(self.exclude) or any(is_glob(each) for each in self.functions)


def uid_of(text: str) -> int:
    """A user by name or number."""
    if text.isascii() and text.isdecimal():
        uid = int(text)
        if uid < (1 << 32) - 1:
            return uid
    else:
        try:
            return pwd.getpwnam(text).pw_uid
        except (KeyError, ValueError):
            pass
    raise click.BadParameter(f"there is no user {text!r}")


def command_of(text: str) -> bytes:
    """A thread's name, as the kernel has it: filled up with NULs."""
    name = os.fsencode(text)
    if not name or b"\0" in name:
        raise click.BadParameter("is to be the name of a command")
    if len(name) > _COMMAND:
        kept = name[:_COMMAND].decode(errors="replace")
        raise click.BadParameter(
            f"the kernel keeps {_COMMAND} bytes of a name: that of this command may be {kept!r}"
        )
    return name.ljust(_COMMAND + 1, b"\0")


def cgroup_of(text: str) -> int:
    """A cgroup's id: given as such, or as its folder, whole or from the mount point on."""
    if text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 64:
        return int(text)
    below = text.lstrip("/")
    for folder in (text, f"{_CGROUPS}/{below}", f"{_CGROUPS}/unified/{below}"):
        # Only version 2 has this file, and only its cgroups are known by their inodes.
        if os.path.exists(f"{folder}/cgroup.controllers"):
            return os.stat(folder).st_ino
    raise click.BadParameter(
        f"{text!r} is no cgroup of version 2: give its folder below {_CGROUPS}, or its id"
    )


def duration(text: str) -> int:
    """A time with its unit, in nanoseconds: 100ns, 20us, 1.5ms, 2s."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?([a-zµ]+)", text, re.ASCII | re.IGNORECASE)
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise click.BadParameter(f"{text!r} is no time with its unit, as 20us, 1.5ms or 2s")
    return round(float(match[1]) * unit)


def output_path(text: str) -> str:
    """A file that will be written in the end: better known now than then that it cannot be."""
    place = text if os.path.exists(text) else os.path.dirname(text) or "."
    if text != "-" and (os.path.isdir(text) or not os.access(place, os.W_OK)):
        raise click.BadParameter(f"{text!r} cannot be written")
    return text


_OPTIONS = (
    click.argument("functions", type=FUNCTION, metavar="FUNCTION...", nargs=-1, required=True),
    click.option(
        "--exclude", metavar="GLOB", multiple=True, help="Leave out what matches; repeatable."
    ),
    click.option(
        "--duration",
        type=seconds(0),
        metavar="SECONDS",
        help="End after this time.  [default: go on until Ctrl-C]",
    ),
    click.option(
        "--pid",
        type=click.IntRange(1),
        metavar="PID",
        help="Only calls of this process (its id outside of containers).",
    ),
    click.option("--uid", type=uid_of, metavar="USER", help="Only calls by this user."),
    click.option(
        "--command",
        type=command_of,
        metavar="NAME",
        help="Only calls by threads of this name (15 bytes, as `ps -T` shows it).",
    ),
    click.option(
        "--cgroup",
        type=cgroup_of,
        metavar="PATH",
        help="Only calls out of this cgroup, or below it: a container, a service. Its folder (below"
        f" {_CGROUPS}, which may be left out) or its inode.",
    ),
    click.option(
        "--cgroup-alone",
        is_flag=True,
        help="With --cgroup: not what lies below it. All that kernels before 5.15 can tell.",
    ),
)


def options(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command its FUNCTIONs and what says whose calls; it takes them as one ``wanted``.

    And the option ``--duration``, in seconds, which it takes as it is.
    """

    @functools.wraps(command)
    def collect(*args: Any, **given: Any) -> T:
        return command(*args, wanted=_collected(given), **given)

    for each in reversed(_OPTIONS):
        collect = each(collect)
    return collect


def _collected(given: dict[str, Any]) -> Wanted:
    """Take out of ``given`` what says which functions and whose calls."""
    functions, exclude = given.pop("functions"), given.pop("exclude")
    cgroup, alone = given.pop("cgroup"), given.pop("cgroup_alone")
    if alone and cgroup is None:
        raise click.UsageError("--cgroup-alone takes a --cgroup")
    variables = {
        "target_pid": given.pop("pid"),
        "target_uid": given.pop("uid"),
        "target_command": given.pop("command"),
        "target_cgroup" if alone else "target_cgroup_tree": cgroup,
    }
    named = {name: value for name, value in variables.items() if value is not None}
    return Wanted(functions, exclude, named)
