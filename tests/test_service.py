"""The HTTP service: real sockets and the real client library over a model that is told what to do,
and once over the miniature's real weights."""

import asyncio
import base64
import ctypes
import gc
import http.server
import io
import json
import random
import re
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra `app`: pip install .[app]")


from app import listening
from app.page.kept_pictures import KeptPictures
from app.serving.job import Failed, Job
from app.serving.settings import RequestLimits, ServiceSettings
from app.serving.worker import Worker
from gill.loading import Gill
from pipeline.talking.answers import (
    Ended,
    Text,
)
from pipeline.talking.remote_pictures import RemotePictureSettings
from tests.test_end_to_end import world  # noqa: F401 - a fixture
from tests.told_service import (
    CHAT,
    Director,
    body_of,
    image_part,
    inside,
    openai,
    picture_of,
    serving,
    until,
    uri_of,
)


@pytest.fixture
def director(monkeypatch: pytest.MonkeyPatch) -> Director:
    return Director.installed(monkeypatch)


def test_the_openai_client_gets_text_and_pictures_and_sends_them_back(director: Director) -> None:
    with serving(director.gill) as running:
        client = openai(running.url)
        asked: list[Any] = body_of("a red ring", image_part(uri_of(picture_of("green"))))[
            "messages"
        ]
        answer = client.chat.completions.create(
            model="gill", messages=asked, seed=5, extra_body={"gill": {"want": "generate"}}
        )
        message = answer.choices[0].message
        assert message.content == " a red ring"
        assert answer.choices[0].finish_reason == "stop"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 + 4, 3)
        text, picture = message.parts
        assert text == {"type": "text", "text": " a red ring"}
        assert picture["gill"]["kind"] == "generated"
        assert picture["gill"]["seed"] == 5
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0)

        asked += [message, {"role": "user", "content": "and again"}]
        answer = client.chat.completions.create(model="gill", messages=asked)
        assert answer.choices[0].message.content == " a red ring  a red ring and again".replace(
            "  ", " "
        )
        assert answer.usage.prompt_tokens == 3 + 3 + 2 + 4
        assert [one.id for one in client.models.list()] == ["gill"]


def test_the_openai_client_streams_the_same(director: Director) -> None:
    with serving(director.gill) as running:
        pieces = list(
            openai(running.url).chat.completions.create(
                **body_of("one two three"),
                max_tokens=2,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"gill": {"want": "retrieve"}},
            )
        )
    *said, last, used = pieces
    assert [one.choices[0].delta.content for one in said[:3]] == ["", " one", " two"]
    [picture] = said[3].choices[0].delta.parts
    assert picture["gill"] == {
        "p_generate": 0.25,
        "kind": "retrieved",
        "score": 0.5,
        "source": "b.png",
        "caption": "blue",
        "row": 7,
    }
    assert last.choices[0].finish_reason == "stop"
    assert used.usage.total_tokens == 3 + 2
    assert len({one.id for one in pieces}) == 1


