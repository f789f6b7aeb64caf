"""``Client``: the calls of the API as methods."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlencode

from kpmd.client import answers
from kpmd.client.calls import path_of
from kpmd.client.lifetimes import LifetimeCalls, lifetime_body
from kpmd.client.maps import MapCalls

Globals = Mapping[str, int | bytes]


class Client(LifetimeCalls, MapCalls):
    """A client of the daemon at ``socket_path``; use it as a context manager, or ``close`` it.

    It connects with the first call and keeps the connection. ``timeout`` is in seconds, for each
    wait for the daemon; None (the default) waits as long as it takes. Not to be shared between
    threads.

    What is loaded and attached has a ``lifetime``, after which it ends by itself:

    - ``"process"``, the default: when this process ends, however it ends, and not when the client
      is closed; the daemon knows a client by the process that made the connection.
    - ``"connection"``: when the client is closed. Also when a call is broken off (by a signal
      handler's exception, a timeout, an answer that makes no sense): that closes the connection.
    - the id of a lease (``"lse-…"``): when the lease ends; see ``create_lease``.
    - ``"persistent"``: never, only when it is deleted.

    A lease that has ended is ``gone``. A program goes on beyond its lifetime while a link needs it.
    Over a restart of the daemon stays what ``capabilities()["survives_restart"]`` tells of.

    Every method raises ``ConnectionFailed`` where the daemon cannot be reached, ``ApiError`` where
    it refuses (``kind`` tells why; ``forbidden`` and ``quota`` can come from any of them, with
    ``problem["rule"]`` and ``problem["limit"]``) and ``ProtocolError`` where its answer makes no
    sense. A call
    that makes something is never sent twice: after ``ConnectionFailed`` with the reason ``"lost"``
    it may have been done or not.
    """

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

    def health(self) -> answers.Health:
        """Whether the daemon is stopping, and what an administrator has to look at."""
        return cast(answers.Health, self._get("/healthz"))

    # The policy

    def policy(self, user: str | int | None = None) -> answers.UserPolicy:
        """What a user, by name or uid, may do and how much of it is used; None: the caller.

        Only administrators may ask about others (``forbidden``). ``not-found`` where there is no
        such user.
        """
        query = "" if user is None else "?" + urlencode({"user": str(user)})
        return cast(answers.UserPolicy, self._get(f"/policy{query}"))

    def explain(
        self,
        user: str | int | None = None,
        call: answers.Right | None = None,
        patterns: Sequence[str] = (),
        source: answers.Source | None = None,
        sha256: str | None = None,
    ) -> answers.Explanation:
        """Whether a user may do all of this, by which rule, and what stands against it.

        ``user`` is as for ``policy``. ``call``: make that call; ``patterns``: attach to functions,
        each a name or a glob; ``source``: load such a program, an object by the ``sha256`` of its
        bytes in hex. Signatures, and what the instructions do, are judged only when it is loaded.
        Kinds of errors: ``forbidden``, ``not-found``, ``invalid`` (a glob).
        """
        body = {
            "user": user,
            "call": call,
            "patterns": list(patterns),
            "source": source,
            "sha256": sha256,
        }
        answer = self._object(self._connection.call("POST", "/policy/explain", body))
        return cast(answers.Explanation, answer)

    # Programs

    def load_object(
        self,
        elf: bytes,
        programs: Sequence[str] | None = None,
        attach: answers.Attach | None = None,
        globals: Globals | None = None,  # noqa: A002 - the API's word
        max_entries: Mapping[str, int] | None = None,
        lifetime: str = "process",
        labels: Mapping[str, str] | None = None,
        signature: bytes | None = None,
    ) -> answers.Loaded:
        """Load the programs of an ELF object, as clang makes it, and their maps.

        ``elf`` is the file's content. ``programs`` names those to load (None: all), ``attach`` how
        they are called, where their sections do not say it. ``globals`` sets global variables: an
        int for a scalar, bytes (as they lie in memory) for anything; ``max_entries`` the sizes of
        maps, by name. ``lifetime`` is explained at the class. ``signature`` is an Ed25519 one of
        ``elf``, where the policy asks for it. Kinds of errors: ``bad-object``,
        ``verifier-rejected`` (with ``problem["verifier_log"]``), ``wrong-attach-type``,
        ``too-large``, ``gone`` (the lease has ended), ``not-found`` (there is none),
        ``not-supported``, ``forbidden`` (``problem["refused"]`` has what the instructions may not
        call).
        """
        source = {
            "kind": "object",
            "elf": base64.b64encode(elf).decode(),
            "programs": None if programs is None else list(programs),
            **_variables(globals, max_entries),
        }
        if signature is not None:
            source["signature"] = base64.b64encode(signature).decode()
        return self._load(source, attach, lifetime, labels)

    def load_builtin(
        self,
        name: str,
        attach: answers.Attach | None = None,
        globals: Globals | None = None,  # noqa: A002 - the API's word
        max_entries: Mapping[str, int] | None = None,
        lifetime: str = "process",
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
        lifetime: str = "process",
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
        return cast(answers.Program, self._get(path_of("programs", id)))

    def delete_program(self, id: str, force: bool = False) -> None:  # noqa: A002
        """Unload a program. With links it is a ``conflict``, unless ``force`` detaches them."""
        self._connection.call(
            "DELETE", path_of("programs", id) + ("?force=true" if force else ""), None
        )

    # Links

    def attach(
        self,
        program: str,
        kind: answers.Kind = "kprobe",
        symbols: Sequence[str] | None = None,
        addresses: Sequence[int] | None = None,
        cookies: Sequence[int] | None = None,
        lifetime: str = "process",
        labels: Mapping[str, str] | None = None,
        patterns: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> answers.Link:
        """Attach a program to functions: to all of them or, where one cannot be, to none.

        ``program`` is its id. Exactly one of ``symbols`` (names), ``addresses`` (where the
        functions start) and ``patterns`` (globs, but for what ``exclude`` matches) is to be given.
        ``cookies`` are what ``bpf_get_attach_cookie`` gives at each, in the same order; not with
        patterns. ``lifetime`` is explained at the class. Kinds of errors: ``symbol-not-found``
        (``problem["errors"]`` has each with its reason), ``address-not-traceable``,
        ``wrong-attach-type``, ``invalid``, ``not-found`` (the program or the lease), ``gone`` (the
        lease has ended), ``not-supported``, ``forbidden`` (``problem["symbols"]`` has the first of
        the functions; those that a glob matches besides others are left out instead).
        """
        body = _targets(program, kind, symbols, addresses, cookies, patterns, exclude)
        body |= {"lifetime": lifetime_body(lifetime), "labels": dict(labels or {})}
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
        return self._pages(path_of("links", link, "skipped"))

    def links(
        self,
        program: str | None = None,
        client: str | None = None,
        lease: str | None = None,
    ) -> list[answers.Link]:
        """The caller's links, or those of one program, client and lease whose ids are given."""
        given = {"program": program, "client": client, "lease": lease}
        return list(
            self._pages("/links", {name: id_ for name, id_ in given.items() if id_ is not None})
        )

    def link(self, id: str) -> answers.Link:  # noqa: A002 - the API's word
        """One link, with the kernel's present counts. ``not-found`` where there is none."""
        return cast(answers.Link, self._get(path_of("links", id)))

    def targets(self, link: str) -> Iterator[answers.Target]:
        """The functions that the link of this id is attached to, in the order of the request.

        They are asked for page by page, as the iterator goes on.
        """
        return self._pages(path_of("links", link, "targets"))

    def detach(self, id: str) -> None:  # noqa: A002 - the API's word
        """Detach a link; when this returns, its program no longer runs."""
        self._connection.call("DELETE", path_of("links", id))

    # What they share

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
            "lifetime": lifetime_body(lifetime),
            "labels": dict(labels or {}),
        }
        answer = self._object(self._connection.call("POST", "/programs", body))
        return cast(answers.Loaded, answer)


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
