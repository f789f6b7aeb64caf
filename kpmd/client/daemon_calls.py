"""Calls about the daemon and its policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast
from urllib.parse import urlencode

from kpmd.client import answers
from kpmd.client.calls import Calls, object_of
from kpmd.client.operation import operation


class DaemonCalls(Calls):
    """The part of both clients that is about the daemon itself."""

    @operation
    async def capabilities(self, refresh: bool = False) -> answers.Capabilities:
        """What the kernel and the daemon can do for the caller.

        ``refresh`` runs the feature tests again; only administrators may (``forbidden``).
        """
        target = "/capabilities?refresh=true" if refresh else "/capabilities"
        return cast(answers.Capabilities, await self._get(target))

    @operation
    async def version(self) -> answers.Version:
        """Versions of the daemon and of the contract."""
        return cast(answers.Version, await self._get("/version"))

    @operation
    async def health(self) -> answers.Health:
        """Whether the daemon is stopping, and what an administrator has to look at."""
        return cast(answers.Health, await self._get("/healthz"))

    @operation
    async def metrics(self) -> str:
        """What the daemon counts, in Prometheus's text format, for those whom the policy lets.

        Kinds of errors: ``forbidden``.
        """
        return await self._text("/metrics")

    @operation
    async def policy(self, user: str | int | None = None) -> answers.UserPolicy:
        """What a user, by name or uid, may do and how much of it is used; None: the caller.

        Only administrators may ask about others (``forbidden``). ``not-found`` where there is no
        such user.
        """
        query = "" if user is None else "?" + urlencode({"user": str(user)})
        return cast(answers.UserPolicy, await self._get(f"/policy{query}"))

    @operation
    async def explain(
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
        answer = await self._call("POST", "/policy/explain", body)
        return cast(answers.Explanation, object_of(answer))
