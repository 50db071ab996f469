"""Attacks on the page: what it may be asked, by whom, and which files a job may name."""

import http.server
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import quote

import httpx
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra `app`: pip install .[app]")

import gradio as gr
from fastapi.testclient import TestClient
from starlette.responses import HTMLResponse, PlainTextResponse

import app.page.page
import app.serving.worker
from app.page.cache_tab import Browser
from app.page.jobs import Jobs
from app.page.page import create_app
from app.page.upload_folder import UPLOAD_FOLDER
from app.page.uploads import Uploads, new_visitor
from app.same_origin import ANY_ADDRESS, SameOrigin, names_of
from gill.artifacts import Artifacts
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import Ended, ReplySettings, Started, Text
from tests.test_page import browser  # noqa: F401 - a fixture
from tests.told_batches import batches_of
from tests.told_service import Server

API = "/gradio_api"
JOIN, UPLOAD = f"{API}/queue/join", f"{API}/upload"
META = {"_type": "gradio.FileData"}
SETTINGS = ReplySettings(generation=GenerationSettings(steps=2, guidance=2.0))


class Model:
    """Stands in for the model: `seen` are the turns that it was asked to answer."""

    language_model = SimpleNamespace(turns=None)

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def conversation(self) -> Any:
        def prepare(parts: Any, settings: Any, *, cancelled: Any) -> Any:
            self.seen.append(list(parts))
            return SimpleNamespace(cancelled=cancelled)

        conversation = SimpleNamespace(prepare=prepare, speaker=MagicMock())
        conversation.fork = lambda: conversation
        return conversation

    @staticmethod
    def stream_together(turns: list[Any]) -> Iterator[tuple[int, Any]]:
        for index in range(len(turns)):
            yield index, Started(3, 0)
            yield index, Text(" said")
            yield index, Ended("stop", 1)


class Page:
    """A served page, what it has answered with, and what an attacker would like to have of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, Model()
        for number in range(24):  # so many that the page shows some as examples
            _picture(folder / f"artifacts/miniature/images/test/{number:06d}.png", number)
        (folder / "artifacts/features.zarr").mkdir()
        self.secret = folder / "secret.png"
        _picture(self.secret, 200)
        self.secret.chmod(0o600)
        self.searched: list[Image.Image] = []
        self.server = Server(
            create_app(self.model, Artifacts(folder / "artifacts"), settings=SETTINGS)  # type: ignore[arg-type]
        )
        self.url = self.server.url
        with self.visitor() as client:
            config = client.get("/config").json()
        self.dependencies = config["dependencies"]
        self.types = {one["id"]: one["type"] for one in config["components"]}
        self.values = {one["id"]: one["props"].get("value") for one in config["components"]}

    @contextmanager
    def visitor(self) -> Iterator[httpx.Client]:
        """A browser of its own, which has opened the page."""
        with httpx.Client(base_url=self.url, timeout=20) as client:
            assert client.get("/").status_code == 200
            yield client

    def job(self, name: str) -> dict[str, Any]:
        """The dependency whose function has this name."""
        return next(one for one in self.dependencies if one["api_name"] == name)

    def body(self, dependency: dict[str, Any], **slots: Any) -> dict[str, Any]:
        """A job with the page's own values, but for those of the slots `s0`, `s1` ..."""
        data = [self.values[component] for component in dependency["inputs"]]
        for slot, value in slots.items():
            data[int(slot[1:])] = value
        return {"data": data, "fn_index": dependency["id"], "session_hash": "attacker"}


def _picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (shade, 10, 20)).save(path)


