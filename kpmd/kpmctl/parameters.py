"""Converters of arguments that click has no types for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def number(text: str) -> int:
    """An unsigned 64-bit integer, in decimal or behind 0x in hexadecimal."""
    try:
        value = int(text, 0)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no integer, in decimal or behind 0x in hexadecimal"
        ) from None
    if not 0 <= value < 1 << 64:
        raise click.BadParameter(f"{text!r} is not in 0 to 2^64 - 1")
    return value


def hex_bytes(text: str) -> bytes:
    """Bytes in hex."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not bytes in hex, two digits each") from None


def variable(text: str) -> tuple[str, int | bytes]:
    """``NAME=VALUE``: a name and a number or, behind ``hex:``, bytes."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    if value.startswith("hex:"):
        return name, hex_bytes(value.removeprefix("hex:"))
    try:
        return name, int(value, 0)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither an integer nor, behind hex:, bytes"
        ) from None


def size(text: str) -> tuple[str, int]:
    """``MAP=N``: a map's name and its number of entries."""
    name, _, entries = text.partition("=")
    if not name or not (entries.isascii() and entries.isdecimal() and len(entries) <= 10):
        raise click.BadParameter(f"{text!r} is not MAP=N with a number of entries")
    return name, int(entries)


def seconds(least: float) -> Callable[[str], float]:
    """A converter of times of ``least`` seconds or more, fractions allowed."""

    def convert(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # Years are a slip, or an infinity.
        if not least <= value <= 366 * 86400:
            raise click.BadParameter(f"{text!r} is no time of {least:g} seconds or more")
        return value

    return convert


def label(text: str) -> tuple[str, str]:
    """``KEY=VALUE``: a label."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE")
    return key, value


#: What ids begin with, and what they name.
_PREFIXES = {"lnk": "link", "prg": "program", "lse": "lease", "cli": "client", "map": "map"}


class Id(click.ParamType[str]):
    """An id that begins with one of ``prefixes``; a shell completes those that there are."""

    name = "id"

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The id. Raises BadParameter."""
        prefix, dash, _ = value.partition("-")
        if dash and prefix in self._prefixes:
            return value
        wanted = " or ".join(f"a {_PREFIXES[each]} ({each}-…)" for each in self._prefixes)
        known = f": it is that of a {_PREFIXES[prefix]}" if dash and prefix in _PREFIXES else ""
        raise click.BadParameter(f"{value!r} is not the id of {wanted}{known}", ctx, param)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The caller's ids, each with what it is."""
        from kpmd.kpmctl.completing import ids

        return ids(ctx, self._prefixes, incomplete)


def id_of(*prefixes: str) -> Id:
    """The type of ids that begin with one of these."""
    return Id(prefixes)


class Function(click.ParamType[str]):
    """A function's name or a glob; a shell completes the names."""

    name = "function"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The functions that begin so."""
        from kpmd.kpmctl.completing import functions

        return functions(ctx, incomplete)


FUNCTION = Function()


def is_glob(text: str) -> bool:
    """Whether a function is named by more than its name: a wildcard, or a module in brackets."""
    return any(each in text for each in "*?[")
