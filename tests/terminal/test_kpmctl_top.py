"""``kpmctl top``: what it makes of reports, its screen by textual's pilot, and a real terminal."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import cast

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from kpmd.client.client import Client
from kpmd.client.errors import ConnectionFailed
from kpmd.kpmctl import failures
from kpmd.kpmctl.commands import top as command
from kpmd.kpmctl.counting import Report, Row
from kpmd.kpmctl.top_model import HISTORY, Column, Model, amount, clock, rate, sparkline
from kpmd.kpmctl.top_sampler import Counting, Sampler
from kpmd.kpmctl.top_view import TopApp
from kpmd.kpmctl.top_widgets import layout
from tests.terminal.screen import Terminal
from tests.tools import pictures
from tests.unit.test_client import running_daemon
from tests.unit.test_kpmctl import environment, run

Calls = dict[str, tuple[int, float]]

SMALL: Calls = {"alpha": (10, 5.0), "beta [mod]": (30, 1.0), "gamma": (60, 3.0)}


def report(calls: Calls, elapsed: float = 1.0, missed: int | None = 0, dropped: int = 0) -> Report:
    """Of functions by their names, with their calls and rates."""
    rows = []
    for name, (count, a_second) in calls.items():
        function, _, module = name.removesuffix("]").partition(" [")
        address = int.from_bytes(name.encode(), "little")
        rows.append(Row(count, a_second, function, module or None, address))
    return Report(len(calls), 0.01, elapsed, missed, dropped, rows)


# The model


def names(model: Model) -> list[str]:
    return [line.name for line in model.lines()]


def modelled(calls: Calls = SMALL) -> Model:
    model = Model()
    model.add(report(calls))
    return model


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (Column.RATE, ["alpha", "gamma", "beta [mod]"]),
        (Column.RECENT, ["gamma", "alpha", "beta [mod]"]),
        (Column.CALLS, ["gamma", "beta [mod]", "alpha"]),
        (Column.SHARE, ["gamma", "beta [mod]", "alpha"]),
        (Column.FUNCTION, ["alpha", "beta [mod]", "gamma"]),
    ],
)
def test_sorting(column: Column, expected: list[str]) -> None:
    model = modelled({"alpha": (1, 0.0), "beta [mod]": (1, 0.0), "gamma": (1, 9.0)})
    model.add(report(SMALL))
    if column is not model.sort:
        model.sort_by(column)
    assert names(model) == expected
    model.sort_by(column)
    assert names(model) == expected[::-1]
    model.sort_by(column)
    assert names(model) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["alpha", "gamma", "beta [mod]"]),
        ("MM", ["gamma"]),
        ("a*a", ["alpha", "gamma"]),
        ("et? [", ["beta [mod]"]),
        ("[mod]", ["beta [mod]"]),
        (".", []),
    ],
)
def test_the_filter(text: str, expected: list[str]) -> None:
    model = modelled()
    model.filter(text)
    assert names(model) == expected
    assert model.filtered is bool(text)


def test_shares_are_of_all_calls_whatever_the_filter() -> None:
    model = modelled()
    model.filter("gamma")
    assert [line.share for line in model.lines()] == [0.6]
    assert model.summary is not None
    assert (model.summary.called, model.summary.rate) == (3, 9.0)


def test_paused_it_takes_in_and_shows_what_it_had() -> None:
    model = modelled()
    model.pause(True)
    model.add(report({**SMALL, "delta": (1, 99.0)}, elapsed=2.0))
    assert names(model) == ["alpha", "gamma", "beta [mod]"]
    assert model.summary is not None
    assert model.summary.elapsed == 1.0
    model.pause(False)
    assert names(model)[0] == "delta"
    assert model.summary.elapsed == 2.0
    assert [len(line.recent) for line in model.lines()] == [1, 2, 2, 2]


def test_from_zero() -> None:
    model = Model()
    model.reset()  # nothing came yet
    model.add(report(SMALL, elapsed=5.0, missed=3, dropped=2))
    model.reset()
    assert names(model) == []
    calls = {**SMALL, "alpha": (12, 2.0), "delta": (6, 6.0)}
    model.add(report(calls, elapsed=6.0, missed=4, dropped=2))
    assert [(line.name, line.calls, line.share) for line in model.lines()] == [
        ("delta", 6, 0.75),
        ("alpha", 2, 0.25),
    ]
    assert model.summary is not None
    assert (model.summary.missed, model.summary.dropped, model.summary.elapsed) == (1, 0, 1.0)
    assert model.lines()[1].recent == (5.0, 2.0)


def test_zero_ends_a_pause() -> None:
    model = modelled()
    model.pause(True)
    model.reset()
    assert not model.paused
    assert names(model) == []


def test_a_kernel_that_does_not_tell_what_it_missed() -> None:
    model = Model()
    model.add(report(SMALL, missed=None))
    model.reset()
    assert model.summary is not None
    assert model.summary.missed is None
    model.add(report(SMALL, missed=2))
    assert model.summary.missed == 2


def test_no_more_of_the_past_than_is_shown() -> None:
    model = Model()
    for number in range(HISTORY + 5):
        model.add(report({"alpha": (number + 1, float(number))}))
    (line,) = model.lines()
    assert line.recent == tuple(float(number) for number in range(5, HISTORY + 5))


def test_names_are_not_ours_to_trust() -> None:
    (line,) = modelled({"a\x1b[31m [m\n]": (1, 1.0)}).lines()
    assert line.name == "a\\x1b[31m [m\\n]"


def test_sparklines() -> None:
    assert sparkline((), 1, 12) == " " * 12
    assert sparkline((0.0, 1.0, 100.0), 3, 60) == " " * 57 + "▁▂▇"
    # Five samples to a bar, and in the newest one as many as there were until now.
    assert sparkline((1.0,) * 5 + (2.0,), 9 + 1, 12) == " " * 10 + "▄▇"


def test_a_bar_stays_what_it_was_when_samples_come() -> None:
    rates = [float(number // 30 % 2) for number in range(200)]
    for cells in (60, 30, 20, 12):
        size = HISTORY // cells
        for sample in range(80, 200):
            drawn = sparkline(rates[sample - HISTORY : sample], sample - 1, cells)
            again = sparkline(rates[sample - HISTORY + 1 : sample + 1], sample, cells)
            moved = 1 if sample % size == 0 else 0
            assert drawn[moved : cells - 1] == again[: cells - 1 - moved]


def test_numbers_fit() -> None:
    assert [rate(each, 9) for each in (0.0, 12.34, 100.0, 12345678.9)] == [
        "0.0",
        "12.3",
        "100",
        "12.3M",
    ]
    assert amount(1234567, 9) == "1,234,567"
    assert amount(999_999, 6) == "1.0M"
    for power in range(65):
        assert len(amount(2**power, 6)) <= 6
    assert [clock(each) for each in (0.4, 61, 3723)] == ["00:00", "01:01", "1:02:03"]


def test_columns_fit() -> None:
    for width in range(12, 260):
        widths = layout(width)
        assert sum(widths.values()) + 2 * (len(widths) - 1) == width
        assert widths[Column.FUNCTION] >= min(18, width - 11)
        if width >= 59:  # 60 columns with a scroll bar
            assert {Column.RATE, Column.RECENT, Column.CALLS} <= set(widths)
        assert (Column.SHARE in widths) is (width >= 62)


# The screen


def never() -> contextlib.AbstractContextManager[Counting]:
    raise NotImplementedError


class Screen:
    """The view over a sampler that has what a test feeds it."""

    def __init__(self, *reports: Report) -> None:
        self.sampler = Sampler(never, 1.0)
        for each in reports:
            self.sampler.news.put(each)
        self.app = TopApp(self.sampler, "a* [b]", "ada", 1.0)
        self.pilot: Pilot[None]

    @contextlib.asynccontextmanager
    async def shown(self, width: int = 80, height: int = 12):  # type: ignore[no-untyped-def]
        async with self.app.run_test(size=(width, height)) as pilot:
            self.pilot = pilot
            await pilot.pause()
            yield self

    async def feed(self, news: Report | Exception) -> None:
        """As the thread of the sampler does it."""
        if isinstance(news, Exception):
            self.sampler.failure = news
        else:
            self.sampler.news.put(news)
        thread = threading.Thread(target=self.sampler.wake)
        thread.start()
        thread.join()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    def lines(self) -> list[str]:
        """What is on the screen."""
        return [strip.text.rstrip() for strip in self.app.screen._compositor.render_strips()]

    def functions(self) -> list[str]:
        """The last column of the rows."""
        begin = self.lines()[2].index("FUNCTION")
        rows = [line for line in self.lines()[3:-1] if line[:10].strip()[:1].isdigit()]
        return [line[begin:].rstrip(" ▁▂▃▄▅▆▇█") for line in rows]

    @property
    def ended(self) -> bool:
        return not self.app.is_running


async def test_the_screen() -> None:
    async with Screen(report(SMALL, elapsed=61.0)).shown() as screen:
        head, summary, titles, *rows = screen.lines()
        assert head.split() == ["a*", "[b]", "ada", "01:01"]
        assert summary == " 3 functions attached · 3 called · 9.0 calls/s · missed 0 · dropped 0"
        assert titles.split() == ["CALLS/s▼", "LAST", "MINUTE", "CALLS", "SHARE", "FUNCTION"]
        assert rows[0].split() == ["5.0", "▇", "10", "10.0%", "alpha"]
        assert rows[2].split() == ["1.0", "▇", "30", "30.0%", "beta", "[mod]"]
        assert rows[-1].split()[:2] == ["q", "Quit"]
        await screen.feed(report({**SMALL, "alpha": (10, 0.0)}, missed=7, dropped=8))
        assert screen.functions() == ["gamma", "beta [mod]", "alpha"]
        assert screen.lines()[1].endswith("missed 7 · dropped 8")
        assert screen.lines()[5].split()[0] == "0.0"


async def test_sorting_by_keys_and_clicks() -> None:
    async with Screen(report(SMALL)).shown() as screen:
        by_rate = ["alpha", "gamma", "beta [mod]"]
        by_calls = ["gamma", "beta [mod]", "alpha"]
        assert screen.functions() == by_rate
        await screen.press("3")
        assert screen.functions() == by_calls
        await screen.press("r")
        assert screen.functions() == by_calls[::-1]
        assert "CALLS▲" in screen.lines()[2]
        await screen.press("right", "right")
        assert "FUNCTION▼" in screen.lines()[2]
        assert screen.functions() == sorted(by_rate)
        await screen.press("right")
        assert "CALLS/s▼" in screen.lines()[2]
        await screen.press("left", "left", "left")
        assert "CALLS▼" in screen.lines()[2]
        for title, expected in (("FUNCTION", sorted(by_rate)), ("CALLS/s", by_rate)):
            at = screen.lines()[2].index(title) + 2
            await screen.pilot.click("Titles", offset=(at, 0))
            assert screen.functions() == expected
        await screen.pilot.click("Titles", offset=(2, 0))
        assert screen.functions() == by_rate[::-1]


async def test_filtering_while_it_is_typed() -> None:
    async with Screen(report(SMALL)).shown() as screen:
        await screen.press("slash", "m")
        assert screen.functions() == ["gamma", "beta [mod]"]
        await screen.press("o", "q", "space")  # keys that do something elsewhere
        assert screen.app.query_one(Input).value == "moq "
        assert screen.functions() == []
        assert "Esc shows all" in screen.lines()[4]
        await screen.press("backspace", "backspace", "enter")
        assert screen.functions() == ["beta [mod]"]
        assert "1 of 3 called" in screen.lines()[1]
        await screen.press("3")  # no more typing
        assert "CALLS▼" in screen.lines()[2]
        assert screen.lines()[-2] == "Filter mo"
        assert "Esc All" in screen.lines()[-1]
        await screen.press("escape")
        assert len(screen.functions()) == 3
        assert not any(line.startswith("Filter") for line in screen.lines())
        await screen.press("slash", "x", "escape")
        assert len(screen.functions()) == 3
        await screen.press("slash", "enter")
        assert not any(line.startswith("Filter") for line in screen.lines())


async def test_pausing() -> None:
    async with Screen(report(SMALL)).shown() as screen:
        await screen.press("space")
        assert "PAUSED" in screen.lines()[0]
        await screen.feed(report({**SMALL, "delta": (7, 70.0)}, elapsed=2.0))
        assert len(screen.functions()) == 3
        await screen.press("5")
        assert screen.functions() == ["alpha", "beta [mod]", "gamma"]
        await screen.press("space")
        assert "PAUSED" not in screen.lines()[0]
        assert "delta" in screen.functions()


async def test_counting_from_zero() -> None:
    async with Screen(report(SMALL)).shown() as screen:
        await screen.press("z")
        assert "no calls yet" in screen.lines()[4]
        await screen.feed(report({**SMALL, "gamma": (64, 4.0)}, elapsed=2.0))
        assert screen.lines()[3].split() == ["4.0", "▇", "4", "100.0%", "gamma"]
        assert screen.lines()[4] == ""


async def test_help_and_reports_behind_it() -> None:
    async with Screen(report(SMALL)).shown(60, 10) as screen:
        await screen.press("question_mark")
        assert any("quit, and detach" in line for line in screen.lines())
        await screen.feed(report({**SMALL, "delta": (7, 70.0)}, elapsed=2.0))
        await screen.press("end")
        assert any("no room for" in line for line in screen.lines())
        await screen.press("q")
        assert screen.functions()[0] == "delta"
        assert not screen.ended


async def test_before_anything_is_attached() -> None:
    async with Screen().shown() as screen:
        assert screen.lines()[0].split()[-1] == "--:--"
        assert "attaching to a* [b]" in screen.lines()[4]
        await screen.press("space", "space", "z", "r", "right", "slash", "x", "escape")
        await screen.feed(report({}))
        assert "no calls yet" in screen.lines()[4]


async def test_names_are_no_markup() -> None:
    name = "[bold]x[/] [$primary]"
    async with Screen(report({name: (1, 1.0)})).shown() as screen:
        assert screen.functions() == [name]


async def test_resizing() -> None:
    async with Screen(report({**SMALL, "n" * 300: (1, 0.5)})).shown() as screen:
        for width, height in ((220, 50), (60, 10), (34, 6), (10, 3)):
            await screen.pilot.resize_terminal(width, height)
            lines = screen.lines()
            assert len(lines) == height
            assert max(len(line) for line in lines) <= width
            if width >= 60:
                assert screen.functions()[:3] == ["alpha", "gamma", "beta [mod]"]
                assert "…" in lines[6]
                assert lines[1].startswith(" 4 functions attached")


async def test_thousands_of_functions_scroll() -> None:
    calls = {f"f{number:05}": (number + 1, float(number)) for number in range(2000)}
    async with Screen(report(calls)).shown() as screen:
        assert screen.functions()[0] == "f01999"
        await screen.press("end")
        assert screen.functions()[-1] == "f00000"
        await screen.feed(report(dict(list(calls.items())[::2])))
        assert screen.functions()[-1] == "f00000"
        await screen.press("z")
        await screen.feed(report({"f00000": (2, 1.0)}))
        assert screen.functions() == ["f00000"]
        await screen.feed(report({name: (count + 1, 1.0) for name, (count, _) in calls.items()}))
        await screen.press("slash", "1", "9", "9", "?")
        assert screen.functions()[0] == "f01990"
        await screen.press("5")  # still typed: a digit of the name
        assert screen.functions() == []


@pytest.mark.parametrize("keys", [["q"], ["slash", "a", "ctrl+c"], ["?", "ctrl+c"]])
async def test_quitting(keys: list[str]) -> None:
    async with Screen(report(SMALL)).shown() as screen:
        await screen.press(*keys)
        assert screen.ended
    assert screen.app.return_code == 0


async def test_a_failure_ends_it() -> None:
    async with Screen(report(SMALL)).shown() as screen:
        await screen.feed(ConnectionFailed("gone", "lost"))
        assert screen.ended


async def test_it_ends_by_itself() -> None:
    app = TopApp(Sampler(never, 1.0), "f", "ada", 0.5, duration=0.0)
    async with app.run_test() as pilot:
        await pilot.pause(0.05)
        assert not app.is_running


async def test_the_time_that_is_shown() -> None:
    app = TopApp(Sampler(never, 0.5), "f", "ada", 0.5)
    async with app.run_test() as pilot:
        await pilot.pause()
        assert "LAST 30 s" in app.screen._compositor.render_strips()[2].text


async def test_the_picture_for_the_readme() -> None:
    svg = await pictures.top()
    assert svg.startswith("<svg ")
    assert "nft_do_chain" in svg


# The thread


class FakeCounting:
    """Reports, and keeps in mind whether it is attached."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.attached = threading.Event()
        self.fail = fail

    @contextlib.contextmanager
    def __call__(self) -> Iterator[FakeCounting]:
        self.attached.set()
        try:
            yield self
        finally:
            self.attached.clear()

    def report(self, interval: float) -> Report:
        if self.fail is not None:
            raise self.fail
        return report(SMALL)


