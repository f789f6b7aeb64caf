"""The yardstick of HTTP: aiohttp and uvloop, and the same bytes for every request."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import uvloop
from aiohttp import web


async def serve(path: str, content: bytes) -> None:
    """Serve until SIGTERM."""

    async def handle(request: web.Request) -> web.Response:
        if request.can_read_body:
            await request.read()
        return web.Response(body=content, content_type="application/json")

    app = web.Application(client_max_size=32 << 20)
    app.router.add_get("/capabilities", handle)
    app.router.add_post("/links", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print("listening", flush=True)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], Path(sys.argv[2]).read_bytes()))
