"""What the service makes of requests as other services' clients write them."""

import asyncio
import base64
import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra `app`: pip install .[app]")

from app.serving.chat_answers import finish_reason
from app.serving.data_uris import decode_data_uri
from app.serving.service import create_app
from app.serving.settings import RequestLimits, ServiceSettings
from pipeline.talking.answers import Ended
from pipeline.talking.remote_pictures import RemotePictureSettings
from tests.told_service import (
    CHAT,
    Director,
    body_of,
    image_part,
    inside,
    picture_of,
    serving,
    uri_of,
)

GREEN = uri_of(Image.new("RGB", (4, 4), "green"))


@pytest.fixture
def director(monkeypatch: pytest.MonkeyPatch) -> Director:
    return Director.installed(monkeypatch)


@pytest.fixture
def client(director: Director) -> Iterator[Any]:
    with inside(director) as client:
        yield client


def message(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def as_people_make_them(content: bytes) -> list[str]:
    plain = base64.b64encode(content).decode()
    lines = "\r\n".join(plain[i : i + 60] for i in range(0, len(plain), 60))
    return [
        f"data:image/png;base64,{plain}",
        f"data:image/png;base64,{lines}\n",
        f"data:image/png;base64,{plain.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(content).decode()}",
        f"data:image/png;base64,{quote(plain, safe='')}",
        f"data:image/png;charset=utf-8;name=a.png;base64,{plain}",
        f"DATA:IMAGE/PNG;BASE64,{plain}",
        f"data:;base64,{plain}",
        f"data:image/png;base64, {plain}",
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 200])
def test_data_uris_are_read_as_people_make_them(length: int) -> None:
    content = bytes([251, 255, 190, 62, 63] * 40)[:length]  # + and / in base64
    for uri in as_people_make_them(content):
        assert decode_data_uri(uri) == content, uri
    for uri in (
        "data:image/png,abc",
        "data:image/png;base64",
        "data:;base64,a",
        "data:;base64,a*bc",
    ):
        with pytest.raises(ValueError, match=r"base64|must read"):
            decode_data_uri(uri)


def test_pictures_in_all_these_forms_are_shown(client: Any) -> None:
    png = base64.b64decode(GREEN.partition(",")[2])
    for uri in as_people_make_them(png):
        for part in (image_part(uri), {"type": "image_url", "image_url": uri}):
            answer = client.post(json=body_of("a", part))
            assert answer.json()["usage"]["prompt_tokens"] == 1 + 4, uri


