"""The service over a model that is told what to do: what its tests have in common."""

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

import app.serving.worker
from app.serving.service import create_app
from app.serving.settings import ServiceSettings
from gill.loading import Gill
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import (
    ContextLengthError,
    Ended,
    GeneratedImage,
    PictureProgress,
    ReplySettings,
    RetrievedImage,
    Started,
    Text,
)
from tests.told_batches import batches_of

CHAT = "/v1/chat/completions"


class Director:
    """Stands in for the model: says back what it was told, with pictures where they are wanted.

    A turn with the word `hold` goes on only when `go` is set or it is cancelled, one with `stuck`
    only when `go` is set; one with `crash` fails. `batches` lists how many turns were answered
    together, `turns` these.
    """

    def __init__(self) -> None:
        self.go = threading.Event()
        self.holding = threading.Semaphore(0)
        self.batches: list[int] = []
        self.turns: list[Any] = []

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch) -> "Director":
        """One who answers for every worker."""
        director = cls()
        monkeypatch.setattr(app.serving.worker, "Batch", batches_of(director.stream_together))
        return director

    def stream_together(self, turns: list[Any]) -> Iterator[tuple[int, Any]]:
        self.batches.append(len(turns))
        self.turns += turns
        if any("crash" in turn.words for turn in turns):
            raise RuntimeError("told to")
        for index, turn in enumerate(turns):
            yield index, Started(len(turn.words.split()) + 4 * turn.pictures, 0)
        for index, turn in enumerate(turns):
            if "hold" in turn.words:
                self.holding.release()
                while not (self.go.wait(0.02) or turn.cancelled()):
                    pass
            if "stuck" in turn.words:
                self.holding.release()
                self.go.wait(30)
            words = turn.words.split()[: turn.settings.decoding.max_tokens]
            for word in words:
                yield index, Text(f" {word}")
            if turn.settings.want == "generate":
                for number in range(turn.settings.decoding.max_images):
                    for step in (1, 2):
                        yield index, PictureProgress(step, 2)
                    seed = turn.settings.seed + number
                    yield index, GeneratedImage(picture_of("red"), seed, 2, 2.5)
            if turn.settings.want == "retrieve":
                yield index, RetrievedImage(picture_of("blue"), 7, 0.5, "b.png", "blue", 0.25)
            yield index, Ended("cancelled" if turn.cancelled() else "stop", len(words))

    def settings_of(self, client: Any, asked: dict[str, Any]) -> Any:
        """How a request is answered."""
        answer = client.post(json=asked)
        assert answer.status_code == 200, answer.text
        return self.turns[-1].settings

    @property
    def gill(self) -> Any:
        speaker = object()

        class Talk:
            def __init__(self, prefixes: Any = None, *, system_prompt: Any = None) -> None:
                self.speaker, self.shown, self.told = speaker, [], []

            def recall(self, exchange: Any) -> None:
                self.told += exchange

            def prepare(self, turn: Any, settings: Any, *, cancelled: Any) -> Any:
                parts = [*self.told, *turn]
                words = " ".join(part for part in parts if isinstance(part, str))
                if "too-long" in words:
                    raise ContextLengthError("the turn takes 999 positions: shorten the turn")
                pictures = sum(not isinstance(part, str) for part in parts)
                return SimpleNamespace(
                    words=words,
                    pictures=pictures,
                    settings=settings,
                    cancelled=cancelled,
                    shown=self.shown,
                )

        return SimpleNamespace(
            conversation=Talk,
            language_model=SimpleNamespace(turns=None),
            reply_settings=ReplySettings(),
            settings=partial(
                Gill.settings, SimpleNamespace(generation=FEW, reply_settings=ReplySettings())
            ),
            encoder=SimpleNamespace(encode_pictures=lambda found: torch.zeros(len(found), 3)),
            generator=SimpleNamespace(picture_size=(4, 4)),
            index=range(100),
        )


FEW = GenerationSettings(steps=2, guidance=2.5)


def picture_of(color: str) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def uri_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def body_of(*content: Any, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return {"model": "gill", "messages": [{"role": "user", "content": parts}], **fields}


class Server:
    """An application on a free port of this machine."""

    def __init__(self, application: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = uvicorn.Config(
            application,
            port=self.port,
            log_level="error",
            timeout_graceful_shutdown=1,
            # On a busy machine a round can outlast the default: a kept connection would be closed
            # at the moment in which a client uses it again.
            timeout_keep_alive=120,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


def until(condition: Any, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextmanager
def serving(gill: Any, key: str | None = None, **settings: Any) -> Iterator[Any]:
    application: Any = create_app(gill, ServiceSettings(**settings), api_key=key)
    server = Server(application)
    try:
        yield SimpleNamespace(url=server.url, service=application.service, port=server.port)
    finally:
        server.stop()


def openai(url: str, key: str = "unused") -> Any:
    openai = pytest.importorskip("openai", reason="the client library is not installed")
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@contextmanager
def inside(director: Any, **settings: Any) -> Iterator[Any]:
    """A client without a socket: the fuzzing is fast."""
    gill = director.gill if isinstance(director, Director) else director
    application: Any = create_app(gill, ServiceSettings(**settings))
    transport = httpx.ASGITransport(application, raise_app_exceptions=True)

    class Client:
        service = application.service

        def post(self, **given: Any) -> httpx.Response:
            return self.request("POST", CHAT, **given)

        def request(self, method: str, path: str, **given: Any) -> httpx.Response:
            async def ask() -> httpx.Response:
                url = "http://localhost"
                async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                    return await client.request(method, path, **given)

            return asyncio.run(ask())

    yield Client()
    application.service.worker.close()
