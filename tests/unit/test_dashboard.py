"""``kpmctl dashboard`` without a browser: its figures, what it reads, and whom it answers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import signal
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from aiohttp.test_utils import TestClient, TestServer
from click.testing import CliRunner

from kpmd.client.errors import ApiError, ConnectionFailed
from kpmd.kpmctl import failures
from kpmd.kpmctl.cli import main
from kpmd.kpmctl.dashboard import feed, reading
from kpmd.kpmctl.dashboard.figures import HISTORY, Rates
from kpmd.kpmctl.dashboard.reading import Daemon
from kpmd.kpmctl.dashboard.server import application
from kpmd.kpmctl.dashboard.watch import Watcher
from tests.unit.test_client import running_daemon
from tests.unit.test_client_lifetimes import until as wait_until
from tests.unit.test_kpmctl import Started

TOKEN = "a-token"  # noqa: S105
HOST = "127.0.0.1:1"
VFS_READ, VFS_WRITE = 0xFFFFFFFF81001000, 0xFFFFFFFF81002000


# Figures


def test_rates_are_differences_over_time() -> None:
    rates = Rates()
    rates.sample(10.0, {1: 500})
    assert list(rates.flows[1].rates) == []
    rates.sample(12.0, {1: 600, 2: 30})
    rates.sample(13.0, {1: 600, 2: 31})
    assert (rates.flows[1].calls, list(rates.flows[1].rates)) == (600, [50.0, 0.0])
    # One that was not there before had been called never.
    assert list(rates.flows[2].rates) == [15.0, 1.0]
    assert rates.flows[1].lately > rates.flows[2].lately


def test_rates_of_a_map_that_is_cleared() -> None:
    rates = Rates()
    rates.sample(0.0, {1: 500, 2: 1})
    rates.sample(1.0, {1: 20})
    assert rates.flows.keys() == {1}
    assert list(rates.flows[1].rates) == [20.0]


def test_rates_after_nobody_looked() -> None:
    rates = Rates()
    for second in range(100):
        rates.sample(float(second), {1: second * 7})
    assert list(rates.flows[1].rates) == [7.0] * HISTORY
    rates.sample(1000.0, {1: 10_000})
    assert list(rates.flows[1].rates) == []
    rates.sample(1000.0, {1: 10_000})  # no time has passed
    assert list(rates.flows[1].rates) == []
    rates.sample(1001.0, {1: 10_003})
    assert list(rates.flows[1].rates) == [3.0]


def in_hex(*numbers: int) -> str:
    return struct.pack(f"={len(numbers)}Q", *numbers).hex()


def latency(calls: int, total: int, longest: int, **slots: int) -> str:
    return in_hex(calls, total, longest, *(slots.get(f"s{slot}", 0) for slot in range(64)))


# What is read


class FakeDaemon:
    """As ``AsyncClient``, over lists; ``fail`` has what the call of a name raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.lists: dict[str, list[Any]] = {
            "links": [link("lnk-1", "prg-1", 2)],
            "programs": [{"id": "prg-1", "name": "count", "owner": OWNER}],
            "clients": [{"id": "cli-1", "command": "<img src=x>"}],
            "leases": [],
            "maps": [percpu("map-1", "counts", 8, "prg-1")],
            "entries map-1": [entry(VFS_READ, in_hex(5), in_hex(6)), entry(VFS_WRITE, in_hex(2))],
            "targets lnk-1": [target("vfs_read", VFS_READ), target("nf_hook", 1, "nf_tables")],
        }
        self.events_: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self.listening = 0
        self.forgotten = False
        self.since: list[str | None] = []

    def __getattr__(self, name: str) -> Callable[..., AsyncIterator[Any]]:
        return lambda *of: self._items(" ".join([name, *of]))

    async def _items(self, name: str) -> AsyncIterator[Any]:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]
        for each in self.lists[name]:
            yield each

    async def capabilities(self) -> Any:
        self.calls.append("capabilities")
        policy = {"administrator": False, "read_others": False}
        return {"kernel": {"release": "6.12"}, "policy": policy}

    @contextlib.asynccontextmanager
    async def events(self, since: str | None = None, *, on_gap: Any = None) -> AsyncIterator[Any]:
        self.since.append(since)
        if "events" in self.fail:
            raise self.fail["events"]
        if self.forgotten and since is not None:
            raise ApiError("gone", 410, "not kept any more", {})
        self.listening += 1
        try:
            yield self._events(on_gap)
        finally:
            self.listening -= 1

    async def _events(self, on_gap: Callable[[str], None]) -> AsyncIterator[Any]:
        while True:
            found = await self.events_.get()
            if isinstance(found, Exception):
                raise found
            if "gap" in found:
                on_gap(found["gap"])
            else:
                yield found