def test_64_clients_at_once_are_answered_or_told_when_to_come_again(director: Director) -> None:
    """Every accepted request gets its own answer, and what was sent is not kept."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    picture = image_part(uri_of(Image.fromarray(noise), compress_level=0))  # 0.6 MB
    settings = {"max_waiting": 16, "max_batch": 4, "max_requests": 40}
    statuses: list[int] = []

    async def one(client: httpx.AsyncClient, words: str) -> None:
        answer = await client.post(CHAT, json=body_of(words, picture))
        statuses.append(answer.status_code)
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["message"]["content"] == f" {words}"
        else:
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1

    async def rounds(url: str, number: int, held: bool = False) -> None:
        limits = httpx.Limits(max_connections=65)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            for _ in range(number):
                everybody = asyncio.gather(*(one(client, f"number {n}") for n in range(64)))
                if held:  # until the line is full and the others have been told
                    while len(statuses) < 64 - 16:
                        await asyncio.sleep(0.02)
                    director.go.set()
                await everybody

    async def first_round(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            first = asyncio.create_task(one(client, "hold"))
            await asyncio.to_thread(director.holding.acquire)
            await rounds(url, 1, held=True)
            await first

    with serving(director.gill, **settings) as running:
        asyncio.run(first_round(running.url))
        gc.collect()
        before = _resident()
        asyncio.run(rounds(running.url, 3))
        gc.collect()
        assert _resident() - before < 60e6  # of the 123 MB that came in
        assert len(statuses) == 1 + 4 * 64
        assert set(statuses) == {200, 429}
        assert max(director.batches) == 4
        until(lambda: running.service.places == 40)
        assert running.service.worker.num_waiting == 0
        counted = httpx.get(f"{running.url}/metrics").text
        assert f'gill_requests_total{{status="200"}} {float(statuses.count(200))}' in counted
        assert f'gill_requests_total{{status="429"}} {float(statuses.count(429))}' in counted
        assert f'gill_answers_total{{end="stop"}} {float(statuses.count(200))}' in counted


def _resident() -> int:
    """Bytes in memory, without those that are free and only not given back."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_places(director: Director, stream: bool) -> None:
    with serving(director.gill, max_requests=2, max_waiting=1, max_batch=1) as running:
        url, worker = running.url + CHAT, running.service.worker

        def hold() -> threading.Thread:
            def ask() -> None:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(
                        url, json=body_of("hold"), timeout=httpx.Timeout(5, read=0.6)
                    ) if not stream else _stream(url)

            thread = threading.Thread(target=ask)
            thread.start()
            return thread

        def _stream(url: str) -> None:
            timeout = httpx.Timeout(5, read=0.6)
            with httpx.stream(
                "POST", url, json=body_of("hold", stream=True), timeout=timeout
            ) as got:
                list(got.iter_lines())

        first = hold()
        assert director.holding.acquire(timeout=10)
        second = hold()
        until(lambda: worker.num_waiting == 1)
        full = httpx.post(url, json=body_of("hello"))
        assert full.status_code == 429
        first.join()
        second.join()  # both have left: the one being answered and the one in line
        until(lambda: running.service.places == 2 and worker.num_running == 0)
        assert httpx.post(url, json=body_of("hello")).json()["choices"][0]["message"]["content"]
        assert not director.go.is_set()
        counted = httpx.get(f"{running.url}/metrics").text
        assert 'gill_answers_total{end="left"}' in counted


