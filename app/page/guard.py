"""What may reach Gradio: the requests that the page's own scripts send, and nothing else.

Gradio answers many more than a page needs: jobs by other ways, addresses of other hosts,
recordings, editors. Those are closed here, jobs are checked (`app.page.jobs`), and uploads are
remembered with their visitor, who is known by a cookie.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.page.jobs import JobError, Jobs
from app.page.uploads import Uploads, is_visitor, new_visitor

_API = "/gradio_api"
_READ = {
    *("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
    *(f"{_API}/{name}" for name in ("app_id", "info", "queue/data", "upload_progress")),
}
_READ_BELOW = ("/assets/", "/static/", f"{_API}/heartbeat/")
_FILE, _UPLOAD = f"{_API}/file=", f"{_API}/upload"
_JOB, _JOB_BELOW = f"{_API}/queue/join", f"{_API}/run/"
_CALL_OFF = {f"{_API}/cancel", f"{_API}/reset"}
VISITOR_COOKIE = "gill-visitor"
_MAX_BYTES = 1_000_000
"""Of everything but an upload."""


class _RefusalError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


class PageGuard:
    """An ASGI application: `app`, which serves a page of Gradio, for the requests of that page.

    What is refused gets a status of 4xx and a line of JSON that says why.
    """

    def __init__(self, app: ASGIApp, jobs: Jobs, uploads: Uploads) -> None:
        self._app, self._jobs, self._uploads = app, jobs, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check what a request names, then hand it on (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._serve(scope, receive, send)
        except _RefusalError as error:
            await JSONResponse({"detail": str(error)}, error.status)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        name = HTTPConnection(scope).cookies.get(VISITOR_COOKIE, "")
        visitor = name if is_visitor(name) else new_visitor()
        if visitor != name and path in ("/", _UPLOAD):
            send = _with_headers(
                send, {"Set-Cookie": f"{VISITOR_COOKIE}={visitor}; Path=/; HttpOnly; SameSite=Lax"}
            )
        if method in ("GET", "HEAD") and path.startswith(_FILE):
            await self._file(scope, receive, send)
        elif method in ("GET", "HEAD") and (path in _READ or path.startswith(_READ_BELOW)):
            await self._app(scope, receive, send)
        elif method == "POST" and path == _UPLOAD:
            await self._upload(scope, receive, send, visitor)
        elif method == "POST" and (path == _JOB or path.startswith(_JOB_BELOW)):
            await self._job(scope, receive, send, visitor)
        elif method == "POST" and path in _CALL_OFF:
            await self._app(*_with_body(scope, receive, await _body(scope, receive)), send)
        else:
            raise _RefusalError(404, f"the page has no use for {method} {path}")

    async def _file(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._uploads.keep(scope["path"].removeprefix(_FILE)):
            raise _RefusalError(404, "the page has no such file")
        # What was uploaded may be a page or an SVG: opened by itself it must run nothing.
        tame = {"Content-Security-Policy": "sandbox", "X-Content-Type-Options": "nosniff"}
        await self._app(scope, receive, _with_headers(send, tame))

    async def _upload(self, scope: Scope, receive: Receive, send: Send, visitor: str) -> None:
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(message)

        headers = [one for one in scope["headers"] if one[0] != b"accept-encoding"]
        try:
            await self._app({**scope, "headers": headers}, receive, collect)
        except (TypeError, AttributeError, ValueError) as error:
            # How Gradio's reader takes a form that is none, or fields that are not files.
            reason = "not an upload: send multipart/form-data with files in the field `files`"
            raise _RefusalError(400, reason) from error
        status = messages[0]["status"]
        answer = b"".join(message.get("body", b"") for message in messages[1:])
        if status == 200:
            self._uploads.note(visitor, json.loads(answer))
        elif Headers(raw=messages[0]["headers"])["content-type"] != "application/json":
            raise _RefusalError(status, answer.decode(errors="replace"))
        for message in messages:
            await send(message)

    async def _job(self, scope: Scope, receive: Receive, send: Send, visitor: str) -> None:
        def uploaded(path: str) -> bool:
            return self._uploads.are_of(visitor, path)

        body = await _body(scope, receive)
        try:
            body = self._jobs.checked(body, uploaded, self._uploads.keep)
        except JobError as error:
            raise _RefusalError(400, str(error)) from error
        await self._app(*_with_body(scope, receive, body), send)


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The whole JSON body."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _RefusalError(415, "the content type must be application/json")
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BYTES:
            raise _RefusalError(413, f"the request has more than {_MAX_BYTES} bytes")
        more = message.get("more_body", False)
    return body


def _with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """The request with another body."""
    given = False

    async def read() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    about = (b"content-length", b"transfer-encoding")
    headers = [one for one in scope["headers"] if one[0] not in about]
    headers.append((b"content-length", str(len(body)).encode()))
    return {**scope, "headers": headers}, read


def _with_headers(send: Send, more: dict[str, str]) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in more.items():
                headers.append(name, value)
        await send(message)

    return sending