OWNER = {"uid": 1000, "user": "alice"}


def link(id_: str, program: str, count: int) -> dict[str, Any]:
    return {"id": id_, "program": program, "count": count, "owner": OWNER}


def percpu(id_: str, name: str, value_size: int, program: str) -> dict[str, Any]:
    sizes = {"key_size": 8, "value_size": value_size}
    return {"id": id_, "name": name, **sizes, "programs": [program]}


def entry(address: int, *values: str) -> dict[str, Any]:
    return {"key": in_hex(address), "value": list(values)}


def target(symbol: str, address: int, module: str | None = None) -> dict[str, Any]:
    return {"symbol": symbol, "module": module, "address": f"0x{address:016x}"}


async def until(condition: Callable[[], object]) -> None:
    """Let others run until that is so."""
    async with asyncio.timeout(10):
        for _ in iter(lambda: bool(condition()), True):
            await asyncio.sleep(0.001)


class Looking:
    """A watcher over a fake daemon, at a time of one's own."""

    def __init__(self) -> None:
        self.daemon = FakeDaemon()
        self.now = 0.0
        self.watcher = Watcher(cast(Daemon, self.daemon), lambda: self.now)

    async def look(self, after: int = 0) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await self.watcher.look(after))
        return answer

    async def later(self, seconds: float = 1.0) -> dict[str, Any]:
        self.now += seconds
        sample: dict[str, Any] = (await self.look())["sample"]
        return sample

    async def event(self, event: dict[str, Any] | Exception) -> None:
        self.daemon.events_.put_nowait(event)
        await until(self.daemon.events_.empty)
        await asyncio.sleep(0)


@pytest.fixture
async def looking() -> AsyncIterator[Looking]:
    made = Looking()
    yield made
    await made.watcher.close()
    assert made.daemon.listening == 0


async def test_a_sample(looking: Looking) -> None:
    sample = (await looking.look())["sample"]
    assert (sample["trouble"], sample["release"], sample["everyone"]) == (None, "6.12", False)
    (shown,) = sample["links"]["rows"]
    assert shown["functions"] == ["vfs_read", "nf_hook [nf_tables]"]
    read, write = sample["rates"]["rows"]
    assert (read["function"], read["calls"], read["owner"]) == ("vfs_read", 11, OWNER)
    assert write["function"] == f"0x{VFS_WRITE:016x}"  # no link names it
    looking.daemon.lists["entries map-1"][0] = entry(VFS_READ, in_hex(5), in_hex(56))
    read, _ = (await looking.later(2.0))["rates"]["rows"]
    assert (read["calls"], read["rates"]) == (61, [25.0])


async def test_a_name_outlives_its_link(looking: Looking) -> None:
    await looking.look()
    looking.daemon.lists["links"] = []
    read, _ = (await looking.later())["rates"]["rows"]
    assert read["function"] == "vfs_read"


async def test_histograms(looking: Looking) -> None:
    lists = looking.daemon.lists
    lists["maps"] = [percpu("map-2", "latencies", 536, "prg-1")]
    lists["entries map-2"] = [
        entry(VFS_READ, latency(3, 300, 150, s5=1, s7=2)),
        entry(VFS_WRITE, latency(0, 0, 0)),
    ]
    (found,) = (await looking.look())["sample"]["histograms"]["rows"]
    assert (found["function"], found["mean"], found["longest"]) == ("vfs_read", 100.0, 150)
    assert (found["first"], found["slots"]) == (5, [1, 0, 2])
    assert (found["half"], found["most"]) == (150, 150)


async def test_maps_that_only_have_the_name(looking: Looking) -> None:
    looking.daemon.lists["maps"] = [percpu("map-1", "counts", 16, "prg-1")]
    assert (await looking.look())["sample"]["rates"]["rows"] == []


async def test_many_pages_make_one_reading(looking: Looking) -> None:
    first, second = await asyncio.gather(looking.look(), looking.look())
    assert first["sample"] == second["sample"]
    looking.now += 0.5
    await looking.look()
    assert looking.daemon.calls.count("links") == 1
    await looking.later(0.6)
    assert looking.daemon.calls.count("links") == 2
    # What cannot change was not asked for again.
    assert looking.daemon.calls.count("capabilities") == 1
    assert looking.daemon.calls.count("targets lnk-1") == 2  # for the row, and for the rates


