"""The page on loopback: what is served, and to whom.

Whoever may open a connection to loopback can ask, other users of this machine among them, and any
page in a browser that runs on it. So data is for those who have the token, and the name that a
browser asked for has to be ours: a foreign name that was made to lead here (DNS rebinding) is
refused.
"""

from __future__ import annotations

import hmac
import socket
from importlib.resources import files

from aiohttp import web
from aiohttp.typedefs import Handler

from kpmd.kpmctl.dashboard.watch import Watcher

#: What is served to everyone, as it lies in this package.
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

#: Digits of the number of an event.
_DIGITS = 15

#: Seconds that answers have to end in when the server does.
_LAST = 1.0

_UNKNOWN = (
    "This wants the token that stands behind the # of the address which kpmctl dashboard wrote. "
    "Open that address; a dashboard that was started again has another one."
)


def listen(port: int) -> socket.socket:
    """A socket on loopback; port 0 is a free one. Raises OSError."""
    return socket.create_server(("127.0.0.1", port))


async def serve(watcher: Watcher, listener: socket.socket, token: str) -> web.AppRunner:
    """Serve from now on, until the runner that this returns is cleaned up."""
    port = listener.getsockname()[1]
    app = application(watcher, token, {f"127.0.0.1:{port}", f"localhost:{port}"})
    # What is asked for is nobody's business, and could fill a terminal.
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_LAST)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner


def application(watcher: Watcher, token: str, hosts: set[str]) -> web.Application:
    """The page, and the data for it; ``hosts`` are the names, with the port, that it goes by."""
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def only_here(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.headers.get("Host") not in hosts:
            raise web.HTTPForbidden(
                text=f"This is {' or '.join(sorted(hosts))}, and answers to no other name. "
                "Through a tunnel, use the same port on both sides."
            )
        return await handler(request)

    async def state(request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(errors="surrogateescape"), expected):
            raise web.HTTPUnauthorized(text=_UNKNOWN, headers={"WWW-Authenticate": "Bearer"})
        after = request.query.get("after", "0")
        if not (after.isascii() and after.isdecimal() and len(after) <= _DIGITS):
            raise web.HTTPBadRequest(text="after is the number of an event")
        return web.Response(body=await watcher.look(int(after)), content_type="application/json")

    async def protect(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_HEADERS)
        response.headers.pop("Server", None)

    app = web.Application(middlewares=[only_here])
    app.on_response_prepare.append(protect)
    app.router.add_get("/state", state, allow_head=False)
    for path, (name, content_type) in _FILES.items():
        app.router.add_get(path, _file(name, content_type), allow_head=False)
    return app


def _file(name: str, content_type: str) -> Handler:
    body = files(__package__).joinpath(name).read_bytes()

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return answer