def test_unknown_fields_and_nulls_are_ignored_counted_and_named(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = body_of(
        "a red ring", image_part(GREEN), user="me", logit_bias={"5": 1}, verbosity="low"
    )
    asked["messages"][0]["content"][1]["image_url"]["detail"] = "high"
    nulls = ("stop", "seed", "gill", "n", "tools", "temperature", "stream_options", "modalities")
    asked |= dict.fromkeys([*nulls, "response_format", "max_tokens", "pictures", "model"])
    asked["tools"] = [{"type": "function", "function": {"name": "f"}}]
    for _ in range(2):
        assert message(client.post(json=asked))["content"] == " a red ring"
    told = {record.args[0] for record in caplog.records if record.name == "app.serving.requests"}
    assert told == {"user", "logit_bias", "verbosity", "tools", "messages.content.image_url.detail"}
    assert len([r for r in caplog.records if r.name == "app.serving.requests"]) == 5, "each once"
    counted = client.request("GET", "/metrics").text
    assert "gill_ignored_fields_total 10.0" in counted


def test_modalities_say_what_an_answer_is_made_of(client: Any, director: Director) -> None:
    knobs = director.settings_of(client, body_of("a", modalities=["text"]))
    assert knobs.want == "text"
    knobs = director.settings_of(client, body_of("a", modalities=["image"]))
    assert (knobs.want, knobs.decoding.image_bias) == ("auto", 1e4)
    knobs = director.settings_of(client, body_of("a", modalities=["text", "image"]))
    assert (knobs.want, knobs.decoding.image_bias) == ("auto", 0)
    asked = body_of("a red ring", modalities=["image"], gill={"want": "generate"})
    shown = message(client.post(json=asked))
    assert shown["content"] == ""
    assert [part["type"] for part in shown["parts"]] == ["image_url"]
    streamed = client.post(json={**asked, "stream": True}).text
    assert '"content": " a"' not in streamed
    assert '"images"' in streamed


def test_how_to_answer_is_taken_from_the_usual_fields(client: Any, director: Director) -> None:
    knobs = director.settings_of(
        client,
        body_of(
            "a", stop="end", top_k=5, repetition_penalty=1.5, presence_penalty=0.5, seed=9,
            frequency_penalty=-0.5, max_completion_tokens=7, max_tokens=100_000, top_p=0.5,
        ),
    )  # fmt: skip
    decoding = knobs.decoding
    assert (decoding.stop, decoding.top_k, decoding.repetition_penalty) == (("end",), 5, 1.5)
    assert (decoding.presence_penalty, decoding.frequency_penalty) == (0.5, -0.5)
    assert (decoding.max_tokens, decoding.top_p, knobs.seed) == (7, 0.5, 9)
    knobs = director.settings_of(client, body_of("a", max_tokens=10**9, stop=["a", "b"], top_k=-1))
    assert (knobs.decoding.max_tokens, knobs.decoding.top_k) == (RequestLimits().max_tokens, None)
    assert knobs.decoding.stop == ("a", "b")
    knobs = director.settings_of(client, body_of("a", gill={"max_tokens": 9, "stop": ["x"]}))
    assert (knobs.decoding.max_tokens, knobs.decoding.stop) == (9, ("x",))


def test_an_answer_may_end_with_its_picture() -> None:
    told = {reason: finish_reason(Ended(reason, 1)) for reason in ("stop", "max_images")}  # type: ignore[arg-type]
    assert set(told.values()) == {"stop"}
    cut = {finish_reason(Ended(reason, 1)) for reason in ("max_tokens", "max_positions")}  # type: ignore[arg-type]
    assert cut == {"length"}


def test_a_history_beyond_the_limits_is_forgotten_oldest_first(director: Director) -> None:
    def talk(*turns: Any) -> list[Any]:
        said = []
        for turn in turns:
            said += [{"role": "user", "content": turn}, {"role": "assistant", "content": "ok"}]
        return said[:-1]

    shown = [[{"type": "text", "text": f"t{i}"}, image_part(GREEN)] for i in range(6)]
    limits = RequestLimits(max_pictures=3, max_characters=100)
    with inside(director, limits=limits) as client:
        answer = client.post(json={"messages": talk(*shown)}).json()
        assert answer["choices"][0]["message"]["content"] == " t3 ok t4 ok t5"
        assert answer["usage"]["forgotten_exchanges"] == 3
        answer = client.post(json={"messages": talk(*["x" * 40] * 500, "last")}).json()
        assert answer["choices"][0]["message"]["content"].count("x" * 40) == 2
        assert answer["usage"]["forgotten_exchanges"] == 498
    large = [image_part(uri_of(Image.new("1", (4000, 4000))))]
    limits = RequestLimits(max_pixels=20_000_000)
    with inside(director, limits=limits) as client:
        answer = client.post(json={"messages": talk(large, large, large)}).json()
        assert answer["usage"]["forgotten_exchanges"] == 2


def test_pictures_that_were_shown_are_not_shown_again(client: Any, director: Director) -> None:
    asked = body_of("a", gill={"want": "retrieve"})["messages"]
    first = message(client.post(json={"messages": asked, "gill": {"want": "retrieve"}}))
    for kept in ("parts", "images"):
        answer = {name: first[name] for name in ("role", "content", kept)}
        history = [*asked, answer, *body_of("b")["messages"]]
        client.post(json={"messages": history})
        assert director.turns[-1].shown == [7]
        assert director.turns[-1].pictures == 0, "of an answer its words are read"
    odd = {**first, "parts": [{**first["parts"][1], "gill": {"row": row}} for row in (-1, 10**9)]}
    client.post(json={"messages": [*asked, odd, *asked]})
    assert director.turns[-1].shown == [7]


def test_the_same_picture_is_decoded_and_encoded_once(director: Director) -> None:
    gill, encoded = director.gill, []
    encode = gill.encoder.encode_pictures
    gill.encoder.encode_pictures = lambda found: encoded.append(len(found)) or encode(found)
    with inside(gill) as client:
        for words in ("a", "b"):
            answer = client.post(json=body_of(words, image_part(GREEN), image_part(GREEN)))
            assert answer.json()["usage"]["prompt_tokens"] == 1 + 2 * 4
        client.post(json=body_of("c", image_part(uri_of(picture_of("red"))), image_part(GREEN)))
    assert encoded == [1, 1]


def test_methods_beyond_post_and_get(client: Any) -> None:
    head = client.request("HEAD", "/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(client.request("GET", "/v1/models").content)
    for path, allowed in [(CHAT, "POST, OPTIONS"), ("/v1/models", "HEAD, GET, OPTIONS")]:
        refused = client.request("PUT", path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        options = client.request("OPTIONS", path)
        assert (options.status_code, options.headers["allow"]) == (204, allowed)
    assert client.request("GET", "/health").json() == {"status": "ok"}
    assert client.request("GET", "/v1/models/gill").json()["id"] == "gill"
    assert client.request("GET", "/v1/models/else").json()["error"]["code"] == "model_not_found"
    assert client.request("POST", "/v1/nothing", json={}).status_code == 404
    schema = client.request("GET", "/openapi.json").json()
    knobs = schema["components"]["schemas"]["Knobs"]["properties"]
    assert knobs["steps"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert {"want", "top_k"} <= knobs.keys()
    assert not {"batch_size", "cpu_offload", "attention_slicing", "preview_every"} & knobs.keys()


def test_pages_elsewhere_may_call_where_the_operator_says_so(director: Director) -> None:
    ours = {"Origin": "https://ours.example", "Access-Control-Request-Method": "POST"}
    with inside(director) as client:
        answer = client.request("OPTIONS", CHAT, headers=ours)
        assert "access-control-allow-origin" not in answer.headers
    settings = ServiceSettings(allowed_origins=("https://ours.example",))
    application: Any = create_app(director.gill, settings, api_key="s3cret")
    transport = httpx.ASGITransport(application)

    async def ask(method: str, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, CHAT, headers=headers, json=body_of("a"))

    asked = {**ours, "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = asyncio.run(ask("OPTIONS", **asked))
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://ours.example"
    answer = asyncio.run(ask("POST", Authorization="Bearer s3cret", **ours))
    assert answer.headers["access-control-allow-origin"] == "https://ours.example"
    assert answer.status_code == 200
    theirs = {"Origin": "https://else.example", "Access-Control-Request-Method": "POST"}
    assert asyncio.run(ask("OPTIONS", **theirs)).status_code == 400
    application.app.service.worker.close()


def test_words_do_not_wait_for_slow_pictures_of_others(director: Director) -> None:
    go = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            go.wait(20)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    remote = RemotePictureSettings(allowed_hosts=(host,), timeout_s=20)
    statuses = []

    def ask_slowly(url: str) -> None:
        asked = body_of("a", image_part(f"http://{host}/a.png"))
        statuses.append(httpx.post(url + CHAT, json=asked, timeout=30).status_code)

    try:
        with serving(director.gill, remote=remote) as running:
            slow = [threading.Thread(target=ask_slowly, args=(running.url,)) for _ in range(12)]
            for thread in slow:
                thread.start()
            while running.service.places > 48 - 12:
                time.sleep(0.01)
            time.sleep(0.2)
            began = time.monotonic()
            for asked in (body_of("words"), body_of("words", image_part(GREEN))):
                assert message(httpx.post(running.url + CHAT, json=asked))["content"] == " words"
            assert time.monotonic() - began < 5
            assert not statuses
            go.set()
            for thread in slow:
                thread.join()
        assert statuses == [400] * 12
    finally:
        go.set()
        server.shutdown()


def test_zero_is_not_false_and_true_is_not_one(client: Any) -> None:
    """To Python they are equal; to JSON, and to /openapi.json, they are not."""
    spoiled: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {**body_of("a red ring"), "n": True}),
        (CHAT, {**body_of("a red ring"), "logprobs": 0}),
        ("/v1/responses", {"input": "a red ring", "background": 0.0}),
        ("/v1/images/generations", {"prompt": "a red ring", "stream": 0}),
    ]
    for path, asked in spoiled:
        answer = client.request("POST", path, json=asked)
        assert answer.status_code == 400, asked
        assert answer.json()["error"]["param"] == list(asked)[-1]
    assert client.post(json={**body_of("a red ring"), "n": 1, "logprobs": False}).status_code == 200