def _file(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": META, **more}


def _stored() -> set[Path]:
    return {one for one in UPLOAD_FOLDER.rglob("*") if one.is_file()}


def _refused(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(key, detail)] = response.json().items()
    assert key == "detail"
    assert detail
    assert "\n" not in detail
    return str(detail)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.serving.worker, "Batch", batches_of(Model.stream_together))
        patch.setattr(Browser, "provenance", lambda *_: "a store")
        patch.setattr(Browser, "tiles", lambda *_: [])
        running = Page(tmp_path_factory.mktemp("page"))

        def search(_: Browser, __: str, picture: Image.Image) -> list[tuple[int, float]]:
            running.searched.append(picture)
            return []

        patch.setattr(Browser, "by_picture", search)
        yield running
        running.server.stop()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[SimpleNamespace]:
    """A server of this machine that only this machine reaches; `asked` are its requests."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{listening.server_port}/a.png", asked=asked)
    listening.shutdown()


def _upload(client: httpx.Client, data: bytes, name: str = "mine.png") -> str:
    answer = client.post(UPLOAD, files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    [path] = answer.json()
    return str(path)


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (10, shade, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def _run(client: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    """The last message of a job that is sent as the page's scripts send it."""
    joined = client.post(JOIN, json=body, headers=headers)
    assert joined.status_code == 200, joined.text
    where = f"{API}/queue/data?session_hash={body['session_hash']}"
    with client.stream("GET", where) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line else {}
            if message.get("msg") == "process_completed":
                return dict(message)
    raise AssertionError("the job did not end")


