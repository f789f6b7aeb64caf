"""Converters of arguments that click has no types for."""

from __future__ import annotations

import math
from collections.abc import Callable

import click


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


def id_of(*prefixes: str) -> Callable[[str], str]:
    """A converter of ids that begin with one of these."""
    wanted = " or ".join(f"a {_PREFIXES[each]} ({each}-…)" for each in prefixes)

    def convert(text: str) -> str:
        prefix, dash, _ = text.partition("-")
        if dash and prefix in prefixes:
            return text
        known = f": it is that of a {_PREFIXES[prefix]}" if dash and prefix in _PREFIXES else ""
        raise click.BadParameter(f"{text!r} is not the id of {wanted}{known}")

    return convert


def is_glob(text: str) -> bool:
    """Whether a function is named by more than its name: a wildcard, or a module in brackets."""
    return any(each in text for each in "*?[")
