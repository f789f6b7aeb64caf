"""``Client``: the calls of the API as methods."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast
from urllib.parse import quote, urlencode

from kpmd.client import DEFAULT_SOCKET, answers
from kpmd.client.connection import MAX_ANSWER, Connection
from kpmd.client.errors import ProtocolError

#: Items asked for at once; the most that the daemon gives.
_PAGE = 1000

Globals = Mapping[str, int | bytes]


class Client:
    """A client of the daemon at ``socket_path``; use it as a context manager, or ``close`` it.

    It connects with the first call and keeps the connection. ``timeout`` is in seconds, for each
    wait for the daemon; None (the default) waits as long as it takes. Not to be shared between
    threads.

    The daemon knows a client by the process that made the connection: what is made with the
    lifetime ``"process"`` ends when this process ends, not when the client is closed.

    Every method raises ``ConnectionFailed`` where the daemon cannot be reached, ``ApiError`` where
    it refuses (``kind`` tells why) and ``ProtocolError`` where its answer makes no sense. A call
    that makes something is never sent twice: after ``ConnectionFailed`` with the reason ``"lost"``
    it may have been done or not.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] = DEFAULT_SOCKET,
        *,
        timeout: float | None = None,
        max_answer: int = MAX_ANSWER,
    ) -> None:
        self._connection = Connection(os.fspath(socket_path), timeout, max_answer)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def connection(self) -> Connection:
        """The connection, for calls that this class has no method for."""
        return self._connection

    def close(self) -> None:
        """Close the connection. What this process made stays until the process ends."""
        self._connection.close()

    # The daemon

    def capabilities(self, refresh: bool = False) -> answers.Capabilities:
        """What the kernel and the daemon can do for the caller.

        ``refresh`` runs the feature tests again; only administrators may (``forbidden``).
        """
        target = "/capabilities?refresh=true" if refresh else "/capabilities"
        return cast(answers.Capabilities, self._get(target))

    def version(self) -> answers.Version:
        """Versions of the daemon and of the contract."""
        return cast(answers.Version, self._get("/version"))

    # Programs

    def load_object(
        self,
        elf: bytes,
        programs: Sequence[str] | None = None,
        attach: answers.Attach | None = None,
        globals: Globals | None = None,  # noqa: A002 - the API's word
        max_entries: Mapping[str, int] | None = None,
        lifetime: answers.LifetimeKind = "process",
        labels: Mapping[str, str] | None = None,
    ) -> answers.Loaded:
        """Load the programs of an ELF object, as clang makes it, and their maps.

        ``elf`` is the file's content. ``programs`` names those to load (None: all), ``attach`` how
        they are called, where their sections do not say it. ``globals`` sets global variables: an
        int for a scalar, bytes (as they lie in memory) for anything; ``max_entries`` the sizes of
        maps, by name. Kinds of errors: ``bad-object``, ``verifier-rejected`` (with
        ``problem["verifier_log"]``), ``wrong-attach-type``, ``too-large``, ``not-supported``.
        """
        source = {
            "kind": "object",
            "elf": base64.b64encode(elf).decode(),
            "programs": None if programs is None else list(programs),
            **_variables(globals, max_entries),
        }
        return self._load(source, attach, lifetime, labels)

    def load_builtin(
        self,
        name: str,
        attach: answers.Attach | None = None,
        globals: Globals | None = None,  # noqa: A002 - the API's word
        max_entries: Mapping[str, int] | None = None,
        lifetime: answers.LifetimeKind = "process",
        labels: Mapping[str, str] | None = None,
    ) -> answers.Loaded:
        """Load a program that ships with the daemon; ``capabilities()["builtins"]`` has the names.

        The rest is as for ``load_object``. An unknown name is ``invalid``.
        """
        source = {"kind": "builtin", "builtin": name, **_variables(globals, max_entries)}
        return self._load(source, attach, lifetime, labels)

    def load_instructions(
        self,
        instructions: bytes,
        license: str = "GPL",  # noqa: A002 - the API's word
        name: str = "",
        attach: answers.Attach = "kprobe_multi",
        lifetime: answers.LifetimeKind = "process",
        labels: Mapping[str, str] | None = None,
    ) -> answers.Loaded:
        """Load raw eBPF instructions, 8 bytes each; they can have no maps.

        ``license`` is what the kernel is told; much of what a program can call wants one that is
        compatible with the GPL. Kinds of errors: ``verifier-rejected``, ``invalid``,
        ``not-supported``.
        """
        source = {
            "kind": "instructions",
            "instructions": base64.b64encode(instructions).decode(),
            "license": license,
            "name": name,
        }
        return self._load(source, attach, lifetime, labels)

    def programs(self) -> list[answers.Program]:
        """The caller's programs; an administrator's are everyone's."""
        return list(self._pages("/programs"))

    def program(self, id: str) -> answers.Program:  # noqa: A002 - the API's word
        """One program. ``not-found`` where there is none, or it is another user's."""
        return cast(answers.Program, self._get(_path("programs", id)))

    def delete_program(self, id: str, force: bool = False) -> None:  # noqa: A002
        """Unload a program. With links it is a ``conflict``, unless ``force`` detaches them."""
        self._connection.call(
            "DELETE", _path("programs", id) + ("?force=true" if force else ""), None
        )

    # Links

    def attach(
        self,
        program: str,
        kind: answers.Kind = "kprobe",
        symbols: Sequence[str] | None = None,
        addresses: Sequence[int] | None = None,
        cookies: Sequence[int] | None = None,
        lifetime: answers.LifetimeKind = "process",
        labels: Mapping[str, str] | None = None,
        patterns: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> answers.Link:
        """Attach a program to functions: to all of them or, where one cannot be, to none.

        ``program`` is its id. Exactly one of ``symbols`` (names), ``addresses`` (where the
        functions start) and ``patterns`` (globs, but for what ``exclude`` matches) is to be given.
        ``cookies`` are what ``bpf_get_attach_cookie`` gives at each, in the same order; not with
        patterns. Kinds of errors: ``symbol-not-found`` (``problem["errors"]`` has each with its
        reason), ``address-not-traceable``, ``wrong-attach-type``, ``invalid``, ``not-found`` (the
        program), ``not-supported``.
        """
        body = _targets(program, kind, symbols, addresses, cookies, patterns, exclude)
        body |= {"lifetime": {"kind": lifetime}, "labels": dict(labels or {})}
        return cast(answers.Link, self._object(self._connection.call("POST", "/links", body)))

    def plan(
        self,
        program: str,
        kind: answers.Kind = "kprobe",
        symbols: Sequence[str] | None = None,
        addresses: Sequence[int] | None = None,
        patterns: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> answers.Plan:
        """What ``attach`` would attach to and what not, and why. Attaches nothing."""
        body = _targets(program, kind, symbols, addresses, None, patterns, exclude)
        body["dry_run"] = True
        return cast(answers.Plan, self._object(self._connection.call("POST", "/links", body)))

    def symbols(self, pattern: str = "*") -> Iterator[answers.Symbol]:
        """The functions that can be traced and that match a glob, page by page."""
        return self._pages("/symbols", {"pattern": pattern})

    def skipped(self, link: str) -> Iterator[answers.Skipped]:
        """What the link of this id was asked for and is not attached to, page by page."""
        return self._pages(_path("links", link, "skipped"))

    def links(self, program: str | None = None) -> list[answers.Link]:
        """The caller's links, those of one program where its id is given."""
        return list(self._pages("/links", {} if program is None else {"program": program}))

    def link(self, id: str) -> answers.Link:  # noqa: A002 - the API's word
        """One link, with the kernel's present counts. ``not-found`` where there is none."""
        return cast(answers.Link, self._get(_path("links", id)))

    def targets(self, link: str) -> Iterator[answers.Target]:
        """The functions that the link of this id is attached to, in the order of the request.

        They are asked for page by page, as the iterator goes on.
        """
        return self._pages(_path("links", link, "targets"))

    def detach(self, id: str) -> None:  # noqa: A002 - the API's word
        """Detach a link; when this returns, its program no longer runs."""
        self._connection.call("DELETE", _path("links", id))

    # Maps

    def maps(self) -> list[answers.Map]:
        """The maps of the caller's programs."""
        return list(self._pages("/maps"))

    def map(self, id: str) -> answers.Map:  # noqa: A002 - the API's word
        """One map. ``not-found`` where there is none, or its last program has ended."""
        return cast(answers.Map, self._get(_path("maps", id)))

    def entries(self, map: str) -> Iterator[answers.Entry]:  # noqa: A002 - the API's word
        """The entries of the map of this id, in the kernel's order, page by page.

        In a hash whose entries are deleted meanwhile the kernel may give some twice, or not at all.
        """
        return self._pages(_path("maps", map, "entries"))

    def entry(self, map: str, key: bytes) -> answers.Entry:  # noqa: A002 - the API's word
        """One entry; ``key`` is the key's bytes. ``not-found`` where the map has none such."""
        return cast(answers.Entry, self._get(_path("maps", map, "entries", key.hex())))

    # What they share

    def _get(self, target: str) -> dict[str, Any]:
        return self._object(self._connection.call("GET", target))

    def _load(
        self,
        source: dict[str, Any],
        attach: str | None,
        lifetime: str,
        labels: Mapping[str, str] | None,
    ) -> answers.Loaded:
        body = {
            "source": source,
            "attach": attach,
            "lifetime": {"kind": lifetime},
            "labels": dict(labels or {}),
        }
        answer = self._object(self._connection.call("POST", "/programs", body))
        return cast(answers.Loaded, answer)

    def _pages(self, path: str, query: Mapping[str, str] | None = None) -> Iterator[Any]:
        parameters = {"limit": str(_PAGE), **(query or {})}
        while True:
            page = self._get(f"{path}?{urlencode(parameters)}")
            items, following = page.get("items"), page.get("next")
            if not isinstance(items, list) or not isinstance(following, str | None):
                raise ProtocolError(f"the daemon's answer to {path} is no page of a list")
            yield from items
            if following is None:
                return
            if following == parameters.get("after"):
                raise ProtocolError(f"the daemon's answer to {path} goes round in a circle")
            parameters["after"] = following

    @staticmethod
    def _object(answer: Any) -> dict[str, Any]:
        if not isinstance(answer, dict):
            raise ProtocolError("the daemon's answer is no JSON object")
        return answer


def _path(*parts: str) -> str:
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def _variables(variables: Globals | None, max_entries: Mapping[str, int] | None) -> dict[str, Any]:
    return {
        "globals": {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in (variables or {}).items()
        },
        "max_entries": dict(max_entries or {}),
    }


def _targets(
    program: str,
    kind: answers.Kind,
    symbols: Sequence[str] | None,
    addresses: Sequence[int] | None,
    cookies: Sequence[int] | None,
    patterns: Sequence[str] | None,
    exclude: Sequence[str],
) -> dict[str, Any]:
    """The body of a request for a link, as far as it names program and targets."""
    body: dict[str, Any] = {"program": program, "kind": kind}
    if symbols is not None:
        body["symbols"] = list(symbols)
    if addresses is not None:
        body["addresses"] = [f"0x{address:016x}" for address in addresses]
    if cookies is not None:
        body["cookies"] = [str(cookie) for cookie in cookies]
    if patterns is not None:
        body["patterns"] = list(patterns)
    if exclude:
        body["exclude"] = list(exclude)
    return body
