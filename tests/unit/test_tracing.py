"""Whether requests are traced, and how: what file and environment say, and what is told of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict

from kpmd.api.tracing import Traces, _endpoint
from kpmd.config import Config, ConfigError, Tracing, load
from kpmd.daemon import make_traces
from kpmd.policy_file import report
from tests.fakes.collector import Collector
from tests.http.actor import UnixConnection

ROOT = Path(__file__).parents[2]
NO_HEADERS: CIMultiDict[str] = CIMultiDict()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with Collector() as made:
        yield made


def written(folder: Path, text: str) -> Path:
    path = folder / "kpmd.toml"
    path.write_text(text)
    return path


def test_the_file(tmp_path: Path) -> None:
    assert load(None).tracing is None
    assert load(written(tmp_path, "[tracing]")).tracing == Tracing()
    text = """
        [tracing]
        endpoint = "https://otel.example/in"
        sample_ratio = 0.25
        parent = "honour"
        service_name = "kpmd-a"
        timeout_seconds = 2
        queue_spans = 100
        [tracing.resource]
        "k8s.node.name" = "a"
        """
    config = load(written(tmp_path, text))
    found = config.tracing
    assert found is not None
    assert (str(found.endpoint), found.sample_ratio) == ("https://otel.example/in", 0.25)
    assert (found.parent, found.service_name, found.queue_spans) == ("honour", "kpmd-a", 100)
    assert found.resource == {"k8s.node.name": "a"}
    line = "tracing: 0.25 of requests to https://otel.example/in; clients' traceparent: honour"
    assert line in report(config).splitlines()
    assert "tracing" not in report(Config())


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('endpoint = "collector:4318"', "endpoint"),
        ('endpoint = "ftp://collector"', "endpoint"),
        ('endpoint = "unix:///run/otel.sock"', "endpoint"),
        ('endpoint = ""', "endpoint"),
        ('endpoint = "http://me:secret@collector"', "endpoint"),
        ("sample_ratio = 1.1", "sample_ratio"),
        ("sample_ratio = -0.1", "sample_ratio"),
        ("sample_ratio = nan", "sample_ratio"),
        ('parent = "trust"', "parent"),
        ('service_name = ""', "service_name"),
        ("timeout_seconds = 0", "timeout_seconds"),
        ("timeout_seconds = inf", "timeout_seconds"),
        ("queue_spans = 0", "queue_spans"),
        ("resource = {a = 1}", "resource.a"),
        ("surprise = 1", "surprise"),
    ],
)
def test_what_is_wrong_in_the_file(tmp_path: Path, line: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"tracing.{field}: ") as error:
        load(written(tmp_path, f"[tracing]\n{line}"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("http://[::1]:4318/v1/traces", "http://[::1]:4318/v1/traces"),
        ("https://otel.example/a?b=c", "https://otel.example/a?b=c"),
    ],
)
def test_the_path_of_the_standard_where_the_endpoint_has_none(given: str, used: str) -> None:
    assert _endpoint(Tracing.model_validate({"endpoint": given})) == used


@pytest.mark.parametrize("module", ["nowhere.sdk", "opentelemetry.nowhere"])
def test_it_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    path = written(tmp_path, "[tracing]")
    monkeypatch.setattr("kpmd.config._TRACING_NEEDS", ("opentelemetry.sdk.trace", module))
    with pytest.raises(ConfigError, match=r"pip install 'kpmd\[tracing\]'"):
        load(path)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "x"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "nobody"),
    ],
)
def test_what_is_wrong_in_the_environment_is_told_at_start(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=r"\[tracing\]: "):
        make_traces(Config(tracing=Tracing()))


async def test_the_environment_where_the_file_is_silent(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url + "/base")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=b,service.namespace=c,d=e")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    traces = Traces(Tracing(resource={"d": "f"}))
    traces.begin(NO_HEADERS, "1")
    await traced(traces)
    await collector.asked.wait()  # without being asked for it
    await traces.close(5)
    assert collector.path == "/base/v1/traces"
    names = [collector.resource[each] for each in ("service.name", "service.namespace", "d")]
    assert names == ["other", "c", "f"]


async def traced(traces: Traces) -> Any:
    """A phase of a request, which is a span of its own."""
    trace = traces.begin(NO_HEADERS, "1")
    if trace is not None:
        with trace.phase("attach"):
            pass
    return trace


async def test_its_name_where_nobody_says_one(collector: Collector) -> None:
    traces = Traces(Tracing.model_validate({"endpoint": collector.url}))
    await traced(traces)
    await traces.close(5)
    assert collector.resource["service.name"] == "kpmd"


@pytest.mark.parametrize(
    ("name", "argument", "sampled"),
    [
        ("always_on", "", True),
        ("parentbased_traceidratio", "1.0", True),
        ("traceidratio", "0.0", False),
        ("always_off", "", False),
    ],
)
async def test_the_environments_sampler(
    monkeypatch: pytest.MonkeyPatch, name: str, argument: str, sampled: bool
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    for settings, expected in ((Tracing(), sampled), (Tracing(sample_ratio=1), True)):
        traces = Traces(settings)
        headers = CIMultiDict({"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"})
        for given in (NO_HEADERS, headers):
            assert (traces.begin(given, "1") is not None) == expected
        await traces.close(0.1)


async def test_the_sdk_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    traces = Traces(Tracing())
    assert traces.begin(NO_HEADERS, "1") is None
    await traces.close(5)


async def test_what_goes_on_after_the_answer_is_not_of_the_request(collector: Collector) -> None:
    traces = Traces(Tracing.model_validate({"endpoint": collector.url}))
    trace = traces.begin(NO_HEADERS, "1")
    assert trace is not None
    request = SimpleNamespace(method="GET")
    exchange: Any = SimpleNamespace(
        request=request, route=None, caller=None, status=200, error=None
    )
    trace.end(exchange)
    with trace.phase("late"):
        pass
    trace.waited("close", time.time_ns() - 10**9)
    trace.end(exchange)
    await traces.close(5)
    assert [each.name for each in collector.spans] == ["GET"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kpmd-") as name:
        yield Path(name)


#: A daemon over the fake kernel, which reads its configuration from a file.
_DAEMON = """
import sys
from pathlib import Path
import uvloop
from kpmd.config import load
from kpmd.daemon import make_traces, serve
from kpmd.listener import make
from kpmd.log import configure
from tests.fakes.kernel import FakeKernel
configure("info")
config = load(Path(sys.argv[1]))
listener = make(config.socket, None, 0o600)
uvloop.run(serve(config, listener, FakeKernel(), traces=make_traces(config)))
listener.close()
print(*(each for each in sys.modules if each.split(".")[0] in ("opentelemetry", "google")))
"""


class Process:
    """A daemon of its own process, of that configuration."""

    def __init__(self, folder: Path, stack: ExitStack, text: str) -> None:
        self.path = folder / "k.sock"
        config = written(folder, f'socket = "{self.path}"\n{text}')
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", _DAEMON, str(config)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(self.process.kill)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if '"listening"' in line:
                return
        raise AssertionError("it does not listen")

    def ask(self) -> None:
        """A request."""
        connection = UnixConnection(str(self.path))
        connection.request("GET", "/version")
        assert connection.getresponse().status == 200
        connection.close()

    def end(self) -> tuple[list[str], list[dict[str, Any]], float]:
        """What it had imported of OpenTelemetry, its log, and how long it took to stop."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        out, log = self.process.communicate(timeout=20)
        took = time.monotonic() - began
        assert self.process.returncode == 0, log
        return out.split(), [json.loads(line) for line in log.splitlines()], took


def test_nothing_of_it_is_imported_where_it_is_not_configured(folder: Path) -> None:
    with ExitStack() as stack:
        daemon = Process(folder, stack, "")
        daemon.ask()
        imported, _, _ = daemon.end()
    assert imported == []


def test_a_daemon_stops_though_the_endpoint_hangs(folder: Path) -> None:
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        text = (
            "[limits]\nshutdown_seconds = 0.3\n"
            f'[tracing]\nendpoint = "http://127.0.0.1:{silent.getsockname()[1]}"\n'
        )
        daemon = Process(folder, stack, text)
        daemon.ask()
        imported, log, took = daemon.end()
    assert "opentelemetry.sdk.trace" in imported
    assert took < 3
    lost = [line for line in log if line["event"] == "spans lost"]
    assert [(line["level"], line["total"]) for line in lost] == [("warning", 1)]
    assert log[-1]["event"] == "stopped"