def woken(sampler: Sampler) -> threading.Event:
    event = threading.Event()
    sampler.wake = event.set
    return event


def test_the_sampler_detaches_when_it_is_stopped() -> None:
    counting = FakeCounting()
    sampler = Sampler(counting, 60.0)
    event = woken(sampler)
    sampler.start()
    assert event.wait(10)
    assert counting.attached.is_set()
    assert sampler.news.get_nowait().rows
    sampler.stop()
    sampler.wait()
    assert not counting.attached.is_set()
    assert sampler.failure is None


def test_the_sampler_keeps_what_ended_it() -> None:
    counting = FakeCounting(ConnectionFailed("gone", "lost"))
    sampler = Sampler(counting, 0.01)
    event = woken(sampler)
    sampler.start()
    assert event.wait(10)
    sampler.stop()
    sampler.wait()
    assert sampler.failure is counting.fail
    assert not counting.attached.is_set()


def test_nobody_waits_for_what_is_just_being_attached() -> None:
    entered, release, left = threading.Event(), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def slowly() -> Iterator[Counting]:
        entered.set()
        release.wait(10)
        yield FakeCounting()
        left.set()

    sampler = Sampler(slowly, 1.0)
    sampler.start()
    assert entered.wait(10)
    sampler.stop()
    sampler.wait()
    assert not left.is_set()
    release.set()
    assert left.wait(10)
    assert sampler.news.empty()


