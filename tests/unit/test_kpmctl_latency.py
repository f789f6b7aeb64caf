"""``kpmctl latency``: histograms, how they are drawn, and what is told of what is not in them."""

from __future__ import annotations

import json
import re
import signal

import pytest

from kpmd.kpmctl import histogram
from kpmd.kpmctl.histogram import Histogram, bar, rows, span, together
from tests.unit.oneliners import FakeBuiltin, latency, u64
from tests.unit.test_client import scripted
from tests.unit.test_kpmctl import Started, Terminal, good, plain, run

SESSION = {"latency": "kprobe_session"}
PAIR = {"latency_entry": "kprobe_multi", "latency_return": "kprobe_multi"}

ENTRIES = [
    # Two CPUs, of which one has seen nothing.
    {"key": u64(0x1000), "value": [latency(30_000, 9000, {10: 6, 13: 1}), latency(0, 0, {})]},
    {"key": u64(0x2000), "value": [latency(3000, 2000, {10: 2}), latency(10**7, 10**7, {23: 1})]},
    {"key": u64(0x3000), "value": [latency(0, 0, {}), latency(0, 0, {})]},
]


def filled(**slots: int) -> Histogram:
    made = Histogram(max_ns=(1 << 40))
    for name, calls in slots.items():
        made.slots[int(name[1:])] = calls
    return made


