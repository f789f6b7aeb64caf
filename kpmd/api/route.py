"""A route: everything about one call in one place, so that none can be without its access check."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from kpmd.api.bodies import NoQuery
from kpmd.bpf.fd import OwnedFd
from kpmd.core.model import Caller, Connection
from kpmd.core.policy import Right
from kpmd.runtime.state import State


class Access(Enum):
    """Who may make a call at all; what they then see of others' is the registry's matter."""

    USER = "everyone whom the socket's permissions let in, with what right the route asks for"
    ADMIN = "administrators"


M = TypeVar("M", bound=BaseModel)


@dataclass(slots=True)
class Call:
    """One request, its parts validated. Not frozen: one is made for each request."""

    state: State
    caller: Caller
    connection: Connection
    headers: Mapping[str, str]
    path: Mapping[str, str]
    query: Any
    body: Any
    #: What the audit trail is to tell of it beside the call itself: ids, names, numbers.
    what: dict[str, Any]


class Stream(Protocol):
    """An answer without an end of its own."""

    content_type: str

    def begin(self, abort: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """What to send, piece by piece; ``abort`` cuts the connection."""

    def close(self) -> None:
        """The connection is gone: end it. May be called at any time."""


@dataclass(slots=True)
class Reply:
    """An answer: a model of the route's answer, ready bytes of one, a stream, or nothing (204).

    ``fd``: a file descriptor that goes beside it as SCM_RIGHTS, and stays its owner's.
    """

    content: BaseModel | bytes | Stream | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    fd: OwnedFd | None = None


@dataclass(frozen=True)
class Route:
    """One call of the API.

    ``also``: other statuses of success, and their answers. ``errors``: the kinds of error that it
    can give beside those that every call can. ``right``: what the policy must grant for it; None
    where it tells of the daemon, or tells of the caller's own things or ends them.
    ``optional_body``: without one, its defaults are taken. ``streams``: the content types of an
    answer that is a stream of ``answer``. ``text``: those of an answer that is text.
    ``asks_only``: it changes nothing, though it is no GET.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Reply]]
    summary: str
    answer: type[BaseModel] | None
    status: int = 200
    access: Access = Access.USER
    right: Right | None = None
    query: type[BaseModel] = NoQuery
    body: type[BaseModel] | None = None
    optional_body: bool = False
    streams: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    asks_only: bool = False
    also: Mapping[int, type[BaseModel]] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    tag: str = "daemon"

    @property
    def changes(self) -> bool:
        """Whether what it does is put on record."""
        return self.method != "GET" and not self.asks_only
