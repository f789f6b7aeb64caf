"""Lifetimes in requests and answers."""

from __future__ import annotations

from kpmd.api.answers import LifetimeAnswer
from kpmd.api.bodies import LeaseLifetime, LifetimeBody
from kpmd.core.model import Lifetime


def lifetime(body: LifetimeBody) -> Lifetime:
    """A lifetime as it was asked for."""
    return Lifetime(body.kind, body.lease if isinstance(body, LeaseLifetime) else "")


def lifetime_answer(given: Lifetime) -> LifetimeAnswer:
    """A lifetime as the API shows it."""
    if given.kind == "lease":
        return LifetimeAnswer(kind="lease", lease=given.lease)
    return LifetimeAnswer(kind=given.kind)