async def test_no_more_than_is_shown(looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROWS", "BUSIEST", "MAPS"):
        monkeypatch.setattr(reading, name, 1)
    monkeypatch.setattr(reading, "ITEMS", 3)
    lists = looking.daemon.lists
    lists["links"] = [link(f"lnk-{number}", "prg-9", 1) for number in range(5)]
    lists |= {f"targets lnk-{number}": [] for number in range(5)}
    lists["clients"] *= 3
    lists["maps"] *= 2
    sample = (await looking.look())["sample"]
    counted = {name: sample[name] for name in ("links", "clients", "rates")}
    assert {name: len(each["rows"]) for name, each in counted.items()} == dict.fromkeys(counted, 1)
    assert {name: (each["more"], each["open"]) for name, each in counted.items()} == {
        "links": (2, True),
        "clients": (2, False),
        "rates": (1, False),
    }
    assert sample["notes"] == ["Only the first 1 of 2 maps are read."]


async def test_no_more_entries_than_are_read(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "ENTRIES", 1)
    sample = (await looking.look())["sample"]
    assert len(sample["rates"]["rows"]) == 1
    assert sample["notes"] == ["Only the first 1 functions that are in maps are read."]


async def test_the_daemon_is_away_and_back(looking: Looking) -> None:
    before = (await looking.look())["sample"]
    looking.daemon.fail["links"] = ConnectionFailed("nobody listens", "refused")
    sample = await looking.later()
    assert (sample["trouble"], sample["links"]) == ("nobody listens", before["links"])
    del looking.daemon.fail["links"]
    sample = await looking.later()
    assert (sample["trouble"], sample["links"]) == (None, before["links"])
    assert looking.daemon.calls.count("capabilities") == 2  # it may be another daemon


async def test_away_from_the_beginning(looking: Looking) -> None:
    looking.daemon.fail["leases"] = ConnectionFailed("nobody listens", "refused")
    sample = (await looking.look())["sample"]
    assert sample["trouble"] == "nobody listens"
    assert "links" not in sample


async def test_what_ends_while_it_is_read(looking: Looking) -> None:
    gone = ApiError("not-found", 404, "there is no such thing", {})
    looking.daemon.fail |= {"entries map-1": gone, "targets lnk-1": gone}
    sample = (await looking.look())["sample"]
    assert (sample["trouble"], sample["notes"], sample["rates"]["rows"]) == (None, [], [])
    assert sample["links"]["rows"][0]["functions"] == []


async def test_maps_that_may_not_be_read(looking: Looking) -> None:
    looking.daemon.fail["entries map-1"] = ApiError("forbidden", 403, "rule web does not", {})
    sample = (await looking.look())["sample"]
    assert (sample["trouble"], sample["notes"]) == (None, ["rule web does not"])


# Events


async def test_each_page_gets_the_events_it_has_not_seen(looking: Looking) -> None:
    await looking.look()
    await looking.event({"seq": "a-1", "event": "created"})
    await looking.event({"gap": "it was restarted"})
    told = (await looking.look())["feed"]
    assert [each.get("event", each.get("gap")) for each in told["rows"]] == [
        "created",
        "it was restarted",
    ]
    assert told["last"] == 2
    await looking.event({"seq": "a-2", "event": "ended"})
    told = (await looking.look(2))["feed"]
    assert [each["seq"] for each in told["rows"]] == ["a-2"]


async def test_events_are_bounded(looking: Looking) -> None:
    await looking.look()
    for number in range(feed.EVENTS + 5):
        await looking.event({"seq": f"a-{number}"})
    told = (await looking.look())["feed"]
    assert (len(told["rows"]), told["last"]) == (feed.EVENTS, feed.EVENTS + 5)


async def test_events_go_on_where_they_were_cut_off() -> None:
    daemon = FakeDaemon()
    listening = feed.Feed(cast(Daemon, daemon), again=0)
    daemon.fail["events"] = ApiError("forbidden", 403, "rule web does not", {})
    listening.start()
    await until(lambda: listening.after(0)["trouble"] == "rule web does not")
    del daemon.fail["events"]
    daemon.events_.put_nowait({"seq": "a-1"})
    await until(lambda: listening.after(0)["last"] == 1)
    assert listening.after(0)["trouble"] is None
    daemon.forgotten = True
    daemon.events_.put_nowait(ConnectionFailed("it was cut off", "lost"))
    await until(lambda: daemon.since[-2:] == ["a-1", None])
    told = listening.after(0)
    assert [each.get("gap") for each in told["rows"]] == [None, "not kept any more"]
    task = listening.stop()
    assert task is not None
    await asyncio.wait([task])
    assert daemon.listening == 0


async def test_nobody_listens_when_nobody_looks(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmd.kpmctl.dashboard.watch._IDLE", 0.01)
    await looking.look()
    await looking.event({"seq": "a-1"})
    await until(lambda: looking.daemon.listening == 0)
    await looking.look()
    await looking.event({"seq": "a-2"})
    assert looking.daemon.since == [None, "a-1"]
    assert (await looking.look())["feed"]["last"] == 2


# Whom it answers


@pytest.fixture
async def page(looking: Looking) -> AsyncIterator[TestClient[Any, Any]]:
    server = TestServer(application(looking.watcher, TOKEN, {HOST}))
    async with TestClient(server, headers={"Host": HOST}) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_data_is_for_those_who_have_the_token(page: Any, looking: Looking) -> None:
    async with page.get("/state", headers=bearer(TOKEN)) as answer:
        assert answer.status == 200
        assert (await answer.json())["sample"]["release"] == "6.12"
    asked = list(looking.daemon.calls)
    for headers in ({}, bearer(""), bearer("another"), bearer(TOKEN + "x"), bearer("\xe9")):
        async with page.get(f"/state?token={TOKEN}", headers=headers) as answer:
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert "behind the # of the address" in await answer.text()
    assert looking.daemon.calls == asked


@pytest.mark.parametrize("host", ["evil.example", "evil.example:1", "127.0.0.1:2", "127.0.0.1", ""])
@pytest.mark.parametrize("path", ["/", "/state", "/page.js", "/nowhere"])
async def test_no_other_name_leads_here(page: Any, host: str, path: str) -> None:
    async with page.get(path, headers={**bearer(TOKEN), "Host": host}) as answer:
        assert answer.status == 403
        assert "answers to no other name" in await answer.text()


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
        ("/state", "text/plain"),
        ("/nowhere", "text/plain"),
        ("/../server.py", "text/plain"),
    ],
)
async def test_headers_of_every_answer(page: Any, path: str, content_type: str) -> None:
    async with page.get(path) as answer:
        assert answer.content_type == content_type
        policy = answer.headers["Content-Security-Policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= {*policy}
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Server" not in answer.headers
        assert not any(name.startswith("Access-Control") for name in answer.headers)


async def test_only_get(page: Any) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        async with page.request(method, "/state", headers=bearer(TOKEN)) as answer:
            assert answer.status == 405


@pytest.mark.parametrize("after", ["x", "-1", "1e3", "", "9" * 5000, "٣"])
async def test_numbers_of_events(page: Any, after: str) -> None:
    async with page.get("/state", params={"after": after}, headers=bearer(TOKEN)) as answer:
        assert answer.status == 400


# The command


def test_without_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["dashboard"], prog_name="kpmctl")
    assert done.exit_code == failures.OTHER
    assert "pip install 'kpmd-client[dashboard]'" in done.stderr


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with running_daemon() as (path, _):
        yield path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_its_life(daemon: str, number: signal.Signals) -> None:
    with Started(daemon, "dashboard") as process:
        url = process.first_line()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/#[\w-]{43}\n", url)
        address = urlsplit(url.strip())
        connection = http.client.HTTPConnection("127.0.0.1", address.port or 0)
        # An open connection does not hold it up.
        connection.request("GET", "/state", headers=bearer(address.fragment))
        answer = connection.getresponse()
        (me,) = json.loads(answer.read())["sample"]["clients"]["rows"]
        assert me["pid"] == process.pid
        process.send_signal(number)
        out, err = process.end()
        connection.close()
    assert (process.returncode, out) == (0, "")
    assert err == "Whoever has this address sees what you may see. Ctrl-C ends it.\n"


