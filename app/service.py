"""The HTTP service: chat completions in OpenAI's shape, with pictures in and out.

    POST /v1/chat/completions    an answer at once, or as server-sent events
    GET  /v1/models              the one model
    GET  /v1/pictures/NAME.png   a picture of an answer, for a while
    GET  /healthz, /readyz       is it alive, will it answer
    GET  /metrics                for Prometheus

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "gill", "messages": [{"role": "user", "content": "a red ring."}]}'

What comes in is limited before it is kept: places for requests, bytes, pictures, pixels, letters.
A request that has no place gets 429 and a Retry-After. Nothing that a client sends is fetched or
unpickled, unless the operator allows its host (`remote`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import messages
from app.encoded_pictures import as_png, data_uri
from app.job import Failed, Job
from app.kept_pictures import KeptPictures
from app.messages import ChatRequest, RequestError, RequestLimits
from app.service_metrics import ServiceMetrics
from app.worker import BusyError, Worker
from gill.loading import Gill
from gill_errors import GillError, InputError
from pipeline.talking.answers import (
    Ended,
    Event,
    GeneratedImage,
    PictureProgress,
    RetrievedImage,
    Started,
    Text,
)
from pipeline.talking.remote_pictures import RemotePictureSettings

_log = logging.getLogger(__name__)

_CHAT = "/v1/chat/completions"
_OPEN = ("/healthz", "/readyz", "/v1/pictures/")
_CLIENT_LEFT = 499
"""Nobody reads it; it is for the metrics (nginx's number)."""


class ServiceSettings(BaseModel):
    """How much the service takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("gill", description="the name that requests must give")
    max_requests: int = Field(
        48, ge=1, description="requests that are read, wait or are answered at one time"
    )
    max_waiting: int = Field(32, ge=1, description="requests in line")
    max_batch: int = Field(8, ge=1, description="requests answered together")
    timeout_s: float = Field(120.0, gt=0, description="seconds for a request, the line included")
    body_timeout_s: float = Field(15.0, gt=0, description="seconds for a request to arrive")
    picture_seconds: float = Field(600.0, gt=0, description="how long returned names are good")
    picture_bytes: int = Field(200_000_000, ge=1, description="bytes of all pictures kept so")
    limits: RequestLimits = RequestLimits()
    remote: RemotePictureSettings = RemotePictureSettings()


def serve(
    artifacts: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    settings: ServiceSettings | None = None,
) -> None:
    """Load the model and serve until interrupted.

    Raises InputError where the address is reachable from elsewhere and there is no API key, and
    what `Gill.load` raises.
    """
    if not is_loopback(host) and not api_key:
        raise InputError(
            f"{host} can be reached from other machines: give an API key, or bind to 127.0.0.1"
        )
    gill = Gill.load(artifacts)
    app = create_app(gill, settings or ServiceSettings(), api_key=api_key)
    print(f"listening on http://{host}:{port}{_CHAT}", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_app(gill: Gill, settings: ServiceSettings, *, api_key: str | None = None) -> ASGIApp:
    """The service as an ASGI application.

    Without a key only requests to a loopback host name are answered, so that a web page elsewhere
    cannot reach the service through the browser of somebody who runs it.
    """
    service = Service(gill, settings)
    app = FastAPI(
        title="GILL", docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.lifespan
    )
    app.state.service = service
    app.add_api_route(_CHAT, service.chat, methods=["POST"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/pictures/{name}.png", service.picture, methods=["GET"])
    app.add_api_route("/healthz", service.health, methods=["GET"])
    app.add_api_route("/readyz", service.ready, methods=["GET"])
    app.add_api_route("/metrics", service.show_metrics, methods=["GET"])
    app.add_exception_handler(HTTPException, _refused_route)
    if api_key is None:
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"]
        )
    return _Gate(app, service, api_key)


class Service:
    """The addresses, over one model and one worker."""

    def __init__(self, gill: Gill, settings: ServiceSettings) -> None:
        self.gill, self.settings = gill, settings
        self.metrics = ServiceMetrics()
        self.worker = Worker(settings.max_waiting, settings.max_batch, self.metrics.on_batch)
        self.metrics.watch(self.worker)
        self.kept = KeptPictures(settings.picture_seconds, settings.picture_bytes)
        self.places = settings.max_requests
        # Decoding is bounded by this, whatever the number of requests.
        self._checking = asyncio.Semaphore(2)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Ends the worker with the service."""
        yield
        await asyncio.to_thread(self.worker.close)

    async def health(self) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """The model is loaded and its thread runs."""
        if not self.worker.alive:
            return JSONResponse({"status": "stopping"}, status_code=503)
        return JSONResponse({"status": "ready", "waiting": self.worker.num_waiting})

    async def show_metrics(self) -> Response:
        """The counters as text."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """The one model."""
        one = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "gill"}
        return JSONResponse({"object": "list", "data": [one]})

    async def picture(self, name: str) -> Response:
        """A picture of an answer, while its name is good."""
        data = self.kept.get(name)
        if data is None:
            raise HTTPException(404, "there is no such picture, or its name has expired")
        headers = {"Cache-Control": "private, max-age=600", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="image/png", headers=headers)

    async def chat(self, request: Request) -> Response:
        """Answer the conversation in the body."""
        try:
            return await self._answer(request, _parse(await self._body(request)))
        except RequestError as error:
            return _error(error.status, str(error), error.param)
        except BusyError as error:
            return _busy(error.retry_after)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError("the content type must be application/json", status=415)
        largest = self.settings.limits.max_body_bytes
        body = bytearray()
        too_long = False
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for part in request.stream():
                    # Read on without keeping it: a client hears nothing while it sends.
                    too_long |= len(body) + len(part) > largest
                    if too_long:
                        body.clear()
                    else:
                        body += part
        except TimeoutError:
            raise RequestError("the request did not arrive in time", status=408) from None
        if too_long:
            raise RequestError(f"the request has more than {largest} bytes", status=413)
        return bytes(body)

    async def _answer(self, request: Request, asked: ChatRequest) -> Response:
        settings = self.settings
        if asked.model != settings.model:
            known = f"the model here is {settings.model!r}"
            raise RequestError(f"no model {asked.model!r}; {known}", param="model", status=404)
        try:
            wanted = self.gill.settings(None, **asked.knobs())
        except (GillError, TypeError) as error:
            raise RequestError(str(error), param="gill") from error
        messages.check_settings(wanted, settings.limits)
        async with self._checking:
            turn = await asyncio.to_thread(
                messages.read_turn, asked.messages, settings.limits, settings.remote
            )
        answer = _Answer(self, asked, str(request.base_url))
        job = Job(
            self.gill.conversation(),
            lambda: messages.decode_turn(turn),
            wanted,
            answer.listen,
            deadline=time.monotonic() + settings.timeout_s,
        )
        request.scope["gill.jobs"].append(job)
        del asked  # the pictures as text; `turn` has their bytes
        self.worker.submit(job)
        watch = asyncio.create_task(_tell_when_gone(request.receive, answer))
        try:
            first = await answer.next()
            if isinstance(first, Failed):
                return answer.failed(first, started=False)
            if not answer.streams:
                return await answer.whole()
        finally:
            watch.cancel()
        return StreamingResponse(
            answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


class _Answer:
    """The way from the worker's events to one client."""

    def __init__(self, service: Service, asked: ChatRequest, base_url: str) -> None:
        self.streams = bool(asked.stream)
        self._with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        self._as_names = asked.pictures == "url"
        self._service, self._base_url = service, base_url
        self._name = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._began = time.monotonic()
        self._deadline = self._began + service.settings.timeout_s
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Failed] = asyncio.Queue()
        self._prompt_tokens = 0
        self._said = self._ended = False

    def listen(self, event: Event | Failed) -> None:
        """Called by the worker's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def gone(self) -> None:
        """The client has left."""
        self._events.put_nowait(Failed("left", "the client has left"))

    async def next(self) -> Event | Failed:
        """The next event; a little after the deadline, that it is over."""
        try:
            async with asyncio.timeout(max(self._deadline + 1 - time.monotonic(), 0)):
                event = await self._events.get()
        except TimeoutError:
            event = Failed("late", "the answer took too long")
        if isinstance(event, Started):
            self._prompt_tokens = event.prompt_tokens
        self._count(event)
        return event

    async def whole(self) -> Response:
        """Everything in one JSON object."""
        parts: list[dict[str, Any]] = []
        while True:
            event = await self.next()
            if isinstance(event, Text) and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += event.text
            elif isinstance(event, Text):
                parts.append(messages.text_part(event.text))
            elif isinstance(event, RetrievedImage | GeneratedImage):
                parts.append(await self._picture(event))
            elif isinstance(event, Ended):
                model, reason = self._service.settings.model, messages.finish_reason(event.reason)
                used = messages.usage(self._prompt_tokens, event.tokens)
                return JSONResponse(messages.completion(self._name, model, parts, reason, used))
            elif isinstance(event, Failed):
                return self.failed(event, started=True)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: pieces as they come, denoising steps as comments."""
        try:
            async for data in self._pieces():
                yield data
        finally:
            if not self._ended:
                self._count(Failed("left", ""))

    async def _pieces(self) -> AsyncIterator[str]:
        yield self._chunk({"role": "assistant", "content": ""})
        while True:
            event = await self.next()
            if isinstance(event, Text):
                yield self._chunk({"content": event.text})
            elif isinstance(event, RetrievedImage | GeneratedImage):
                yield self._chunk({"parts": [await self._picture(event)]})
            elif isinstance(event, PictureProgress):
                yield f": step {event.step} of {event.steps}\n\n"
            elif isinstance(event, Ended):
                yield self._chunk({}, messages.finish_reason(event.reason))
                if self._with_usage:
                    last = messages.chunk(
                        self._name, self._service.settings.model, self._created, {}
                    )
                    used = messages.usage(self._prompt_tokens, event.tokens)
                    yield f"data: {json.dumps({**last, 'choices': [], 'usage': used})}\n\n"
                yield "data: [DONE]\n\n"
                return
            elif isinstance(event, Failed):
                yield f"data: {json.dumps(_error_body(event.reason, 'server_error'))}\n\n"
                return

    def failed(self, failure: Failed, *, started: bool) -> Response:
        """The response to an answer that came to nothing."""
        match failure.stop:
            case "refused":
                return _error(400, failure.reason)
            case "left":
                return Response(status_code=_CLIENT_LEFT)
            case "late" if not started:
                return _busy(self._service.worker.retry_after())
            case "late":
                return _error(504, failure.reason)
        return _error(500, failure.reason)

    async def _picture(self, event: RetrievedImage | GeneratedImage) -> dict[str, Any]:
        data = await asyncio.to_thread(as_png, event.picture)
        if self._as_names:
            url = f"{self._base_url}v1/pictures/{self._service.kept.keep(data)}.png"
        else:
            url = data_uri(data, "png")
        return messages.picture_part(event, url)

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        model = self._service.settings.model
        chunk = messages.chunk(self._name, model, self._created, delta, reason)
        return f"data: {json.dumps(chunk)}\n\n"

    def _count(self, event: Event | Failed) -> None:
        metrics = self._service.metrics
        self._ended |= isinstance(event, Ended | Failed)
        if isinstance(event, Text | RetrievedImage | GeneratedImage) and not self._said:
            self._said = True
            metrics.first_piece.observe(time.monotonic() - self._began)
        if isinstance(event, RetrievedImage):
            metrics.pictures.labels("retrieved").inc()
        elif isinstance(event, GeneratedImage):
            metrics.pictures.labels("generated").inc()
        elif isinstance(event, Started):
            metrics.tokens.labels("read").inc(event.prompt_tokens)
        elif isinstance(event, Ended):
            metrics.tokens.labels("said").inc(event.tokens)
            metrics.ended.labels(event.reason).inc()
        elif isinstance(event, Failed):
            metrics.ended.labels(event.stop).inc()


