"""Fetching a candidate picture by its address, from hosts that somebody has allowed and no others.

Web-scale captions (CC3M, LAION) are lists of addresses. An address in an index is input from
outside: fetching it can reach into a private network, never end, or fill the memory. So nothing is
fetched unless its host is on the list in the parameters, which is empty by default.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image
from pydantic import Field

from gill_errors import InputError
from gill_records import Record

_PORTS = {"http": 80, "https": 443}
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_REDIRECTS = 3


class RemotePictureError(InputError):
    """A picture was not fetched: its address, and why."""


class RemotePictureSettings(Record):
    """What may be fetched. With no allowed host, nothing is."""

    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description='hosts, exactly as in the address: "images.example.org" (ports 80 and 443) or '
        '"images.example.org:8080". A private or loopback address is reached only if it is listed '
        'itself, as in "127.0.0.1:8000"',
    )
    timeout_s: float = Field(
        default=10.0, gt=0, description="seconds for one picture, redirects included"
    )
    max_bytes: int = Field(default=10_000_000, gt=0, description="largest file")
    max_pixels: int = Field(default=50_000_000, gt=0, description="largest width times height")


def fetch_picture(url: str, settings: RemotePictureSettings) -> Image.Image:
    """The picture at `url` as RGB, or RemotePictureError with the reason.

    http and https only, no user name in the address; the host must be allowed, also after a
    redirect, which must stay on the same host and may not leave https. The connection goes to the
    address that was checked. The whole transfer ends within `timeout_s` of the connection attempt
    (the resolver's own time comes on top).
    """
    deadline = time.monotonic() + settings.timeout_s
    target = _parsed(url)
    for _ in range(_REDIRECTS + 1):
        _check_allowed(target, settings)
        try:
            answer = _get(target, settings, deadline)
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() >= deadline
            reason = f"took longer than {settings.timeout_s} s" if late else str(error)
            raise RemotePictureError(f"{target.geturl()}: {reason}") from error
        if isinstance(answer, bytes):
            return _decoded(answer, url, settings)
        moved = _parsed(urljoin(target.geturl(), answer))
        if moved.hostname != target.hostname or (target.scheme, moved.scheme) == ("https", "http"):
            raise RemotePictureError(f"{url}: redirects to {moved.geturl()}, which is refused")
        target = moved
    raise RemotePictureError(f"{url}: more than {_REDIRECTS} redirects")


def _parsed(url: str) -> SplitResult:
    try:
        target = urlsplit(url)
        target.port  # noqa: B018 - reading it checks it
    except ValueError as error:
        raise RemotePictureError(f"{url}: {error}") from error
    if target.scheme not in _PORTS:
        raise RemotePictureError(f"{url}: only http and https are fetched")
    if not target.hostname or "@" in target.netloc:
        raise RemotePictureError(f"{url}: expected a host and no user name")
    if any(ord(character) <= 32 or ord(character) > 126 for character in url):
        raise RemotePictureError(f"{url!r}: spaces and characters beyond ASCII must be escaped")
    return target


def _port(target: SplitResult) -> int:
    return target.port or _PORTS[target.scheme]


def _is_listed(host: str, port: int, settings: RemotePictureSettings) -> bool:
    name = f"[{host}]" if ":" in host else host
    listed = {entry.lower() for entry in settings.allowed_hosts}
    return f"{name}:{port}" in listed or (port in _PORTS.values() and name in listed)


def _check_allowed(target: SplitResult, settings: RemotePictureSettings) -> None:
    host = target.hostname or ""
    if not _is_listed(host, _port(target), settings):
        raise RemotePictureError(
            f"{target.geturl()}: {host} (port {_port(target)}) is not on the list of allowed hosts"
        )


def _public_address(target: SplitResult, settings: RemotePictureSettings) -> str:
    """The numeric address to connect to; private ones only where they are listed themselves."""
    host, port = target.hostname or "", _port(target)
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        numeric = str(address[0]).partition("%")[0]
        parsed = ipaddress.ip_address(numeric)
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        if parsed.is_global and not parsed.is_multicast:
            return numeric
        if _is_listed(numeric, port, settings):
            return numeric
    raise RemotePictureError(f"{target.geturl()}: {host} is a private address that is not listed")


def _get(target: SplitResult, settings: RemotePictureSettings, deadline: float) -> bytes | str:
    """The body, or where a redirect points."""
    host, port = target.hostname or "", _port(target)
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("too late")
    # Connecting by number keeps a second, different answer of the resolver out.
    address = (_public_address(target, settings), port)
    connection = socket.create_connection(address, timeout=remaining)
    if target.scheme == "https":
        connection = ssl.create_default_context().wrap_socket(
            connection, server_hostname=host, do_handshake_on_connect=False
        )
    with _closed_at(connection, deadline):
        if isinstance(connection, ssl.SSLSocket):
            connection.do_handshake()
        client = http.client.HTTPConnection(host, port)
        client.sock = connection
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        client.request("GET", path, headers={"Accept": "image/*", "User-Agent": "gill"})
        answer = client.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.getheader("Location") or ""
        if answer.status != 200:
            raise RemotePictureError(f"{target.geturl()}: answered {answer.status}")
        if (answer.length or 0) > settings.max_bytes:
            raise RemotePictureError(
                f"{target.geturl()}: {answer.length} bytes, more than {settings.max_bytes}"
            )
        body = answer.read(settings.max_bytes + 1)
        if time.monotonic() >= deadline:
            raise TimeoutError("too late")
    if len(body) > settings.max_bytes:
        raise RemotePictureError(f"{target.geturl()}: more than {settings.max_bytes} bytes")
    return body


@contextlib.contextmanager
def _closed_at(connection: socket.socket, deadline: float) -> Iterator[None]:
    """Cut the connection at the deadline: a server that drips bytes meets no other timeout."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # below TLS, which may be stuck

    timer = threading.Timer(max(deadline - time.monotonic(), 0), cut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()


def _decoded(body: bytes, url: str, settings: RemotePictureSettings) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(body), formats=_FORMATS)
        width, height = picture.size
        if width * height > settings.max_pixels:
            raise RemotePictureError(
                f"{url}: {width} x {height} pixels, more than {settings.max_pixels}"
            )
        return picture.convert("RGB")
    except RemotePictureError:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise RemotePictureError(f"{url}: not a readable picture: {error}") from error