# Numbers


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (1, "1 ns"),
        (999, "999 ns"),
        (1000, "1.00 µs"),
        (1024, "1.02 µs"),
        (16_384, "16.4 µs"),
        (524_288, "524 µs"),
        (999_500, "1.00 ms"),
        (1 << 20, "1.05 ms"),
        (1 << 30, "1.07 s"),
        (1 << 63, "9220000000 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(ns: int, text: str) -> None:
    assert span(ns) == text
    assert span(ns, unicode=False) == text.replace("µ", "u")


def test_quantiles_are_upper_ends() -> None:
    times = filled(s0=50, s4=40, s10=9, s20=1)
    assert times.quantile_ns(0.5) == 1
    assert times.quantile_ns(0.51) == times.quantile_ns(0.9) == 31
    assert times.quantile_ns(0.99) == 2047
    assert times.quantile_ns(1) == (1 << 21) - 1
    # No call took longer than the longest.
    times.max_ns = 1500
    assert times.quantile_ns(0.99) == 1500
    assert Histogram().quantile_ns(0.5) == Histogram().mean_ns == 0


def test_histograms_add_up() -> None:
    one = Histogram(2, 30, 20, filled(s3=1, s4=1).slots)
    other = Histogram(1, 500, 500, filled(s8=1).slots)
    both = together([one, other])
    assert (both.calls, both.total_ns, both.max_ns, both.mean_ns) == (3, 530, 500, 177)
    assert [slot for slot, calls in enumerate(both.slots) if calls] == [3, 4, 8]
    assert one.calls == 2


def test_bars() -> None:
    assert bar(1, 4) == "████"
    assert bar(0.5, 3) == "█▌"
    assert bar(1 / 1_000_000, 30) == "▏"
    assert bar(0, 30) == bar(1, 0) == ""
    assert bar(1 / 1_000_000, 30, unicode=False) == "#"
    assert bar(0.5, 4, unicode=False) == "##"


def test_rows_reach_from_the_first_call_to_the_last() -> None:
    drawn = rows(filled(s9=1, s11=100), 40)
    assert [label for label, _ in drawn] == [
        " 512 ns - 1.02 µs    1",
        "1.02 µs - 2.05 µs    0",
        "2.05 µs - 4.10 µs  100",
    ]
    assert [bar_ for _, bar_ in drawn] == ["▏", "", "█" * 16]
    assert rows(Histogram(), 40) == []
    assert rows(filled(s0=1), 40)[0][0].startswith("   0 ns -    2 ns")
    for label, bar_ in rows(filled(s0=1 << 40, s63=7), 60, unicode=False):
        assert len(label) + 2 + len(bar_) <= 60
        assert label.isascii()


# The command


def test_all_functions_together() -> None:
    fake = FakeBuiltin(SESSION, {"latencies": ENTRIES})
    with scripted(fake) as server:
        text = good(server.path, "latency", "vfs_read", "nf_hook", "--duration", "0", "--uid", "7")
    assert fake.loads[0]["source"]["globals"] == {"target_uid": 7}
    assert fake.loads[0]["source"]["max_entries"] == {"latencies": 2}
    (link,) = fake.links
    assert (link["kind"], link["symbols"]) == ("session", ["vfs_read", "nf_hook"])
    assert fake.deleted == ["/links/lnk-session", "/programs/prg-latency"]
    assert re.match(r"2 functions attached, attach took [\d.]+ ms, missed calls 0, elapsed", text)
    assert "calls 10, mean 1.00 ms, max 10.0 ms" in text
    assert "p50 ≤ 2.05 µs, p90 ≤ 16.4 µs, p99 ≤ 10.0 ms" in text.replace("\n", ", ")
    assert "1.02 µs - 2.05 µs  8  ████" in text
    assert "8.39 ms - 16.8 ms  1  ███" in text


def test_each_function_by_its_time() -> None:
    with scripted(FakeBuiltin(SESSION, {"latencies": ENTRIES})) as server:
        asked = ["latency", "f", "--duration", "0", "--each"]
        text = good(server.path, *asked)
        short = good(server.path, *asked, "--top", "1")
    assert text.index("nf_hook [nf_tables]\ncalls 3,") < text.index("vfs_read\ncalls 7,")
    assert "vfs_read" not in short
    assert short.endswith("\n\n… and 1 more functions\n")
    assert run("/none", *asked[:-1], "--top", "1").exit_code == 2


def test_entry_and_return_are_attached_and_detached_in_order() -> None:
    fake = FakeBuiltin(PAIR, {"latencies": ENTRIES, "calls": []})
    with scripted(fake) as server:
        good(server.path, "latency", "vfs_*", "--exclude", "vfs_w*", "--duration", "0")
    assert [(each["program"], each["kind"]) for each in fake.links] == [
        ("prg-latency_return", "kretprobe"),
        ("prg-latency_entry", "kprobe"),
    ]
    assert all(each["patterns"] == ["vfs_*"] for each in fake.links)
    assert all(each["exclude"] == ["vfs_w*"] for each in fake.links)
    assert fake.deleted[:2] == ["/links/lnk-kprobe", "/links/lnk-kretprobe"]


class Losing(FakeBuiltin):
    """Loses calls after it was attached, as it did before."""

    def __call__(self, method: str, target: str, body: object) -> bytes:
        answer = super().__call__(method, target, body)
        if target.startswith("/programs/") and "/globals" in target:
            self.variables["returns_without_entry"] += 3
        return answer


def test_what_is_not_in_the_histogram_is_told() -> None:
    lost = {"returns_without_entry": 100, "entries_without_return": 0, "dropped": 5}
    fake = Losing(PAIR, {"latencies": ENTRIES}, variables=lost, missed=4)
    with scripted(fake) as server:
        done = run(server.path, "--json", "latency", "f", "--duration", "0")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["missed"] == 8  # of both links
    # What returned before both were attached is not a loss.
    assert report["lost"] == {"returns_without_entry": 3}
    assert "3 calls returned that were not seen to begin" in done.stderr
    assert "8 calls were missed" in done.stderr
    assert "room" not in done.stderr


def test_json_has_each_function() -> None:
    with scripted(FakeBuiltin(SESSION, {"latencies": ENTRIES}, missed=None)) as server:
        report = json.loads(good(server.path, "--json", "latency", "f", "--duration", "0"))
    assert (report["attached"], report["missed"], report["lost"]) == (2, None, {})
    assert report["last"] is True
    hook, read = report["functions"]
    assert (hook["symbol"], hook["module"]) == ("nf_hook", "nf_tables")
    assert read["address"] == "0x0000000000001000"
    assert (read["calls"], read["total_ns"], read["max_ns"]) == ("7", "30000", "9000")
    assert [(i, n) for i, n in enumerate(read["slots"]) if n != "0"] == [(10, "6"), (13, "1")]


def test_an_interval_shows_more_than_the_last() -> None:
    with scripted(FakeBuiltin(SESSION, {"latencies": ENTRIES})) as server:
        asked = ["--json", "latency", "f", "--duration", ".15", "--interval", ".05"]
        reports = [json.loads(line) for line in good(server.path, *asked).splitlines()]
    assert len(reports) >= 2
    assert [each["last"] for each in reports] == [False] * (len(reports) - 1) + [True]


def test_no_calls() -> None:
    with scripted(FakeBuiltin(SESSION, {"latencies": []})) as server:
        assert good(server.path, "latency", "f", "--duration", "0").endswith("\nno calls yet\n")


def test_a_value_that_makes_no_sense() -> None:
    entries = [{"key": u64(1), "value": ["00"]}]
    with scripted(FakeBuiltin(SESSION, {"latencies": entries})) as server:
        done = run(server.path, "latency", "f", "--duration", "0")
    assert done.exit_code == 1
    assert "no histogram" in done.stderr


def test_a_signal_shows_the_last() -> None:
    fake = FakeBuiltin(SESSION, {"latencies": ENTRIES})
    with scripted(fake) as server:
        process = Started(server.path, "latency", "f", "--interval", ".05")
        process.first_line()
        process.send_signal(signal.SIGTERM)
        out, err = process.end()
    assert (process.returncode, err) == (0, "")
    assert "calls 10" in out
    assert "/links/lnk-session" in fake.deleted


@pytest.mark.parametrize("width", [60, 120])
def test_on_a_terminal(width: int) -> None:
    with scripted(FakeBuiltin(SESSION, {"latencies": ENTRIES})) as server:
        asked = ["latency", "f", "--each", "--interval", ".1", "--duration", ".35"]
        terminal = Terminal(server.path, asked, width, 12)
        text = terminal.end()
        assert terminal.process.wait(20) == 0
    frames = [plain(frame) for frame in re.split(r"\x1b\[2K", text) if "attached" in frame]
    assert len(frames) >= 2
    for frame in frames[:-1]:
        assert len(frame.splitlines()) <= 12
        assert "more lines" in frame
    assert "8.19 µs - 16.4 µs" in frames[-1]
    assert max(len(line) for line in plain(text).splitlines()) <= width
    assert "\x1b[36m" in text  # bars have a colour


def test_ascii_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with scripted(FakeBuiltin(SESSION, {"latencies": ENTRIES})) as server:
        process = Started(server.path, "latency", "f", "--duration", "0")
        out, _ = process.end()
    assert out.isascii()
    assert "p50 <= 2.05 us" in out
    assert "1.02 us - 2.05 us  8  ####" in out
    assert not set(histogram.SIGNS) - {" "} & set(out)


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with scripted(FakeBuiltin(SESSION, {"latencies": ENTRIES})) as server:
        terminal = Terminal(server.path, ["latency", "f", "--duration", "0"], 60, 20)
        text = terminal.end()
        assert terminal.process.wait(20) == 0
    assert "█" in text
    assert "\x1b[3" not in text
