"""A builtin at work: loaded, attached as it has to be, its losses and names; and given back."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import click

from kpmd.client.errors import ApiError, ClientError, ProtocolError
from kpmd.kpmctl.progress import shown
from kpmd.kpmctl.stopping import Stop, Stopped

if TYPE_CHECKING:
    from kpmd.client import answers
    from kpmd.client.client import Client
    from kpmd.kpmctl.filters import Wanted
    from kpmd.kpmctl.output import Settings

#: Programs that do not have their builtin's name.
_PROGRAMS = {"stacks": "stack"}

#: What is lost of calls, by the variables that builtins count it in.
_LOSSES = {
    "returns_without_entry": "calls returned that were not seen to begin: they were under way when "
    "it was attached, or the kernel missed their beginning",
    "entries_without_return": "calls began and were not seen to return: the kernel missed that",
    "dropped": "calls are not told of, for lack of room",
    "collisions": "calls are counted without their stack, because another lies in its place",
    "no_room": "calls are counted without their stack, for lack of room",
    "no_stack": "calls are counted without their stack, because the kernel told none",
}


class Tracing:
    """A builtin, attached to functions for as long as this process lives.

    ``start``, or ``load`` and ``attach``; ``end`` detaches, ``close`` gives everything back. It can
    be started again when it is closed. All raise ClientError, but for ``close``.
    """

    def __init__(self, client: Client, builtin: str) -> None:
        self.client = client
        self.builtin = builtin
        #: How many functions it is attached to, when (time.monotonic), and how long that took.
        self.attached = 0
        self.began = 0.0
        self.attach_seconds = 0.0
        self._loaded: answers.Loaded | None = None
        #: In the order in which they are to end: first what sees calls begin.
        self._links: list[str] = []
        self._missed: dict[str, int | None] = {}
        self._names: dict[int, tuple[str, str | None]] | None = None
        self._before: dict[str, int] = {}

    def start(
        self,
        wanted: Wanted,
        kind: answers.Kind = "kprobe",
        variables: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None,
        room: tuple[str, int] | None = None,
    ) -> None:
        """Load and attach. ``sizes`` are those of maps.

        ``room`` is a map that needs an entry for each function, and a first guess of how many: if
        globs stand for more, it is loaded once more with as many as it takes.
        """
        given, name, guess = dict(sizes or {}), *(room or ("", 0))
        if room is not None:
            given[name] = guess if wanted.globs else len(wanted.functions)
        self.load(wanted, variables, given)
        self.attach(wanted, kind)
        if room is not None and wanted.globs and self.attached > given[name]:
            given[name] = self.attached
            self.close()
            self.load(wanted, variables, given)
            self.attach(wanted, kind)

    def load(
        self,
        wanted: Wanted,
        variables: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Load the builtin for those whose calls are wanted."""
        merged = {**wanted.variables, **(variables or {})}
        try:
            self._loaded = self.client.load_builtin(
                self.builtin, globals=merged, max_entries=dict(sizes or {})
            )
        except ApiError as error:
            raise _explained(error) from error
        self._links, self._missed, self._names, self._before = [], {}, None, {}
        if not self._programs():
            raise ProtocolError(f"the daemon's builtin {self.builtin} has no program of that name")

    def attach(
        self, wanted: Wanted, kind: answers.Kind = "kprobe", entries_only: bool = False
    ) -> None:
        """Attach each program as it is made to be; ``kind`` is for those that do not say it.

        ``entries_only``: leave out a program that is for returns.
        """
        # Returns first: one without its entry is told of as such, an entry without its return would
        # wait for the next call that comes to lie where it lay.
        programs = sorted(self._programs(), key=lambda each: not _returns(each))
        before = time.monotonic()
        for program in programs:
            returns = _returns(program)
            if returns and entries_only:
                continue
            session = program.get("attach") == "kprobe_session"
            as_kind: answers.Kind = "session" if session else "kretprobe" if returns else kind
            if wanted.globs:
                link = self.client.attach(
                    program["id"], as_kind, patterns=wanted.functions, exclude=wanted.exclude
                )
            else:
                link = self.client.attach(program["id"], as_kind, symbols=wanted.functions)
            self._links.insert(0, link["id"])
            self._missed[link["id"]] = link["missed"]
            self.attached = link["count"]
        self.began = time.monotonic()
        self.attach_seconds = self.began - before
        if len(self._links) > 1:
            # Returns of what began before both were attached are nobody's loss.
            self._before = self._counters()

    def map(self, name: str) -> str:
        """The id of the builtin's map of this name."""
        maps = self._loaded["maps"] if self._loaded else []
        found = next((each["id"] for each in maps if each["name"] == name), None)
        if found is None:
            raise ProtocolError(f"the daemon's builtin {self.builtin} has no map {name}")
        return found

    def names(self) -> dict[int, tuple[str, str | None]]:
        """Symbol and module by address. Many pages perhaps, so only where they are wanted."""
        if self._names is None:
            self._names = {
                int(target["address"], 16): (target["symbol"], target["module"])
                for target in (self.client.targets(self._links[0]) if self._links else ())
                if target["address"] is not None and target["symbol"] is not None
            }
        return self._names

    def name(self, address: int) -> tuple[str, str | None]:
        """A function's symbol and module, or its address."""
        return self.names().get(address, (f"0x{address:016x}", None))

    def missed(self) -> int | None:
        """Calls that the kernel could not run the programs for; None: it does not tell."""
        for each in self._links:
            self._missed[each] = self.client.link(each)["missed"]
        told = [each for each in self._missed.values() if each is not None]
        return sum(told) if len(told) == len(self._missed) else None

    def lost(self) -> dict[str, int]:
        """The builtin's counters of what went wrong, as far as it did."""
        found = {
            name: number - self._before.get(name, 0) for name, number in self._counters().items()
        }
        return {name: number for name, number in found.items() if number > 0}

    def end(self) -> None:
        """Detach; what was found can still be read."""
        self.names()
        self.missed()
        self._detach()

    def close(self) -> None:
        """Give everything back; what cannot be given back now ends with this process."""
        with contextlib.suppress(ClientError):
            self._detach()
        loaded, self._loaded, self._links = self._loaded, None, []
        for program in loaded["programs"] if loaded else ():
            with contextlib.suppress(ClientError):
                self.client.delete_program(program["id"], force=True)

    def _detach(self) -> None:
        while self._links:
            self.client.detach(self._links.pop(0))

    def _programs(self) -> list[answers.Program]:
        names = {_PROGRAMS.get(self.builtin, self.builtin)}
        names |= {f"{self.builtin}_entry", f"{self.builtin}_return"}
        return (
            [each for each in self._loaded["programs"] if each["name"] in names]
            if self._loaded
            else []
        )

    def _counters(self) -> dict[str, int]:
        """Variables that begin as 0: all programs of an object share them."""
        try:
            return {
                each["name"]: u64(each["value"])
                for each in self.client.globals(self._programs()[0]["id"])
                if each["section"] == ".bss" and each["size"] == 8
            }
        except ApiError as error:
            if error.kind != "not-supported":
                raise
            return {}  # An object without BTF: it has no variables that anybody knows of.