def test_an_answer_that_takes_too_long_ends(director: Director) -> None:
    with serving(director.gill, timeout_s=0.4, max_batch=1) as running:
        url = running.url + CHAT
        answer = httpx.post(url, json=body_of("hold"))
        assert answer.status_code == 504
        assert "too long" in answer.json()["error"]["message"]
        with httpx.stream("POST", url, json=body_of("hold", stream=True)) as got:
            lines = [line for line in got.iter_lines() if line]
        assert "too long" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        # Even where the model hangs: 504 for whom it works, 429 for who is still in line.
        while director.holding.acquire(timeout=0.01):
            pass  # what the two before have left
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(httpx.post, url, json=body_of("stuck"))
            assert director.holding.acquire(timeout=10)
            second = pool.submit(httpx.post, url, json=body_of("hello"))
            assert (first.result().status_code, second.result().status_code) == (504, 429)
        director.go.set()
        until(lambda: running.service.worker.num_running == 0)


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that promises width x height pixels."""

    def block(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = block(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + block(b"IEND", b"")


def _raw(data: bytes) -> dict[str, Any]:
    return image_part(f"data:image/png;base64,{base64.b64encode(data).decode()}")


GREEN = uri_of(Image.new("RGB", (4, 4), "green"))

REFUSED: list[tuple[Any, int, str | None, str]] = [
    (b"", 400, "missing_required_parameter", "body"),
    (b"[1, 2", 400, "invalid_json", "delimiter"),
    (b"\xff\xfe", 400, "invalid_json", "not JSON"),
    (b"[" * 100_000, 400, None, "parsing the body"),
    (b'{"model": "gill", "messages": ' + b'[{"role":' * 50_000, 400, None, "parsing the body"),
    (b"1" * 5000, 400, None, "parsing the body"),
    (b"null", 400, "invalid_value", "body"),
    ({"model": "gill"}, 400, "missing_required_parameter", "messages"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": None}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": None}]}, 400, None, "empty"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value", "not Unicode"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "unsupported_value", "0.role"),
    (body_of({"type": "audio", "audio": ""}), 400, "unsupported_value", "audio"),
    (body_of("a", model="gpt"), 404, "model_not_found", "'gill'"),
    (body_of("a", n=2), 400, "unsupported_value", "n:"),
    (body_of("a", logprobs=True), 400, "unsupported_value", "logprobs:"),
    (body_of("a", tools=[{}], tool_choice="required"), 400, "unsupported_value", "tool_choice"),
    (body_of("a", tool_choice={"type": "function"}), 400, "unsupported_value", "tool_choice"),
    (body_of("a", response_format={"type": "json_schema"}), 400, "unsupported_value", "format"),
    (body_of("a", modalities=["audio", "text"]), 400, "unsupported_value", "modalities.0"),
    (body_of("a", modalities=["text"], gill={"want": "generate"}), 400, None, "only text"),
    (body_of("a", modalities=["image"], gill={"want": "text"}), 400, None, "picture is asked"),
    (body_of("a", stop=["x"] * 20), 400, "invalid_value", "stop"),
    (body_of("a", stop=""), 400, "invalid_value", "stop"),
    (body_of("a", stop="\ud800"), 400, "invalid_value", "stop"),
    (body_of("a", gill={"negative_prompt": "\udfff"}), 400, "invalid_value", "negative_prompt"),
    (body_of("a", temperature=float("nan")), 400, "invalid_value", "temperature"),
    (body_of("a", temperature=3), 400, "invalid_value", "temperature"),
    (body_of("a", seed=-1), 400, "invalid_value", "seed"),
    (body_of("a", seed=10**30), 400, "invalid_value", "seed"),
    (body_of("a", gill={"steps": 10**6}), 400, "invalid_value", "at most 100"),
    (body_of("a", gill={"guidance": float("inf")}), 400, "invalid_value", "guidance"),
    (body_of("a", gill={"candidates": 64}), 400, "invalid_value", "at most 4"),
    (body_of("a", gill={"base": {}}), 400, "unknown_parameter", "gill.base"),
    (body_of("a", gill={"decoding": {}}), 400, "unknown_parameter", "gill.decoding"),
    (body_of("a", gill={"batch_size": 1}), 400, "unknown_parameter", "gill.batch_size"),
    (body_of("a", gill={"cpu_offload": "model"}), 400, "unknown_parameter", "gill.cpu_offload"),
    (body_of("a", gill={"vae_slicing": True}), 400, "unknown_parameter", "gill.vae_slicing"),
    (body_of("a", gill={"\ud800": 1}), 400, "invalid_value", "gill"),
    (body_of("a", gill={"want": ["text"]}), 400, "unsupported_value", "want"),
    (body_of("too-long"), 400, "context_length_exceeded", "shorten the turn"),
    (body_of("x" * 20_001), 400, "context_length_exceeded", "characters"),
    (body_of(*["a"] * 10, *[image_part(GREEN)] * 9), 400, "too_many_pictures", "8 pictures"),
    (body_of(image_part("https://example.org/a.png")), 400, "invalid_image", "not fetched"),
    (body_of(image_part("file:///etc/passwd")), 400, "invalid_image", "not fetched"),
    (body_of(image_part("")), 400, "invalid_image", "only data URIs"),
    (body_of(image_part("data:image/png,plain")), 400, "invalid_image", "base64"),
    (body_of(image_part("data:image/png;base64,@@@")), 400, "invalid_image", "not base64"),
    (body_of(image_part("data:image/png;base64,é")), 400, "invalid_image", "not base64"),
    (body_of(image_part(f"/v1/pictures/{'a' * 32}.png")), 400, "invalid_image", "expired"),
    (body_of(_raw(b"")), 400, "invalid_image", "empty"),
    (body_of(_raw(b"%PDF-1.4")), 400, "invalid_image", "not a picture"),
    (body_of(_raw(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 400, None, "not a picture"),
    (body_of(_raw(_png_header(30_000, 30_000))), 400, "image_too_large", "too large"),
    (body_of(_raw(_png_header(4000, 4000))), 400, "invalid_image", ""),
    (body_of(image_part(uri_of(Image.new("1", (6000, 6000))))), 400, "image_too_large", "large"),
    (body_of("a", image_part(GREEN[:-30])), 400, "invalid_image", "messages.0.content.1"),
]


def test_bad_requests_are_refused_with_a_reason(director: Director) -> None:
    with inside(director) as client:
        for body, status, code, words in REFUSED:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post(content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == status, (content[:200], answer.text)
            error = answer.json()["error"]
            assert words in f"{error['message']} {error['param']}", (content[:200], error)
            assert code in (None, error["code"]), (content[:200], error)
        assert client.post(content=b"{}").status_code == 415
        big = client.post(content=b"x" * 17_000_000, headers={"Content-Type": "application/json"})
        assert big.status_code == 413
        assert client.request("GET", CHAT).status_code == 405
        assert "error" in client.request("GET", "/nothing").json()
        host = client.request("GET", "/healthz", headers={"Host": "attacker.example"})
        assert host.status_code == 400
        assert client.post(json=body_of("still here")).status_code == 200
        assert client.service.places == ServiceSettings().max_requests


def test_no_input_gives_a_server_error(director: Director) -> None:
    """Random damage to a good request: to its bytes, its values, and to a picture in it."""
    rng = random.Random(0)
    good = body_of(
        "a ring",
        image_part(GREEN),
        temperature=0.5,
        seed=3,
        stream=False,
        gill={"want": "generate", "steps": 2, "top_k": 5, "negative_prompt": "x"},
    )
    odd = [None, True, -1, 0, 1e308, 10**40, "", "\u0000", "💥", [], {}, [[]], {"a": None}, "gill"]
    strange = ["data:", "data:;base64,", "data:image/png;base64,AAAA", "http://[", "//x", "A" * 999]

    def spoil(node: Any) -> Any:
        if rng.random() < 0.08:
            return rng.choice([*odd, *strange])
        if isinstance(node, dict):
            spoiled = {key: spoil(value) for key, value in node.items() if rng.random() > 0.03}
            if rng.random() < 0.05:
                spoiled[rng.choice(["gill", "n", "messages", "tools", "\u2028"])] = rng.choice(odd)
            return spoiled
        return [spoil(value) for value in node] if isinstance(node, list) else node

    statuses = []
    with inside(director) as client:
        for number in range(450):
            if number % 3 == 0:
                content = json.dumps(spoil(good)).encode()
            elif number % 3 == 1:
                raw = bytearray(json.dumps(good).encode())
                for _ in range(rng.randrange(1, 6)):
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
                content = bytes(raw)
            else:
                kind = rng.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
                head, data = uri_of(Image.new("RGB", (9, 9), "red"), kind).split(",")
                spoiled_picture = bytearray(base64.b64decode(data))
                for _ in range(rng.randrange(1, 4)):
                    spoiled_picture[rng.randrange(len(spoiled_picture))] = rng.randrange(256)
                cut = bytes(spoiled_picture[: rng.randrange(len(spoiled_picture))])
                kept = cut if rng.random() < 0.3 else bytes(spoiled_picture)
                uri = f"{head},{base64.b64encode(kept).decode()}"
                content = json.dumps(body_of("a", image_part(uri))).encode()
            answer = client.post(content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, (content, answer.text)
            assert answer.status_code == 200 or answer.json()["error"]["message"], content
            statuses.append(answer.status_code)
        assert client.service.worker.alive
        assert client.service.places == ServiceSettings().max_requests
    assert statuses.count(200) > 30
    assert statuses.count(400) > 100


def test_broken_pictures_of_the_world_are_refused(director: Director, shared_data: Path) -> None:
    broken = [
        path
        for folder in ("truncated_corrupt", "bomb")
        for path in (shared_data / "robust_images/pillow" / folder).glob("*")
        if path.stat().st_size < 2_000_000
    ]
    assert len(broken) > 3
    with inside(director) as client:
        for path in broken:
            answer = client.post(json=body_of("a", _raw(path.read_bytes())))
            assert answer.status_code in (200, 400), path
            if answer.status_code == 400:
                assert answer.json()["error"]["param"] == "messages.0.content.1"
        assert client.service.worker.alive


def test_a_key_is_asked_for_where_others_can_reach_it(director: Director) -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        assert listening.is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        assert not listening.is_loopback(host)
        with pytest.raises(ValueError, match="API key"):
            listening.listen(host, 0, guarded=False)
    library = pytest.importorskip("openai")
    with serving(director.gill, key="s3cret") as running:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            answer = httpx.post(running.url + CHAT, json=body_of("a"), headers=header)
            assert answer.status_code == 401
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        assert httpx.get(f"{running.url}/readyz").status_code == 200
        with pytest.raises(library.AuthenticationError):
            openai(running.url, "wrong").chat.completions.create(**body_of("a"))
        answer = openai(running.url, "s3cret").chat.completions.create(**body_of("a"))
        assert answer.choices[0].message.content == " a"


def test_pictures_under_names_that_expire(director: Director) -> None:
    with serving(director.gill, picture_seconds=0.7) as running:
        body = body_of("a", gill={"want": "retrieve"}, pictures="url")
        answer = httpx.post(running.url + CHAT, json=body).json()
        url = answer["choices"][0]["message"]["parts"][1]["image_url"]["url"]
        assert re.fullmatch(rf"{running.url}/v1/pictures/[\w-]{{32}}\.png", url)
        got = httpx.get(url)
        assert got.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(got.content)).getpixel((0, 0)) == (0, 0, 255)
        until(lambda: httpx.get(url).status_code == 404)
        assert httpx.get(f"{running.url}/v1/pictures/..%2f..%2fetc.png").status_code == 404


def test_kept_pictures_have_a_limit_of_time_and_bytes() -> None:
    now = [0.0]
    kept = KeptPictures(seconds=10, max_bytes=10, clock=lambda: now[0])
    first, second = kept.keep(b"12345"), kept.keep(b"67890")
    assert (kept.get(first), kept.get(second)) == (b"12345", b"67890")
    third = kept.keep(b"x")
    assert (kept.get(first), kept.get(second), kept.get(third)) == (None, b"67890", b"x")
    now[0] = 11
    assert kept.get(third) is None
    assert kept.get("unknown") is None


def test_only_allowed_hosts_are_fetched(director: Director) -> None:
    data = base64.b64decode(GREEN.partition(",")[2])

    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    try:
        with inside(director, remote=RemotePictureSettings(allowed_hosts=(host,))) as client:
            fetched = client.post(json=body_of("a", image_part(f"http://{host}/a.png")))
            assert fetched.status_code == 200
            assert fetched.json()["usage"]["prompt_tokens"] == 1 + 4
            other = client.post(json=body_of("a", image_part("http://127.0.0.1:1/a.png")))
            assert other.status_code == 400
            assert "not on the list" in other.json()["error"]["message"]
    finally:
        server.shutdown()


def test_a_slow_sender_loses_its_place(director: Director) -> None:
    with serving(director.gill, body_timeout_s=0.3, max_requests=1) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                "Content-Length: 500\r\n\r\n{".encode()
            )
            slow.settimeout(10)
            assert b"408" in slow.recv(1000)
        until(lambda: running.service.places == 1)
        assert httpx.post(running.url + CHAT, json=body_of("a")).status_code == 200


def test_ready_until_it_stops(director: Director) -> None:
    with inside(director) as client:
        assert client.request("GET", "/readyz").json()["status"] == "ready"
        client.service.worker.close()
        assert client.request("GET", "/readyz").status_code == 503
        assert client.post(json=body_of("a")).status_code == 429


def test_turns_are_answered_together_and_a_crash_stays_with_its_turn(director: Director) -> None:
    gill, other = director.gill, director.gill
    worker = Worker(max_waiting=16, max_batch=4)
    heard: dict[str, list[Any]] = {}

    def submit(words: str, model: Any = gill) -> None:
        events = heard.setdefault(words, [])
        settings = model.settings()
        worker.submit(Job(model.conversation(), lambda: [words], settings, events.append))

    submit("hold")
    assert director.holding.acquire(timeout=10)
    one, two = gill.conversation(), other.conversation()
    for words, conversation in [("a", one), ("x", two), ("crash", one), ("b", one)]:
        events = heard.setdefault(words, [])
        talk = SimpleNamespace(prepare=conversation.prepare, speaker=conversation.speaker)
        job = Job(talk, lambda words=words: [words], gill.settings(), events.append)  # type: ignore[misc]
        worker.submit(job)
    director.go.set()
    until(lambda: sum(isinstance(e[-1], Ended | Failed) for e in heard.values() if e) == 5)
    worker.close()
    # `hold`; then a, crash and b share a speaker and fail together, and each is tried alone; then x
    assert director.batches == [1, 3, 1, 1, 1, 1]
    for words in ("hold", "a", "b", "x"):
        assert Text(f" {words}") in heard[words]
        assert heard[words][-1] == Ended("stop", 1)
    assert heard["crash"][-1].stop == "broken"
    assert not worker.alive


def test_limits_of_the_defaults_admit_a_photograph() -> None:
    limits = RequestLimits()
    assert limits.max_pixels >= 24_000_000  # of a usual camera
    assert limits.max_body_bytes >= 10_000_000


def test_the_miniature_answers_the_openai_client(
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world)
    gill = Gill.load("artifacts")
    shown = uri_of(Image.open("artifacts/miniature/images/test/000000.png").convert("RGB"))
    with serving(gill, max_batch=4) as running:
        client = openai(running.url)
        bodies = [
            body_of("a red ring", image_part(shown)),
            body_of("in the desert"),
            body_of("a big cross."),
        ]

        def ask(body: dict[str, Any], want: str) -> Any:
            extra = {"gill": {"want": want, "steps": 2}}
            return client.chat.completions.create(**body, seed=1, max_tokens=6, extra_body=extra)

        alone = [ask(body, "generate") for body in bodies]
        together: list[Any] = [None] * len(bodies)

        def run(place: int) -> None:
            together[place] = ask(bodies[place], "generate")

        threads = [threading.Thread(target=run, args=(place,)) for place in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, again in zip(alone, together, strict=True):
            pictures = [
                _opened(part) for part in one.choices[0].message.parts if part["type"] != "text"
            ]
            assert [picture.size for picture in pictures] == [(64, 64)]
            repeated = [
                _opened(part) for part in again.choices[0].message.parts if part["type"] != "text"
            ]
            difference = np.abs(
                np.asarray(pictures[0]).astype(int) - np.asarray(repeated[0]).astype(int)
            )
            assert difference.max() <= 2
            assert one.choices[0].message.content == again.choices[0].message.content
        found = ask(bodies[1], "retrieve").choices[0].message.parts
        assert [part["gill"]["kind"] for part in found if part["type"] != "text"] == ["retrieved"]
        too_long = httpx.post(running.url + CHAT, json=body_of("ring " * 400))
        assert too_long.status_code == 400
        assert "positions" in too_long.json()["error"]["message"]


def _opened(part: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