def test_as_json_on_a_port(daemon: str) -> None:
    with Started(daemon, "--json", "dashboard") as process:
        url = json.loads(process.first_line())["url"]
        port = str(urlsplit(url).port)
        done = CliRunner().invoke(main, ["--socket", daemon, "dashboard", "--port", port])
        assert (done.exit_code, done.stdout) == (failures.OTHER, "")
        assert f"cannot listen on port {port} of loopback" in done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.end() == ("", "")


def test_opening_a_browser(daemon: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is not among the arguments of a process, which every user can see."""
    browser = tmp_path / "browser"
    browser.write_text(
        '#!/bin/sh\nfile="${1#file://}"\n'
        f'{{ echo "$1"; stat -c %a "${{file%/*}}"; cat "$file"; }} > {tmp_path}/seen.new\n'
        f"mv {tmp_path}/seen.new {tmp_path}/seen\n"
    )
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Started(daemon, "dashboard", "--open") as process:
        url = process.first_line().strip()
        seen = tmp_path / "seen"
        wait_until(seen.exists)
        process.send_signal(signal.SIGTERM)
        process.end()
    argument, mode, page = seen.read_text().splitlines()
    assert urlsplit(url).fragment not in argument
    assert mode == "700"
    assert f'url={url}"' in page
    assert {each.name for each in tmp_path.iterdir()} == {"browser", "seen"}


def test_without_a_daemon() -> None:
    done = CliRunner().invoke(main, ["--socket", "/nowhere/kpmd.sock", "dashboard"])
    assert (done.exit_code, done.stdout) == (failures.UNREACHABLE, "")
    assert len(done.stderr.splitlines()) == 1
