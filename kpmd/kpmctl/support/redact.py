"""Placeholders for what says who works on a machine, and with what: the same for the same thing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

#: Nobody's secret, and often what the trouble is about.
_USERS = ("root", "nobody", "kpmd-daemon", "*")
_UIDS = ("0", "65534")
_GROUPS = ("0", "root", "kpmd", "kpmd-admin", "kpmd-daemon")
_COMMANDS = ("kpmd", "kpmctl", "systemd")
#: Names of machines that say nothing of them.
_HOSTS = ("localhost", "kpmd", "debian", "ubuntu", "fedora")
#: What kpmd itself puts on things whose state it could not read.
_LABELS = ("kpmd",)

#: What a member's name says of its values, wherever it stands.
_KINDS = {
    **dict.fromkeys(("user", "users"), "user"),
    **dict.fromkeys(("uid", "uids", "fsuid", "auid"), "uid"),
    **dict.fromkeys(("groups", "gid", "gids", "socketgroup"), "group"),
    **dict.fromkeys(("command", "comm", "cmdline"), "command"),
    "labels": "label",
}

#: Where the machine's own things are, which are the same everywhere; and the calls of the API.
_KEPT = re.compile(
    r"/(?:proc|sys|dev|boot|lib|lib64|bin|sbin|usr/(?:s?bin|lib\d*|share)|run/systemd|run/kpmd\.sock"
    r"|etc/kpmd|etc/os-release|etc/systemd|var/log/kpmd|programs|links|maps|clients|leases|events"
    r"|symbols|policy|capabilities|work|healthz|version|metrics|openapi\.json)(?:/|$|\?)"
)
_PATH = re.compile(r"(?<![\w/.~-])~?(?:/[\w.@+~%\\-]*[\w@+~%\\-])+/?")

#: A number behind such a word is a user's.
_NUMBER = re.compile(r"\b([ug]id)([ =:]{1,2})(\d+)\b", re.IGNORECASE)

#: Words as people write them into sentences, and names that are made of several.
_WORD = re.compile(r"\w+(?:[.@+-]\w+)*")
_PART = re.compile(r"\w+")


class Redactor:
    """Learns what there is to hide from all of the parts first; then takes it out of each.

    Names of functions, programs, maps and the policy's rules stay, as do ids, numbers and times.
    """

    def __init__(self, hosts: Iterable[str] = (), users: Iterable[str] = ()) -> None:
        """``hosts``: names of this machine. ``users``: who may be named without being listed."""
        self._made: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}
        #: What stands for a word, wherever it is met; and for a name that is more than a word.
        self._words: dict[str, str] = {}
        self._names: dict[str, str] = {}
        for each in sorted(hosts, key=len, reverse=True):
            if each and each not in _HOSTS:
                self._hide(each, "host")
        for each in users:
            self._person(None, each)

    def learn(self, data: object) -> None:
        """Give a placeholder to everything that has to have one."""
        self._walk(data, None, lambda text: text)

    def applied(self, data: object) -> Any:
        """The same with placeholders."""
        return self._walk(data, None, self.text)

    def text(self, text: str) -> str:
        """A sentence, or whatever it is, without paths and without names that were learnt."""
        for name, made in self._names.items():
            text = text.replace(name, made)
        text = _NUMBER.sub(self._number, text)
        text = _PATH.sub(self._path, text)
        return _WORD.sub(self._word, text)

    def _walk(self, data: object, kind: str | None, other: Callable[[str], str]) -> Any:
        """``kind``: what the data are by their place; ``other`` is for texts of no kind."""
        if isinstance(data, dict):
            if isinstance(data.get("user"), str) and "uid" in data:
                self._person(str(data["uid"]), data["user"])
            if kind == "label":
                return {self._label(str(k)): self._label(str(v)) for k, v in data.items()}
            return {
                str(name): self._walk(each, _KINDS.get(str(name).lower()), other)
                for name, each in data.items()
            }
        if isinstance(data, list):
            return [self._walk(each, kind, other) for each in data]
        if kind is not None and isinstance(data, (str, int)) and not isinstance(data, bool):
            return self._named(kind, data)
        return other(data) if isinstance(data, str) else data

    def _named(self, kind: str, value: str | int) -> str | int:
        text = str(value)
        if kind == "user" and text.isdecimal():
            kind = "uid"
        match kind:
            case "uid":
                return value if text in _UIDS else self._person(text, None)
            case "user":
                return self._person(None, text)
            case "group":
                return value if text in _GROUPS or not text else self._made_for("group", text)
            case "command":
                return text if text in _COMMANDS else self._made_for("command", text)
        return self._label(text)

    def _person(self, uid: str | None, name: str | None) -> str:
        """A user's placeholder: with the same number for the uid and for the name."""
        keys = ("uid", uid or ""), ("user", name or "")
        known = [self._made[key] for key in keys if key in self._made]
        number = known[0].rpartition("-")[2] if known else ""
        if uid is not None and uid not in _UIDS:
            number = number or str(self._next("user"))
            self._made.setdefault(("uid", uid), f"uid-{number}")
        if name and name not in _USERS:
            number = number or str(self._next("user"))
            self._hide(name, self._made.setdefault(("user", name), f"user-{number}"))
        if name is not None:
            return self._made.get(("user", name), name)
        return self._made.get(("uid", str(uid)), str(uid))

    def _hide(self, name: str, placeholder: str) -> None:
        (self._words if _PART.fullmatch(name) else self._names)[name] = placeholder

    def _label(self, text: str) -> str:
        return text if text in _LABELS else self._made_for("label", text)

    def _made_for(self, kind: str, text: str) -> str:
        if (kind, text) not in self._made:
            self._made[kind, text] = f"{kind}-{self._next(kind)}"
        # A number, or a letter, would be found in everything.
        if kind in ("group", "command", "label") and len(text) > 2 and not text.isdecimal():
            self._words.setdefault(text, self._made[kind, text])
        return self._made[kind, text]

    def _next(self, kind: str) -> int:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind]

    def _number(self, found: re.Match[str]) -> str:
        word, between, number = found.groups()
        return f"{word}{between}{self._named('uid' if word in 'uidUID' else 'group', number)}"

    def _path(self, found: re.Match[str]) -> str:
        return found[0] if _KEPT.match(found[0]) else self._made_for("path", found[0])

    def _word(self, found: re.Match[str]) -> str:
        whole = found[0]
        if whole in self._words:
            return self._words[whole]
        return _PART.sub(lambda part: self._words.get(part[0], part[0]), whole)