def test_who_was_to_be_woken_may_be_gone() -> None:
    sampler = Sampler(FakeCounting(), 0.01)
    twice = threading.Semaphore(0)

    def gone() -> None:
        twice.release()
        raise RuntimeError("Event loop is closed")

    sampler.wake = gone
    sampler.start()
    assert all(twice.acquire(timeout=10) for _ in range(2))
    sampler.stop()
    sampler.wait()
    assert sampler.failure is None


# The command


def test_without_a_terminal() -> None:
    done = run("/none", "top", "f")
    assert done.exit_code == 2
    assert "`kpmctl count`" in done.stderr


def test_there_is_no_json() -> None:
    done = run("/none", "--json", "top", "f")
    assert done.exit_code == 2
    assert "`kpmctl --json count`" in done.stderr


def test_without_textual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_on_terminal", lambda: True)
    monkeypatch.setitem(sys.modules, "textual", cast(ModuleType, None))
    done = run("/none", "top", "f")
    assert done.exit_code == failures.OTHER
    assert "pip install 'kpmd-client[top]'" in done.stderr


def test_what_cannot_be_attached_is_told_before_anything_is_drawn(
    daemon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_on_terminal", lambda: True)
    monkeypatch.setattr(Sampler, "start", Sampler.run)
    done = run(daemon, "top", "nope")
    assert done.exit_code == failures.INVALID
    assert done.stderr == run(daemon, "count", "nope").stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("address", "host"),
    [("ssh://ada@far:22/run/k.sock", "far:22"), ("ssh://far", "far")],
)
def test_hosts(address: str, host: str) -> None:
    assert command._host(address) == host