class _Gate:
    """In front of everything: the key, the places, and that what a request holds is given back."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None) -> None:
        self._app, self._service = app, service
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if self._key is not None and not scope["path"].startswith(_OPEN):
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                response = _error(401, "a valid API key is needed: Authorization: Bearer KEY")
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        if scope["path"] == _CHAT and scope["method"] == "POST":
            await self._with_place(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _with_place(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, began = self._service, time.monotonic()
        status = _CLIENT_LEFT
        jobs: list[Job] = []

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if service.places == 0:
                await _busy(service.worker.retry_after())(scope, receive, noting)
                return
            service.places -= 1
            try:
                await self._app({**scope, "gill.jobs": jobs}, receive, noting)
            finally:
                service.places += 1
                for job in jobs:
                    job.cancel()
        finally:
            service.metrics.requests.labels(str(status)).inc()
            service.metrics.seconds.observe(time.monotonic() - began)


def _parse(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = max(errors, key=lambda one: len(one["loc"]))  # of alternatives the one that got far
        place = ".".join(str(step) for step in first["loc"]) or "the body"
        reason = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(f"{place}: {reason}", param=place) from error


async def _tell_when_gone(receive: Callable[[], Awaitable[Message]], answer: _Answer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.gone()


def _error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(_error_body(message, kind, param), status_code=status)


def _busy(retry_after: int) -> JSONResponse:
    reason = f"too many requests: try again in {retry_after} s"
    return JSONResponse(
        _error_body(reason, "rate_limit_error"),
        status_code=429,
        headers={"Retry-After": str(retry_after)},
    )


async def _refused_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))
