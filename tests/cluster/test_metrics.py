"""The container beside kpmd's that shows its numbers: those, and nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import ClientConnectorError, ClientSession, web

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "image" / "kpmd-metrics"
TEXT = "# TYPE kpmd_links gauge\nkpmd_links 3\n"

Get = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[list[str]]:
    """A daemon that has nothing else; what it was asked, and for which format."""
    found: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        found.append(f"{request.method} {request.path} {request.headers['Accept']}")
        status = 403 if request.headers["Accept"] == "forbidden" else 200
        return web.Response(
            status=status,
            body=TEXT.encode(),
            headers={"Content-Type": "text/plain; charset=utf-8; a=b"},
        )

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "kpmd.sock")).start()
    yield found
    await runner.cleanup()


@pytest.fixture
async def get(tmp_path: Path) -> AsyncIterator[Get]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        env=os.environ
        | {"KPMD_SOCKET": str(tmp_path / "kpmd.sock"), "KPMD_METRICS_PORT": str(port)},
    )
    async with ClientSession(f"http://127.0.0.1:{port}") as session:

        async def ask(
            path: str, method: str = "GET", accept: str = "text/plain"
        ) -> tuple[int, str, str]:
            while True:
                try:
                    async with session.request(method, path, headers={"Accept": accept}) as answer:
                        kind = answer.headers["Content-Type"]
                        return answer.status, kind, await answer.text()
                except ClientConnectorError:
                    await asyncio.sleep(0.05)  # it is still starting
                    assert process.returncode is None

        yield ask
    process.terminate()
    assert await process.wait() == 0


async def test_shows_what_the_daemon_answers(asked: list[str], get: Get) -> None:
    assert await get("/metrics") == (200, "text/plain; charset=utf-8; a=b", TEXT)
    assert (await get("/metrics", accept="application/openmetrics-text"))[0] == 200
    assert asked == ["GET /metrics text/plain", "GET /metrics application/openmetrics-text"]


async def test_shows_nothing_else(asked: list[str], get: Get) -> None:
    for path in ("/", "/links", "/metrics/", "/metrics/../links", "/metrics%2f..%2flinks"):
        assert (await get(path))[0] == 404
    for method in ("POST", "DELETE", "PUT", "HEAD"):
        assert (await get("/metrics", method))[0] == 405
    assert asked == []


async def test_tells_a_refusal(asked: list[str], get: Get) -> None:
    assert (await get("/metrics", accept="forbidden"))[0] == 403


async def test_tells_that_there_is_no_daemon(get: Get) -> None:
    status, _, text = await get("/metrics")
    assert status == 502
    assert "kpmd does not answer" in text