# A real terminal


def nothing_left(socket: str) -> None:
    with Client(socket) as client:
        assert list(client.links()) == []
        assert list(client.programs()) == []


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


class Top(Terminal):
    """``kpmctl top`` on a terminal of 60 columns."""

    def __init__(self, socket: str, *arguments: str, **variables: str) -> None:
        command = [sys.executable, "-m", "kpmd.kpmctl", "top", *arguments]
        super().__init__(command, environment(socket, **{"TERM": "xterm-256color", **variables}))

    def end(self) -> int | None:
        status = super().end()
        # Its screen is left; no mouse any more.
        for switched_off in ("\x1b[?1049l", "\x1b[?1000l"):
            assert self.raw.rindex(switched_off) > self.raw.rindex("\x1b[?1049h")
        return status


def test_on_a_terminal_of_60_columns(daemon: str) -> None:
    with Top(daemon, "vfs_*", "--interval", "0.1") as terminal:
        lines = terminal.shows("vfs_read")
        assert lines[0].startswith(" vfs_*")
        assert re.match(" [0-9]+ functions attached · ", lines[1])
        assert lines[3].split()[-2:] == ["41", "vfs_read"]
        terminal.shows("q Quit / Filter")
        with Client(daemon) as client:
            assert len(list(client.links())) == 1
        terminal.child.send("/READ\r3")  # typed at once
        terminal.read_until(lambda lines: "CALLS▼" in lines[2] and "Filter READ" in lines[-2])
        terminal.child.setwinsize(12, 100)
        terminal.screen.resize(12, 100)
        terminal.read_until(lambda lines: "SHARE" in lines[2] and "Help" in lines[-1])
        terminal.child.send("q")
        assert terminal.end() == 0
    nothing_left(daemon)


