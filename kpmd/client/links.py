"""Calls about links and functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kpmd.client import answers
from kpmd.client.calls import Calls, Pages, lifetime_body, object_of, path_of
from kpmd.client.operation import listing, managed, operation


class LinkCalls(Calls):
    """The part of both clients that is about links."""

    @operation
    async def attach(
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
        answer = await self._call("POST", "/links", body, home=lifetime == "connection")
        return cast(answers.Link, object_of(answer))

    @managed(attach)
    async def attached(self, link: answers.Link) -> None:
        """What ``attach`` attaches, as a context manager that detaches it.

        A link that has ended meanwhile is no error. Where the block fails, its error is the one
        that is raised. Cancelled while it attaches, an ``AsyncClient`` waits for the link, and
        detaches it.
        """
        await self._call("DELETE", path_of("links", link["id"]))

    @operation
    async def plan(
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
        return cast(answers.Plan, object_of(await self._call("POST", "/links", body)))

    @listing
    def symbols(self, pattern: str = "*") -> Pages[answers.Symbol]:
        """The functions that can be traced and that match a glob."""
        return self._pages("/symbols", {"pattern": pattern})

    @listing
    def links(
        self,
        program: str | None = None,
        client: str | None = None,
        lease: str | None = None,
    ) -> Pages[answers.Link]:
        """The caller's links, or those of one program, client and lease whose ids are given."""
        given = {"program": program, "client": client, "lease": lease}
        return self._pages("/links", {name: id_ for name, id_ in given.items() if id_ is not None})

    @operation
    async def link(self, id: str) -> answers.Link:  # noqa: A002 - the API's word
        """One link, with the kernel's present counts. ``not-found`` where there is none."""
        return cast(answers.Link, await self._get(path_of("links", id)))

    @listing
    def targets(self, link: str) -> Pages[answers.Target]:
        """The functions that the link of this id is attached to, in the order of the request."""
        return self._pages(path_of("links", link, "targets"))

    @listing
    def skipped(self, link: str) -> Pages[answers.Skipped]:
        """What the link of this id was asked for and is not attached to."""
        return self._pages(path_of("links", link, "skipped"))

    @operation
    async def detach(self, id: str) -> None:  # noqa: A002 - the API's word
        """Detach a link; when this returns, its program no longer runs."""
        await self._call("DELETE", path_of("links", id))


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
