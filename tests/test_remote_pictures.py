"""Fetching pictures: what is refused, against a server on this machine. Nothing leaves it."""

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from pipeline.talking.remote_pictures import (
    RemotePictureError,
    RemotePictureSettings,
    fetch_picture,
)


def _png(size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


class _Pictures(BaseHTTPRequestHandler):
    requested: list[str]

    def do_GET(self) -> None:
        type(self).requested.append(self.path)
        if self.path == "/picture.png":
            self._send(_png(), {"Content-Length": str(len(_png()))})
        elif self.path == "/large.png":
            self._send(_png((100, 100)))
        elif self.path == "/not-a-picture":
            self._send(b"<html>")
        elif self.path == "/announced":
            self._send(b"", {"Content-Length": str(10**12)})
        elif self.path == "/endless":
            self._send(b"x" * 300_000)
        elif self.path == "/slow":
            self._send(b"")
            for _ in range(100):
                time.sleep(0.05)
                try:
                    self.wfile.write(b"x")
                    self.wfile.flush()
                except OSError:
                    return
        elif self.path == "/moved":
            self._send(b"", {"Location": "/picture.png"}, 302)
        elif self.path == "/loop":
            self._send(b"", {"Location": "/loop"}, 302)
        elif self.path == "/away":
            self._send(b"", {"Location": "http://169.254.169.254/latest"}, 302)
        elif self.path == "/other-port":
            self._send(b"", {"Location": "http://127.0.0.1:1/picture.png"}, 302)
        else:
            self._send(b"", {}, 404)

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def here(server: ThreadingHTTPServer) -> str:
    _Pictures.requested = []
    return f"127.0.0.1:{server.server_port}"


def _settings(*hosts: str, **limits: float) -> RemotePictureSettings:
    return RemotePictureSettings.model_validate({"allowed_hosts": hosts, **limits})


def test_an_allowed_picture_comes_back(here: str) -> None:
    for path in ("picture.png", "moved"):
        assert fetch_picture(f"http://{here}/{path}", _settings(here)) == _png()
    assert _Pictures.requested == ["/picture.png", "/moved", "/picture.png"]


@pytest.mark.parametrize("hosts", [(), ("images.example.org",), ("127.0.0.1",), ("127.0.0.1:1",)])
def test_nothing_is_asked_of_a_host_that_is_not_listed(here: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(RemotePictureError, match="not on the list of allowed hosts"):
        fetch_picture(f"http://{here}/picture.png", _settings(*hosts))
    assert _Pictures.requested == []


def test_an_allowed_name_does_not_open_a_private_address(here: str) -> None:
    port = here.rpartition(":")[2]
    with pytest.raises(RemotePictureError, match="private address that is not listed"):
        fetch_picture(f"http://localhost:{port}/picture.png", _settings(f"localhost:{port}"))
    assert _Pictures.requested == []
    listed = _settings(f"localhost:{port}", here)
    assert fetch_picture(f"http://localhost:{port}/picture.png", listed) == _png()


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("announced", {}, "1000000000000 bytes, more than"),
        ("endless", {"max_bytes": 100_000}, "more than 100000 bytes"),
        ("away", {}, "redirects to http://169.254.169.254/latest"),
        ("other-port", {}, "not on the list"),
        ("loop", {}, "more than 3 redirects"),
        ("absent", {}, "answered 404"),
    ],
)
def test_limits(here: str, path: str, limits: dict[str, float], message: str) -> None:
    with pytest.raises(RemotePictureError, match=message):
        fetch_picture(f"http://{here}/{path}", _settings(here, **limits))


def test_a_server_that_drips_is_cut_off(here: str) -> None:
    with pytest.raises(RemotePictureError, match="took longer than 0.3 s"):
        fetch_picture(f"http://{here}/slow", _settings(here, timeout_s=0.3))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://127.0.0.1/a.png", "only http and https"),
        ("http://user@127.0.0.1/a.png", "no user name"),
        ("http:///a.png", "expected a host"),
        ("http://127.0.0.1:99999/a.png", "[Pp]ort"),
        ("http://127.0.0.1/a b\r\nHost: x", "must be escaped"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(RemotePictureError, match=message):
        fetch_picture(url, _settings("127.0.0.1"))