def _raw(
    page: Page, request: str, content: bytes = b"", *, host: str | None = None, more: str = ""
) -> tuple[int, bytes]:
    """Status and body of a request whose words no library has put straight."""
    with socket.create_connection(("127.0.0.1", page.server.port), 20) as raw:
        host = f"127.0.0.1:{page.server.port}" if host is None else host
        raw.sendall(
            f"{request} HTTP/1.1\r\nHost: {host}\r\n{more or 'Connection: close'}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def _references(page: Page, others: str, url: str) -> dict[str, str]:
    """Ways to name what is none of the visitor's files."""
    secret, folder = str(page.secret), str(UPLOAD_FOLDER)
    link = UPLOAD_FOLDER / "link.png"
    if not link.is_symlink():
        link.symlink_to(page.secret)
    up = os.path.relpath(secret, folder)
    return {
        "absolute": secret,
        "relative": os.path.relpath(secret),
        "out of the folder": f"{folder}/{up}",
        "escaped": quote(secret, safe=""),
        "escaped dots": f"{folder}/" + up.replace("../", "%2e%2e/"),
        "file scheme": f"file://{secret}",
        "route": f"{API}/file={secret}",
        "link": str(link),
        "folder": folder,
        "process": "/proc/self/environ",
        "nothing there": f"{folder}/nothing.png",
        "of somebody else": others,
        "nul": f"{secret}\0.png",
        "url": url,
        "url in capitals": url.replace("http", "HTTP"),
        "url without a scheme": url.removeprefix("http:"),
        "data": "data:image/png;base64,iVBORw0KGgo=",
    }


def _shapes(path: str) -> list[Any]:
    """Values in which Gradio, or one of its components, would find a file."""
    file = _file(path)
    return [
        file,
        {"path": path},
        {"url": path},
        {"url": path, "meta": META},
        {"path": None, "url": path, "meta": META},
        {"path": path, "meta": {}},
        _file(path, is_stream=True),
        [file],
        [[{"image": file, "caption": None}]],
        {"text": "", "files": [file]},
        {"text": "", "files": [{"path": path}]},
        {"value": file},
        {"a": [{"b": {"c": file}}]},
        {"background": None, "layers": [file], "composite": file},
    ]


def _attacks(page: Page, references: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Every reference in every slot of every job of the page, in some shape; where the slot takes
    files, in every shape."""
    for dependency in page.dependencies:
        for slot, component in enumerate(dependency["inputs"]):
            takes_files = page.types[component] in ("image", "multimodaltextbox")
            for number, path in enumerate(references.values()):
                shapes = _shapes(path)
                chosen = shapes if takes_files else [shapes[(slot + number) % len(shapes)]]
                for value in chosen:
                    yield page.body(dependency, **{f"s{slot}": value})


def test_no_job_of_the_page_reads_a_file_or_an_address_of_the_host(
    page: Page, elsewhere: SimpleNamespace
) -> None:
    with page.visitor() as client, page.visitor() as other:
        references = _references(page, _upload(other, _png(1)), elsewhere.url)
        before = _stored()
        attacks = list(_attacks(page, references))
        assert {page.types[one] for job in page.dependencies for one in job["inputs"]} >= {
            *("state", "image", "multimodaltextbox", "dataset", "radio", "textbox", "number")
        }
        assert len(attacks) > 1000
        for body in attacks:
            _refused(client.post(JOIN, json=body))
        for dependency in page.dependencies:
            body = {**page.body(dependency), "data": [_file(str(page.secret))]}
            for name in (dependency["api_name"], "predict"):
                _refused(client.post(f"{API}/run/{name}", json=body))
    assert _stored() == before
    assert elsewhere.asked == []
    assert page.model.seen == []
    assert page.searched == []


def test_an_upload_is_named_by_its_own_address_only(page: Page, elsewhere: SimpleNamespace) -> None:
    job = page.job("run_1")
    assert page.types[job["inputs"][1]] == "image"
    with page.visitor() as client:
        path = _upload(client, _png(2))
        for url in (elsewhere.url, f"file://{page.secret}", "data:image/png;base64,aaaa", ""):
            _refused(client.post(JOIN, json=page.body(job, s1=_file(path, url=url))))
        for other in (f"{path}/", f"/{path}", f"{path}.", path.upper(), quote(path, safe="")):
            _refused(client.post(JOIN, json=page.body(job, s1=_file(other))))
        Path(path).unlink()
        assert "upload it again" in _refused(client.post(JOIN, json=page.body(job, s1=_file(path))))
    assert elsewhere.asked == []


def test_events_name_what_the_page_has_shown_and_nothing_else(
    page: Page, elsewhere: SimpleNamespace
) -> None:
    with page.visitor() as client, page.visitor() as other:
        references = _references(page, _upload(other, _png(1)), elsewhere.url)
        del references["of somebody else"]  # an event only says what was clicked on
        body = page.body(page.job("pick"))
        for path in references.values():
            event = {"index": 0, "value": {"image": _file(path), "caption": None}}
            _refused(client.post(JOIN, json={**body, "event_data": event}))
    assert elsewhere.asked == []


CLOSED = [
    *("api/send", "call/send", "call/v2/send", "call/lambda", "stream/1", "stream/1/close"),
    *("component_server", "component_server/", "process_recording", "run-history/connect"),
    *("vibe-edit", "undo-vibe-edit", "vibe-code", "vibe-starter-queries", "queue/join/"),
    *("Queue/join", "queue//join", "%71ueue/join", "./queue/join", "../login", "nonsense"),
]


@pytest.mark.parametrize("path", CLOSED)
def test_gradios_other_ways_to_send_are_closed(page: Page, path: str) -> None:
    before = _stored()
    body = page.body(page.job("send"), s1={"text": "", "files": [_file(str(page.secret))]})
    server = {"component_id": 1, "session_hash": "a", "fn_name": "accept_blobs", "data": body}
    status, said = _raw(page, f"POST {API}/{path}", json.dumps({**body, **server}).encode())
    assert status in (400, 404)
    assert isinstance(json.loads(said)["detail"], str)
    assert _stored() == before


READING = [
    *("proxy=http://127.0.0.1:1/", "proxy=https://a.hf.space/", "stream/a/b/1/playlist.m3u8"),
    *("stream/a/b/1/playlist-file", "deep_link?session_hash=a", "openapi.json", "runs"),
    *("run-history/buckets", "vibe-code", "dev/reload", "file/etc/hostname", "token", "user"),
    *("custom_component/a/client/b/c", "startup-events", "call/send/1", "queue/status"),
    *("../monitoring", "../monitoring/summary", "../svelte/a", "../pwa_icon", "../docs"),
]


@pytest.mark.parametrize("path", READING)
def test_gradios_other_ways_to_read_are_closed(page: Page, path: str) -> None:
    status, said = _raw(page, f"GET {API}/{path}" if path[0] != "." else f"GET {path[2:]}")
    assert status == 404
    assert isinstance(json.loads(said)["detail"], str)


def test_the_file_route_serves_what_the_page_holds_and_nothing_else(
    page: Page, elsewhere: SimpleNamespace
) -> None:
    with page.visitor() as client, page.visitor() as other:
        path = _upload(client, _png(3))
        shown = client.get(f"{API}/file={path}")
        assert shown.content == _png(3)
        assert shown.headers["content-security-policy"] == "sandbox"
        references = _references(page, path, elsewhere.url)
        del references["of somebody else"]
        for reference in [*references.values(), f"{path}/../mine.png", f"{path}%00", "", "/"]:
            for written in (reference, quote(reference), quote(quote(reference, safe=""))):
                if "\0" not in written:
                    status, said = _raw(page, f"GET {API}/file={written}")
                    assert status == 404, written
                    assert json.loads(said) == {"detail": "the page has no such file"}
        for method in ("PUT", "DELETE", "PATCH", "POST", "TRACE"):
            assert other.request(method, f"{API}/file={path}").status_code == 404
    assert elsewhere.asked == []


@pytest.mark.parametrize("name", ["page.html", "page.svg", "page.xhtml", "page.js", "page"])
def test_what_was_uploaded_runs_nothing(page: Page, name: str) -> None:
    text = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    with page.visitor() as client:
        shown = client.get(f"{API}/file={_upload(client, text, name)}")
    assert shown.headers["content-disposition"].startswith("attachment")
    assert shown.headers["content-security-policy"] == "sandbox"
    assert shown.headers["x-content-type-options"] == "nosniff"


def test_what_a_visitor_uploads_is_answered(page: Page) -> None:
    send, search = page.job("send"), page.job("run_1")
    with page.visitor() as client:
        path = _upload(client, _png(77))
        url = f"{page.url}{API}/file={path}"
        said = {"text": "a ring", "files": [_file(path, url=url, orig_name="mine.png", size=99)]}
        ended = _run(client, page.body(send, s1=said))
        assert ended["success"]
        assert "said" in ended["output"]["data"][1]
        picture, text = page.model.seen.pop()
        assert (picture.size, picture.getpixel((0, 0)), text) == ((40, 30), (10, 77, 20), "a ring")

        assert _run(client, page.body(search, s1=_file(path, url=url)))["success"]
        assert page.searched.pop().getpixel((0, 0)) == (10, 77, 20)


def test_an_example_is_put_into_the_box_and_answered(page: Page) -> None:
    with page.visitor() as client:
        put = client.post(
            f"{API}/run/predict", json=page.body(page.job("load_example"), s0=4)
        ).json()
        [box] = put["data"]
        ended = _run(client, page.body(page.job("send"), s1=box["value"]))
        assert ended["success"]
    [picture, words] = page.model.seen.pop()
    assert picture.getpixel((0, 0)) == (8, 10, 20)
    assert words == "it turns blue."
    for index in (24, -1, "0", None, 1.5, True, [0]):
        body = page.body(page.job("load_example"), s0=index)
        with page.visitor() as client:
            _refused(client.post(f"{API}/run/predict", json=body))


def test_odd_names_of_uploads_stay_in_the_folder(page: Page) -> None:
    search = page.job("run_1")
    names = [
        "../../up.png",
        "/etc/passwd",
        "a b#?%2e.png",
        "é ünï.png",
        "-rf.png",
        "x" * 300 + ".png",
    ]
    names += ["..\\..\\w.png", ".hidden.png", "a;b&c$(d).png", "C:\\a.png", "'\".png", "."]
    with page.visitor() as client:
        for number, name in enumerate(names):
            path = _upload(client, _png(100 + number), name)
            assert UPLOAD_FOLDER in Path(path).resolve().parents
            assert client.get(f"{API}/file={quote(path)}").content == _png(100 + number)
            url = f"{page.url}{API}/file={quote(path)}"
            assert _run(client, page.body(search, s1=_file(path, url=url)))["success"], name
            assert page.searched.pop().getpixel((0, 0)) == (10, 100 + number, 20)
        _refused(client.post(UPLOAD, files={"files": ("..", b"a")}))


def test_the_folder_is_this_servers_own() -> None:
    assert UPLOAD_FOLDER.stat().st_mode & 0o777 == 0o700
    assert UPLOAD_FOLDER.stat().st_uid == os.getuid()


BAD_JOBS: list[tuple[int, Any]] = [
    *((400, raw) for raw in (b"", b"{", b"[]", b"null", b"\xff", b'{"data": [NaN]}')),
    (400, b"[" * 100_000),
    (400, b'{"data": [' + b"9" * 5000 + b"]}"),
    (400, {"fn_index": None}),
    (400, {"fn_index": 10**6}),
    (400, {"fn_index": -1}),
    (400, {"fn_index": 1.5}),
    (400, {"fn_index": "1"}),
    (400, {"fn_index": True}),
    (400, {"session_hash": None}),
    (400, {"session_hash": "../a"}),
    (400, {"session_hash": "a" * 65}),
    (400, {"data": {}}),
    (400, {"data": []}),
    (400, {"data": [None] * 99}),
    (400, {"trigger_id": "a"}),
    (400, {"event_data": {"path": 1}}),
    (413, {"event_data": "a" * 2_000_000}),
]


@pytest.mark.parametrize("number", range(len(BAD_JOBS)))
def test_bad_jobs_get_a_line(page: Page, number: int) -> None:
    status, change = BAD_JOBS[number]
    whole = page.body(page.job("run_2"))
    content = change if isinstance(change, bytes) else json.dumps({**whole, **change}).encode()
    headers = {"Content-Type": "application/json"}
    with page.visitor() as client:
        for path in (JOIN, f"{API}/run/predict"):
            _refused(client.post(path, content=content, headers=headers), status)
        for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""):
            answer = client.post(JOIN, content=content, headers={"Content-Type": kind})
            _refused(answer, 415)


def test_deep_jobs_get_a_line(page: Page) -> None:
    value: Any = "a"
    for _ in range(300):
        value = {"a": [value]}
    with page.visitor() as client:
        _refused(client.post(JOIN, json=page.body(page.job("run_2"), s1=value)))


def test_what_is_checked_is_what_runs() -> None:
    """Nothing that was not looked at gets further: neither a second key nor an unknown one."""
    with gr.Blocks() as blocks:
        inputs = [gr.Textbox(), gr.Image()]
        gr.Button().click(print, inputs)
    secret, mine = _file("/secret", x=1), _file("/folder/a b.png", orig_name="a.png")
    given = {**mine, "url": "/gradio_api/file=/folder/a%20b.png", "image": secret, "x": [secret]}
    job = {"data": ["words", given], "fn_index": 0, "session_hash": "a", "trigger_id": 2}
    rest = json.dumps({**job, "batched": True, "simple_format": True, "event_id": "a", "x": secret})
    twice = f'{{"data": ["words", {json.dumps(secret)}], {rest[1:]}'
    checked = Jobs(blocks).checked(
        twice.encode(), lambda path: path == mine["path"], lambda path: path == mine["path"]
    )
    told = {"size": None, "mime_type": None, "is_stream": False}
    expected = {**job, "data": ["words", {**mine, **told}], "event_data": None}
    assert json.loads(checked) == expected


BAD_UPLOADS = [
    ("text/plain", b"a"),
    ("multipart/form-data", b"a"),
    ("multipart/form-data; boundary=x", b"a"),
    (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\na\r\n--x--',
    ),
    ("multipart/form-data; boundary=x", b"--x\r\n\r\na\r\n--x--"),
    ("multipart/form-data; boundary=" + "x" * 4000, b"a"),
    (
        "multipart/form-data; boundary=x; charset=nonsense",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_UPLOADS)))
@pytest.mark.parametrize("query", ["", "?upload_id=a"])
def test_bad_uploads_get_a_line(page: Page, number: int, query: str) -> None:
    kind, content = BAD_UPLOADS[number]
    with page.visitor() as client:
        _refused(client.post(UPLOAD + query, content=content, headers={"Content-Type": kind}))


def test_an_upload_may_be_too_large(page: Page) -> None:
    with page.visitor() as client:
        large = {"files": ("a.png", bytes(21_000_000))}
        assert "size" in _refused(client.post(UPLOAD, files=large), 413)


FOREIGN = [
    {"Origin": "http://attacker.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_requests_from_pages_elsewhere_are_refused(page: Page, headers: dict[str, str]) -> None:
    with page.visitor() as client:
        path = _upload(client, _png(6))
        before = _stored()
        search = page.body(page.job("run_1"), s1=_file(path))
        off = {"session_hash": "a", "fn_index": 1, "event_id": "a"}
        for answer in (
            client.post(UPLOAD, files={"files": ("a.png", _png(7))}, headers=headers),
            client.post(JOIN, json=search, headers=headers),
            client.post(f"{API}/run/predict", json=search, headers=headers),
            client.post(f"{API}/cancel", json=off, headers=headers),
            client.get(f"{API}/queue/data?session_hash=a", headers=headers),
            client.get(f"{API}/file={path}", headers=headers),
            client.options(JOIN, headers={**headers, "Access-Control-Request-Method": "POST"}),
        ):
            _refused(answer, 403)
            assert "access-control-allow-origin" not in answer.headers
    assert _stored() == before
    assert page.searched == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
    ids=str,
)
def test_links_from_elsewhere_open_the_page(page: Page, headers: dict[str, str]) -> None:
    assert "gradio" in httpx.get(page.url, headers=headers).text


def test_the_pages_own_origin_is_served(page: Page) -> None:
    with page.visitor() as client:
        own = {"Origin": page.url, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
        path = client.post(UPLOAD, files={"files": ("a.png", _png(8))}, headers=own).json()[0]
        body = page.body(page.job("run_1"), s1=_file(path))
        assert _run(client, body, **own)["success"]
    assert page.searched.pop().getpixel((0, 0)) == (10, 8, 20)
    named = {"Host": f"localhost:{page.server.port}"}
    own = {**named, "Origin": f"http://localhost:{page.server.port}"}
    assert httpx.post(f"{page.url}{UPLOAD}", files={"files": b"a"}, headers=own).status_code == 200


HOSTS = ["attacker.example", "127.0.0.1.attacker.example", "localhost.", "a@localhost", "[::1", ""]
HOSTS += ["10.0.0.1", "0.0.0.0", "localhost:1:2"]


@pytest.mark.parametrize("host", HOSTS)
def test_other_names_are_refused(page: Page, host: str) -> None:
    """A name that its owner points at this machine (DNS rebinding) makes his page one of ours."""
    for request in ("GET /", f"POST {UPLOAD}", f"POST {JOIN}"):
        status, said = _raw(page, request, host=host)
        assert status == 400
        assert b"localhost" in said


def test_a_server_for_others_is_asked_for_by_address_or_own_name() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("served")(scope, receive, send)

    names = names_of("0.0.0.0")
    assert ANY_ADDRESS in names
    client = TestClient(SameOrigin(inner, names))
    good = ["192.168.1.7:7860", "[fe80::1]:7860", "localhost:7860", f"{socket.gethostname()}:7860"]
    for host in good:
        assert client.get("/", headers={"Host": host}).text == "served"
    assert client.get("/", headers={"Host": "attacker.example"}).status_code == 400
    assert names_of("127.0.0.1") == names_of("::1") == ("127.0.0.1", "localhost", "::1")
    assert client.get("/", headers={"Host": "box.lan"}).status_code == 400
    named = TestClient(SameOrigin(inner, names_of("box.lan")))
    assert named.get("/", headers={"Host": "Box.lan:7860"}).text == "served"


def test_there_are_no_websockets(page: Page) -> None:
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    status, _ = _raw(page, f"GET {API}/queue/join", more=f"{upgrade}{key}\r\n")
    assert status in (403, 404)


def test_visitors_are_told_apart_by_a_cookie_that_scripts_and_others_do_not_get(page: Page) -> None:
    given = httpx.get(page.url).headers["set-cookie"]
    assert given.startswith("gill-visitor=")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(given.split("; "))
    with page.visitor() as client:
        assert "set-cookie" not in client.get("/").headers
    assert "set-cookie" in httpx.get(page.url, cookies={"gill-visitor": "chosen"}).headers


def test_uploads_are_remembered_for_a_while() -> None:
    now = [0.0]
    uploads = Uploads(UPLOAD_FOLDER, 10, lambda: now[0])
    ada, bo = new_visitor(), new_visitor()
    uploads.note(ada, ["/a"])
    assert uploads.are_of(ada, "/a")
    assert not uploads.are_of(bo, "/a")
    now[0] = 6
    uploads.note(ada, ["/a", "/b"])
    now[0] = 12
    assert uploads.are_of(ada, "/a")
    now[0] = 16
    assert not uploads.are_of(ada, "/a")
    uploads.note(bo, ["/c"])
    assert len(uploads._until) == 1


ATTACK = """
<body><script>
const told = [];
const send = async (path, more) => {
  for (const mode of ["cors", "no-cors"]) {
    try {
      const answer = await fetch("%(page)s" + path, {mode, credentials: "include", ...more});
      told.push(answer.type + answer.status);
    } catch { told.push("failed"); }
  }
};
const form = new FormData();
form.append("files", new Blob(["theirs"]), "theirs.png");
const job = JSON.stringify(%(job)s);
(async () => {
  await send("/gradio_api/upload", {method: "POST", body: form});
  await send("/gradio_api/queue/join", {method: "POST", body: job});
  await send("/gradio_api/queue/join", {method: "POST", body: job,
    headers: {"Content-Type": "application/json"}});
  await send("/gradio_api/run/predict", {method: "POST", body: job});
  await send("/gradio_api/queue/data?session_hash=a", {});
  const picture = new Image();
  picture.onload = () => told.push("shown");
  picture.src = "%(page)s/gradio_api/file=%(path)s";
  const frame = document.createElement("iframe");
  frame.src = "%(page)s/";
  document.body.append(picture, frame);
  setTimeout(() => { document.title = told.join(" "); }, 500);
})();
</script></body>
"""


def test_a_page_elsewhere_gets_nothing_from_a_browser(
    browser: Any,  # noqa: F811
    page: Page,
) -> None:
    """A page of another port, opened in a browser that has opened ours and uploaded there."""
    with page.visitor() as client:
        path = _upload(client, _png(11))
        cookie = client.cookies["gill-visitor"]
    job = page.body(page.job("run_1"), s1=_file(path))
    hostile = ATTACK % {"page": page.url, "job": json.dumps(job), "path": path}

    async def elsewhere(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await HTMLResponse(hostile)(scope, receive, send)

    before = _stored()
    server = Server(elsewhere)
    context = browser.new_context()
    try:
        context.add_cookies([{"name": "gill-visitor", "value": cookie, "url": page.url}])
        for host in ("127.0.0.1", "localhost"):
            tab = context.new_page()
            tab.goto(f"http://{host}:{server.port}/")
            tab.wait_for_function("document.title")
            assert set(tab.title().split()) == {"failed", "opaque0"}
            [frame] = tab.frames[1:]
            assert "refused" in frame.content()
            assert "gradio-app" not in frame.content()
    finally:
        context.close()
        server.stop()
    assert _stored() == before
    assert page.searched == []


def test_without_the_guard_gradios_own_check_refuses_files_of_the_host(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two locks: each holds alone."""
    monkeypatch.setattr(app.page.page, "PageGuard", lambda inner, *_: inner)
    artifacts = Artifacts(page.folder / "artifacts")
    server = Server(create_app(page.model, artifacts, settings=SETTINGS))  # type: ignore[arg-type]
    try:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            body = page.body(page.job("run_1"), s1=_file(str(page.secret)))
            before = _stored()
            assert not _run(client, body)["success"]
            assert _stored() == before
            assert _run(client, page.body(page.job("run_1"), s1=_file(_upload(client, _png(9)))))[
                "success"
            ]
    finally:
        server.stop()
    assert page.searched.pop().getpixel((0, 0)) == (10, 9, 20)
