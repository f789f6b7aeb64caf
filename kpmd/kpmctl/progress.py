"""What a long call is at, on one line of a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kpmd.kpmctl.output import Settings, clean, draw

if TYPE_CHECKING:
    from kpmd.client.client import Client

What = Literal["load", "attach", "detach"]

#: Seconds: what is done sooner shows nothing, and how often it is asked how far the daemon is.
_PATIENCE, _PAUSE = 0.5, 0.3

#: Seconds that the end waits for an answer that is still to come.
_FAREWELL = 1.0

_UNKNOWN_WIDTH = 80


@contextlib.contextmanager
def shown(settings: Settings, what: What, ids: Collection[str] = ()) -> Iterator[None]:
    """Tell on stderr what the daemon does for this process, as long as the block lasts.

    Only where stderr is a terminal, and the block takes longer than half a second. ``what``: load,
    attach (for both together, too) or detach; ``ids``: of the links, or the programs of the links,
    that are detached, where another process may have made them. The line is gone when the block is
    left, by Ctrl-C too; nothing else may be written in it.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    line = _Line(settings, what, ids)
    line.start()
    try:
        yield
    finally:
        line.end()


class _Line:
    """The line, and the thread that draws it.

    By hand: rich's status hides the cursor, which a SIGTERM would leave hidden.
    """

    def __init__(self, settings: Settings, what: What, ids: Collection[str]) -> None:
        self._settings = settings
        self._what: What = what
        self._ids = ids
        self._began = time.monotonic()
        self._drawn = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to wait; where the machine has no thread left, nothing is shown."""
        with contextlib.suppress(RuntimeError):
            self._thread.start()

    def end(self) -> None:
        """Take the line away; nothing is drawn from now on."""
        self._over.set()
        with self._lock:
            if self._drawn:
                draw("\r\x1b[K")
        if self._thread.ident is not None:
            self._thread.join(_FAREWELL)

    def _run(self) -> None:
        """Draw until it is over.

        Whatever goes wrong here is nobody's trouble, and then the time alone is shown: a daemon
        that is older has no such call, and if one is gone the call that is waited for tells it.
        """
        if self._over.wait(_PATIENCE):
            return
        self._draw([])
        # One more ssh could ask for one more password.
        remote = self._settings.socket.startswith("ssh://")
        with contextlib.suppress(Exception), self._settings.client() as client:
            while not (remote or self._over.is_set()):
                self._draw([each for each in _work(client) if self._is_ours(each)])
                self._over.wait(_PAUSE)
        while not self._over.wait(_PAUSE):
            self._draw([])

    def _is_ours(self, work: dict[str, Any]) -> bool:
        if (work["what"] == "detach") != (self._what == "detach"):
            return False
        if self._ids:
            return work["link"] in self._ids or work["program"] in self._ids
        return work["own"] is True

    def _draw(self, work: Sequence[dict[str, Any]]) -> None:
        seconds = time.monotonic() - self._began
        text = clean(f"{sentence(self._what, work)}, {seconds:.1f} s")
        with self._lock:
            if not self._over.is_set():
                self._drawn = True
                draw(f"\r{text[: _width() - 1]}\x1b[K")


def _work(client: Client) -> list[dict[str, Any]]:
    """What the daemon is doing at this moment. Raises ClientError."""
    found: list[dict[str, Any]] = client.call("GET", "/work?limit=1000")["items"]
    return found


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _UNKNOWN_WIDTH
    except OSError:
        return _UNKNOWN_WIDTH


def sentence(what: What, work: Sequence[dict[str, Any]]) -> str:
    """What is being done, in a few words; ``work``: the daemon's entries about it."""
    if what == "detach" and len(work) > 1:
        return f"detaching {len(work)} links"
    if not work:
        return {"load": "loading", "attach": "attaching", "detach": "detaching"}[what]
    now = work[-1]
    phase, done, total = now["phase"], now["done"], now["total"]
    functions = "function" if total == 1 else "functions"
    match phase:
        case "queued":
            return "waiting for its turn"
        case "parsing":
            return "reading the program"
        case "resolving":
            return "finding the functions"
        case "verifying":
            several = total is not None and total > 1 and done is not None
            return f"verifying {now['name']}" + (f" ({done + 1} of {total})" if several else "")
        case "attaching" | "detaching" if total is not None:
            if done is None:
                return f"{phase} {'to' if phase == 'attaching' else 'from'} {total} {functions}"
            return f"{phase}: {done} of {total} {functions}"
    return str(phase)
