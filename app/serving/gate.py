"""In front of the service: the key, the places, and that requests arrive whole and in time."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.serving.job import Job
from app.serving.request_errors import CLIENT_LEFT, RequestError, busy, error_response

if TYPE_CHECKING:
    from app.serving.answering_service import AnsweringService

_OPEN = ("/health", "/healthz", "/readyz", "/v1/pictures/")


class Gate:
    """An ASGI application: `app`, for requests that may enter.

    A request for an answer holds one of the service's places and, in its scope, its jobs
    (`gill.jobs`); however it ends, the place is given back and the jobs are cancelled.
    """

    def __init__(self, app: ASGIApp, service: AnsweringService, api_key: str | None) -> None:
        self._app, self.service = app, service
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in, or refuse, by key, size, line and pace (ASGI)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._may_enter(scope):
            error = RequestError(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
        elif scope["method"] == "POST":
            await self._with_place(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self._app(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        if self._key is None or scope["path"].startswith(_OPEN):
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    async def _with_place(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, began = self.service, time.monotonic()
        status = CLIENT_LEFT
        jobs: list[Job] = []

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if service.places == 0:
                error = busy(service.worker.retry_after())
                await error_response(error)(scope, receive, noting)
                return
            service.places -= 1
            try:
                body = await self._body(scope, receive)
                await self._app({**scope, "gill.jobs": jobs}, _replay(body, receive), noting)
            except RequestError as error:
                await error_response(error)(scope, receive, noting)
            finally:
                service.places += 1
                for job in jobs:
                    job.cancel()
        finally:
            service.metrics.requests.labels(str(status)).inc()
            service.metrics.seconds.observe(time.monotonic() - began)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        settings = self.service.settings
        largest = settings.limits.max_body_bytes
        body, too_long, more = bytearray(), False, True
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("the client has left", status=CLIENT_LEFT)
                    part, more = message.get("body", b""), message.get("more_body", False)
                    # Read on without keeping it: a client hears nothing while it sends.
                    too_long |= len(body) + len(part) > largest
                    if too_long:
                        body.clear()
                    else:
                        body += part
        except TimeoutError:
            reason = "the request did not arrive in time"
            raise RequestError(reason, status=408, headers={"Connection": "close"}) from None
        if too_long:
            raise RequestError(f"the request has more than {largest} bytes", status=413)
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError("the content type must be application/json", status=415)
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What was received, and then what comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head
