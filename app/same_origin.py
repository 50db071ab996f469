"""Refuses what web pages elsewhere send through a visitor's browser, before anything reads it.

A page of another origin can make a browser send requests here, even to a server that listens on
this machine alone; and a name that its owner first points at himself and then at this machine
("DNS rebinding") makes such a page look like ours. So the name that is asked for must be one of the
server's, and what the browser says about where a request comes from must agree with it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = "any address"
"""In a list of host names: every IP address. Nobody can point one elsewhere, as one can a name."""

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")


def names_of(host: str) -> tuple[str, ...]:
    """The names under which a server that listens on `host` may be asked for."""
    if host in LOOPBACK:
        return LOOPBACK
    return (
        ANY_ADDRESS,
        *dict.fromkeys((host, "localhost", socket.gethostname(), socket.getfqdn())),
    )


class SameOrigin:
    """An ASGI application: `app`, for requests from its own pages or from no page at all.

    `hosts` are the names it is served under (`names_of`). A request under another name gets 400,
    one from a page of another origin 403, each with a line of JSON that says why. Links from
    elsewhere may be followed, but not shown in a frame. There are no WebSockets.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse pages of other origins and names that are not this server's (ASGI)."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            status, reason = self._refusal(scope["method"], Headers(scope=scope))
            if reason:
                await JSONResponse({"detail": reason}, status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str]:
        given = headers.getlist("host")
        host = given[0].lower() if len(given) == 1 else ""
        if not self._is_ours(host):
            known = ", ".join(self._hosts)
            return 400, f"this server is not called {', '.join(given)!r}; it is served as: {known}"
        for origin in headers.getlist("origin"):
            if origin.lower().partition("://")[2] != host:
                return 403, f"requests from pages of {origin} are refused: use the page of {host}"
        site = headers.get("sec-fetch-site", "none")
        followed = (
            method in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest", "document") == "document"  # not a frame
        )
        if site not in ("same-origin", "none") and not followed:
            return 403, f"requests from pages elsewhere are refused: use the page of {host}"
        return 200, ""

    def _is_ours(self, host: str) -> bool:
        parsed = _HOST.fullmatch(host)
        if parsed is None:
            return False
        name = parsed[1] or parsed[2]
        return name in self._hosts or (ANY_ADDRESS in self._hosts and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
