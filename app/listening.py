"""Serving an ASGI application on a port that is taken before anything slow begins."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gill_errors import InputError


def listen(host: str, port: int, *, guarded: bool = True) -> socket.socket:
    """A socket that listens; with port 0 on a free one. Who connects waits until it is served.

    Raises InputError where that port cannot be had, or other machines reach it and what will be
    served there is not `guarded`, by a key for example.
    """
    if not guarded and not is_loopback(host):
        raise InputError(
            f"{host} can be reached from other machines: give an API key, or bind to 127.0.0.1"
        )
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        number = error.errno or 0  # negative: of the resolver
        reason = os.strerror(number) if number > 0 else str(error.strerror)
        raise InputError(f"cannot listen on port {port} of {host}: {reason}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(listening: socket.socket) -> str:
    """The beginning of its web addresses."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: ASGIApp, listening: socket.socket, *, header_timeout_s: float = 10.0, grace_s: float = 10.0
) -> None:
    """Serve until interrupted or terminated; what was accepted by then has `grace_s` seconds."""

    class Protocol(_Impatient):
        header_timeout = header_timeout_s

    config = uvicorn.Config(
        app,
        http=Protocol,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(grace_s)),
        ws="none",
    )
    uvicorn.Server(config).run(sockets=[listening])


class _Impatient(H11Protocol):
    """uvicorn's protocol, whose own patience with the head of a request has no end."""

    header_timeout: float
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """While a head has not arrived, there is a time for it, however it drips."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(self.header_timeout, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