def _returns(program: answers.Program) -> bool:
    return program["name"].endswith("_return")


def begin(settings: Settings, stop: Stop, start: Callable[[], None]) -> None:
    """Let ``start`` load and attach. Raises KeyboardInterrupt where a signal comes meanwhile."""
    try:
        with shown(settings, "attach"), stop.breakable():
            start()
    except Stopped:
        # What is just being made has no id for us yet, but ends with this process.
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A block whose errors say what they mean of something that was there a moment ago."""
    try:
        yield
    except ClientError as error:
        raise explain_loss(error) from error


def explain_loss(error: ClientError) -> ClientError:
    """What ``not-found`` means of something that was there a moment ago."""
    if isinstance(error, ApiError) and error.kind == "not-found":
        return ApiError(
            error.kind,
            error.status,
            "the daemon no longer knows what was being counted: it was restarted, or somebody "
            "deleted the program",
            error.problem,
        )
    return error


def announce(settings: Settings, tracing: Tracing, stops_by_itself: bool) -> None:
    """Tell who waits before a terminal that it has begun, and how to end it."""
    if settings.json or stops_by_itself or not sys.stderr.isatty():
        return
    functions = "1 function" if tracing.attached == 1 else f"{tracing.attached} functions"
    click.echo(f"{functions} attached, Ctrl-C ends it", err=True)


def warn(missed: int | None, lost: Mapping[str, int], but: Iterable[str] = ()) -> None:
    """Say on stderr what is not in what was shown; ``but``: what is not to be said."""
    told = {name: number for name, number in lost.items() if name not in but}
    lines = [f"{number} {_LOSSES.get(name, name)}" for name, number in told.items()]
    if missed:
        lines.insert(0, f"{missed} calls were missed: the kernel had too many under way at once")
    for line in lines:
        click.echo(f"kpmctl: {line}", err=True)


def u64(text: str) -> int:
    """The first 8 bytes, which the kernel wrote in its machine's order."""
    try:
        return int.from_bytes(bytes.fromhex(text)[:8], sys.byteorder)
    except (TypeError, ValueError):
        raise ProtocolError("the daemon's answer has an entry that is not in hex") from None


def total(value: str | list[str]) -> int:
    """A value, or those of all CPUs together."""
    return u64(value) if isinstance(value, str) else sum(u64(each) for each in value)


def _explained(error: ApiError) -> ApiError:
    """What an older kernel's builtins lack."""
    if error.kind == "invalid" and "target_cgroup_tree" in str(error.problem):
        return ApiError(
            "not-supported",
            501,
            "this kernel cannot tell what lies below a cgroup, which takes 5.15: with "
            "--cgroup-alone there are the calls out of the cgroup itself",
            {},
        )
    return error
