"""``Client``: the calls of the API as methods."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from kpmd.client.daemon_calls import DaemonCalls
from kpmd.client.lifetimes import LifetimeCalls
from kpmd.client.links import LinkCalls
from kpmd.client.maps import MapCalls
from kpmd.client.net import Blocking
from kpmd.client.operation import Sync
from kpmd.client.programs import ProgramCalls


class AllCalls(DaemonCalls, ProgramCalls, LinkCalls, MapCalls, LifetimeCalls):
    """All calls of both clients."""


class Client(AllCalls, Sync):
    """A client of the daemon at ``address``; use it as a context manager, or ``close`` it.

    ``address`` is a path, ``unix:///path``, or ``ssh://[user@]host[:port][/path/of/socket]`` for
    another machine's daemon; None: ``$KPMD_SOCKET``, else ``/run/kpmd.sock``. It connects with the
    first call and keeps the connection. ``timeout`` is in seconds, for each wait for the daemon;
    None (the default) waits as long as it takes. Answers of more than ``max_answer`` bytes are
    refused. Not to be shared between threads.

    Lists are iterators, which ask for page after page as they are read. Streams (``events``,
    ``records``) have connections of their own. ``loaded_builtin``, ``loaded_object``, ``attached``
    and ``leased`` are context managers that end what they made.

    What is loaded and attached has a ``lifetime``, after which it ends by itself:

    - ``"process"``, the default: when this process ends, however it ends, and not when the client
      is closed; the daemon knows a client by the process that made the connection. Over ssh that is
      the other machine's sshd: there it ends when the client is closed as well.
    - ``"connection"``: when the client is closed. Also when a call that makes such a thing is
      broken off (by a signal handler's exception, a timeout, an answer that makes no sense): that
      closes their connection, and nothing that was being made stays.
    - the id of a lease (``"lse-…"``): when the lease ends; see ``create_lease``.
    - ``"persistent"``: never, only when it is deleted.

    A lease that has ended is ``gone``. A program goes on beyond its lifetime while a link needs it.
    Over a restart of the daemon stays what ``capabilities()["survives_restart"]`` tells of.

    Every method raises ``ConnectionFailed`` where the daemon cannot be reached, ``ApiError`` where
    it refuses (a subclass for each kind; ``Forbidden`` and ``QuotaExceeded`` can come from any of
    them) and ``ProtocolError`` where its answer makes no sense.

    ``patience`` is for how many seconds a call is tried again, while the daemon is restarted say.
    Only what is safe is: any call that was not sent, since nobody listened, or that was answered
    with ``shutting-down``, since nothing was done then; a GET, PUT or DELETE also where the
    connection ended before its answer, since twice has the effect of once (a DELETE that finds
    nothing then has done its work). A POST that was sent is never sent again: after
    ``ConnectionFailed`` with the reason ``"lost"`` it may have been done or not. Without patience a
    GET, PUT or DELETE is sent once more where a connection that had been idle turns out closed.
    """

    _make_net = Blocking

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