def test_a_signal_ends_it_in_order_and_there_is_no_colour_if_none_is_wanted(daemon: str) -> None:
    with Top(daemon, "vfs_*", NO_COLOR="1") as terminal:
        terminal.shows("vfs_read")
        terminal.child.kill(signal.SIGTERM)
        assert terminal.end() == 0
    nothing_left(daemon)
    styles = {code for each in terminal.raw.split("\x1b[")[1:] for code in sgr(each)}
    assert styles <= {0, 1, 2, 3, 4, 7, 39, 49}


def sgr(sequence: str) -> list[int]:
    """What a control sequence says of colours and the like."""
    parameters, end, _ = sequence.partition("m")
    if not end or not parameters.replace(";", "").isdigit():
        return []
    return [int(each or "0") for each in parameters.split(";")]


def test_the_daemon_goes_away() -> None:
    with (
        running_daemon() as (path, process),
        Top(path, "vfs_*", "--interval", "0.1") as terminal,
    ):
        terminal.shows("vfs_read")
        process.kill()
        assert terminal.end() == failures.UNREACHABLE
    told = terminal.raw.rpartition("\x1b[")[2]
    assert "kpmctl: " in told
    assert "Traceback" not in terminal.raw


def test_a_terminal_that_cannot_draw(daemon: str) -> None:
    with Top(daemon, "vfs_read", TERM="dumb") as terminal:
        said = terminal.child.read()
        terminal.child.close()
        assert terminal.child.exitstatus == 2
    assert "kpmctl count" in said
    assert "\x1b" not in said
