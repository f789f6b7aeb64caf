"""``kpmctl dashboard`` as people see it."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kpmd.client.client import Client
from tests.browser.conftest import REBOUND, Browser, Dashboard, World, lead, until
from tests.unit.test_client import ROOT, running_daemon

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    with Client(world.daemon) as made:
        yield made
        for program in list(made.programs()):
            made.delete_program(program["id"], force=True)


def test_the_life_of_a_link(world: World, client: Client, browser: Browser) -> None:
    browser.open(world.dashboard.url)
    browser.shows("#status", "^Live$")
    browser.shows("#about", "^Linux 6.12.0-fake · what everyone has$")
    browser.shows("#links .empty", "There are no links")
    program = client.load_builtin("count")["programs"][0]["id"]
    link = client.attach(program, symbols=["vfs_read", "nf_hook"])["id"]
    browser.shows("#links tbody", rf"vfs_read, nf_hook.*\n?2\s+kprobe\s+attached(.|\n)*{link}")
    browser.shows("#programs tbody", rf"count(.|\n)*{program}")
    browser.shows("#total-functions", "^2$")
    browser.shows("#events", rf"link created\s+kprobe of 2 functions\s+{link}")
    client.detach(link)
    browser.shows_not("#links tbody", link)
    browser.shows("#events", rf"link ended\s+kprobe of 2 functions · deleted\s+{link}")


def test_rates(world: World, client: Client, browser: Browser) -> None:
    browser.open(world.dashboard.url)
    program = client.load_builtin("count")["programs"][0]["id"]
    client.attach(program, symbols=["vfs_read", "vfs_write"])
    # 340 calls on each of two CPUs, in waves.
    browser.shows("#rates tbody", r"vfs_read\s+\S+\s+[\d,.]+\s+[\d,]+")
    browser.shows("#rates tbody", r"vfs_write\s+\S+\s+[\d,.]+\s+[\d,]+")
    points = "return document.querySelector('#rates polyline').getAttribute('points')"
    until(lambda: len(browser.driver.execute_script(points).split()) >= 2)
    label = "return document.querySelector('#rates svg').getAttribute('aria-label')"
    assert re.fullmatch(r"at most [\d,.]+ calls a second", browser.driver.execute_script(label))
    browser.shows("#total-rate", r"^[1-9][\d,]*$")


def test_histograms(world: World, client: Client, browser: Browser) -> None:
    browser.open(world.dashboard.url)
    program = client.load_builtin("latency")["programs"][0]["id"]
    client.attach(program, kind="session", symbols=["vfs_open"])
    browser.shows("#histograms h3", "^vfs_open")
    browser.shows("#histograms .figures", r"calls · mean [\d.]+ µs · half within 4.1 µs · 99 % wi")
    browser.shows("#histograms tbody", r"2.0 µs . 4.0 µs\s+[\d,]+")
    widths = "return [...document.querySelectorAll('.bar div')].map(e => e.style.width)"
    found = browser.driver.execute_script(widths)
    assert found.index("100%") == 3
    assert len(found) == 10


def test_hostile_names_are_text(world: World, client: Client, browser: Browser) -> None:
    code = (
        "import sys; from kpmd.client.client import Client\n"
        "open('/proc/self/comm', 'w').write('<b id=owned>x')\n"
        "kpmd = Client(sys.argv[1]); kpmd.version(); print(flush=True); sys.stdin.read()\n"
    )
    browser.open(world.dashboard.url)
    with subprocess.Popen(
        [sys.executable, "-c", code, world.daemon],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        program = client.load_builtin("count", labels={"a": HOSTILE})["programs"][0]["id"]
        client.attach(program, symbols=["vfs_read"], labels={"b": HOSTILE})
        browser.shows("#programs tbody", re.escape(f"a={HOSTILE}"))
        browser.shows("#links tbody", re.escape(f"b={HOSTILE}"))
        browser.shows("#clients tbody", re.escape("<b id=owned>x"))
        browser.shows("#events", re.escape("<b id=owned>x"))
        other.communicate()
    assert (browser.count("img"), browser.count("#owned")) == (1, 0)  # the page's own icon
    assert browser.driver.title == "kpmd"


@pytest.mark.parametrize("fragment", ["", "#another-token"])
def test_without_the_token(world: World, browser: Browser, fragment: str) -> None:
    browser.open(world.dashboard.url.partition("#")[0] + fragment)
    browser.shows("#status", "This wants the token that stands behind the # of the address")
    assert browser.text("#about") == ""
    (complaint,) = browser.complaints()
    assert "401" in complaint["message"]


def test_under_another_name(world: World, browser: Browser) -> None:
    browser.open(world.dashboard.url.replace("127.0.0.1", REBOUND))
    browser.shows("body", "answers to no other name")
    assert any("403" in each["message"] for each in browser.complaints())
    browser.open(world.dashboard.url.replace("127.0.0.1", "localhost"))
    browser.shows("#status", "^Live$")
    address = urlsplit(world.dashboard.url)
    connection = http.client.HTTPConnection("127.0.0.1", address.port or 0)
    for host, status in ((REBOUND, 403), (address.netloc, 401)):
        connection.request("GET", "/state", headers={"Host": host})
        with connection.getresponse() as answer:
            assert answer.status == status
            assert answer.read().endswith(b".")
    connection.close()


def test_another_token_in_an_open_page(world: World, browser: Browser) -> None:
    browser.open(world.dashboard.url.partition("#")[0])
    browser.shows("#status", "This wants the token")
    browser.complaints()
    browser.driver.get(world.dashboard.url)  # only the fragment changes: nothing is loaded anew
    browser.shows("#status", "^Live$")


def test_the_daemon_is_killed_and_comes_back(place: Path, browser: Browser) -> None:
    with running_daemon("--traffic") as (path, daemon):
        lead(place, path)
        with Dashboard(str(place)) as dashboard:
            with Client(path) as client:
                program = client.load_builtin("count", lifetime="persistent")["programs"][0]["id"]
                browser.open(dashboard.url)
                browser.shows("#programs tbody", program)
            daemon.kill()
            browser.shows("#status", "^Trying again: ")
            assert program in browser.text("#programs tbody")  # what was known
            with running_daemon("--traffic") as (another, _), Client(another) as client:
                lead(place, another)
                browser.shows("#status", "^Live$")
                browser.shows_not("#programs tbody", program)
                program = client.load_builtin("count", lifetime="persistent")["programs"][0]["id"]
                browser.shows("#programs tbody", program)


def test_the_dashboard_ends(world: World, browser: Browser) -> None:
    with Dashboard(world.daemon) as dashboard:
        browser.open(dashboard.url)
        browser.shows("#status", "^Live$")
    browser.shows("#status", "kpmctl dashboard does not answer")
    browser.open("about:blank")
    assert all("ERR_" in each["message"] for each in browser.complaints())


def test_it_only_reads(world: World, browser: Browser) -> None:
    browser.open(world.dashboard.url)
    browser.shows("#status", "^Live$")
    requests = world.relay.requests
    until(
        lambda: {"/links", "/maps", "/events"} <= {re.split("[ ?]", each)[1] for each in requests}
    )
    assert [each for each in requests if not each.startswith("GET ")] == []


def test_narrow_pages_do_not_scroll_sideways(
    world: World, client: Client, browser: Browser
) -> None:
    program = client.load_builtin("count")["programs"][0]["id"]
    client.attach(program, symbols=["vfs_read", "vfs_write", "vfs_open"])
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.open(world.dashboard.url)
        browser.shows("#links tbody", "vfs_read")
        assert browser.driver.execute_script("return document.body.scrollWidth") <= 400
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
