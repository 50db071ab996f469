"""The HTTP service: text and pictures in and out, in the shapes that OpenAI's clients know.

    POST /v1/chat/completions    an answer at once, or as server-sent events
    POST /v1/responses           the same in the shape of responses
    POST /v1/images/generations  pictures of a prompt
    GET  /v1/models[/NAME]       the one model
    GET  /v1/pictures/NAME.png   a picture of an answer, for a while
    GET  /health, /readyz        is it alive, will it answer
    GET  /metrics                for Prometheus
    GET  /openapi.json           all of this for programs

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "a red ring."}]}'

What comes in is limited before it is kept: places for requests, bytes, pictures, pixels, letters.
A request that has no place gets 429 and a Retry-After.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from app.listening import address_of, run
from app.same_origin import LOOPBACK
from app.serving.answering_service import AnsweringService
from app.serving.chat_answers import ChatAnswer
from app.serving.chat_requests import ChatRequest
from app.serving.gate import Gate
from app.serving.image_generations import ImageRequest, pictures_of
from app.serving.request_errors import ErrorBody, Json, RequestError, error_response, invalid
from app.serving.responses_answers import ResponseAnswer
from app.serving.responses_requests import ResponseRequest
from app.serving.settings import ServiceSettings
from gill.loading import Gill
from pipeline.devices import quieten_libraries

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused."},
    "5XX": {"model": ErrorBody, "description": "There is no answer, or it came too late."},
}
_JSON = {"content": {"application/json": {"schema": {"type": "object"}}}}
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_STREAMED = {"content": {**_JSON["content"], "text/event-stream": {"schema": _EVENT}}}


def serve(
    artifacts: str | Path,
    listening: socket.socket,
    *,
    api_key: str | None = None,
    settings: ServiceSettings | None = None,
) -> None:
    """Load the model and serve until interrupted or terminated; raises what `Gill.load` raises."""
    settings = settings or ServiceSettings()
    quieten_libraries()
    app = create_app(Gill.load(artifacts), settings, api_key=api_key)
    print(f"listening on {address_of(listening)}/v1/chat/completions", flush=True)
    # Whatever was accepted has its answer, or a word that there is none, within its time.
    grace = settings.timeout_s + settings.body_timeout_s + 2
    run(app, listening, header_timeout_s=settings.header_timeout_s, grace_s=grace)


def create_app(gill: Gill, settings: ServiceSettings, *, api_key: str | None = None) -> ASGIApp:
    """The service as an ASGI application.

    Without a key only requests to a loopback host name are answered, so that a web page elsewhere
    cannot reach the service through the browser of somebody who runs it.
    """
    service = AnsweringService(gill, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="GILL", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_answers(app, service)
    _add_facts(app, service)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused_route)
    if api_key is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    gate = Gate(app, service, api_key)
    if not settings.allowed_origins:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )


def _add_answers(app: FastAPI, service: AnsweringService) -> None:
    limits = service.settings.limits

    @app.post("/v1/chat/completions", responses={200: _STREAMED, **_ERRORS})
    async def complete_chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        service.check(asked)
        settings = asked.reply_settings(service.gill, limits)
        answers = await service.ask(request, asked.exchanges(), [settings], asked.rows())
        names = service.names(request, asked)
        chat = ChatAnswer(asked, service.settings.model, answers[0], names)
        events = chat.events if asked.stream else None
        return await service.respond(request, answers, chat.whole, events)

    @app.post("/v1/responses", responses={200: _STREAMED, **_ERRORS})
    async def create_response(request: Request, asked: ResponseRequest) -> Response:
        """Answer a conversation, told in items."""
        service.check(asked)
        settings = asked.reply_settings(service.gill, limits)
        answers = await service.ask(request, asked.exchanges(), [settings], asked.rows())
        told = ResponseAnswer(asked, service.settings.model, answers[0])
        events = told.events if asked.stream else None
        return await service.respond(request, answers, told.whole, events)

    @app.post("/v1/images/generations", responses={200: _JSON, **_ERRORS})
    async def generate_images(request: Request, asked: ImageRequest) -> Response:
        """Make pictures of a prompt."""
        service.check(asked)
        settings = asked.reply_settings(service.gill, limits)
        answers = await service.ask(request, [[asked.prompt]], settings)
        names = service.names(request, asked.model_copy(update={"pictures": "url"}))
        return await service.respond(request, answers, lambda: pictures_of(asked, answers, names))


def _add_facts(app: FastAPI, service: AnsweringService) -> None:
    settings = service.settings
    model = {"id": settings.model, "object": "model", "created": 0, "owned_by": "gill"}

    @app.get("/v1/models", responses={200: _JSON, **_ERRORS})
    async def list_models() -> Response:
        """The one model."""
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", responses={200: _JSON, **_ERRORS})
    async def retrieve_model(name: str) -> Response:
        """The one model, by its name."""
        if name != settings.model:
            reason = f"no model {name!r}; the model here is {settings.model!r}"
            raise RequestError(reason, param="model", status=404, code="model_not_found")
        return Json(model)

    @app.get(
        "/v1/pictures/{name}.png",
        response_class=Response,
        responses={200: {"content": {"image/png": {"schema": {"type": "string"}}}}, **_ERRORS},
    )
    async def show_picture(name: str) -> Response:
        """A picture of an answer, while its name is good."""
        data = service.kept.get(name)
        if data is None:
            raise RequestError("there is no such picture, or its name has expired", status=404)
        headers = {"Cache-Control": "private, max-age=600", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="image/png", headers=headers)

    @app.get("/health", responses={200: _JSON, **_ERRORS})
    @app.get("/healthz", include_in_schema=False)
    async def tell_health() -> Response:
        """The process answers."""
        return Json({"status": "ok"})

    @app.get("/readyz", responses={200: _JSON, 503: _JSON, **_ERRORS})
    async def tell_readiness() -> Response:
        """The model is loaded and its threads run."""
        if not service.worker.alive:
            return Json({"status": "stopping"}, status_code=503)
        return Json({"status": "ready", "waiting": service.worker.num_waiting})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_ERRORS},
    )
    async def show_metrics() -> Response:
        """The counters as text."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.page(), media_type=kind)


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = invalid(error)
    assert isinstance(error, RequestError)
    return error_response(error)


async def _refused_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        headers["Allow"] = ", ".join(
            [*(["HEAD"] if allowed == "GET" else []), *filter(None, [allowed]), "OPTIONS"]
        )
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    reason = str(error.detail)
    return error_response(RequestError(reason, status=error.status_code, headers=headers))
