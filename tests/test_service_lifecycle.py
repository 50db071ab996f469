"""The service as a process: its port, its patience, and its end."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the service needs the extra `app`: pip install .[app]")

from app.listening import address_of, listen
from app.serving.settings import ServiceSettings, read_settings
from gill_errors import InputError
from tests.told_service import CHAT, body_of, until

ROOT = Path(__file__).parents[1]
TOLD = """
import sys
import pytest
from app.listening import address_of, listen
from app.serving import service
from tests.told_service import Director

director = Director.installed(pytest.MonkeyPatch())
service.Gill.load = lambda _: director.gill
settings = service.ServiceSettings.model_validate_json(sys.argv[1])
with listen("127.0.0.1", 0) as listening:
    service.serve("artifacts", listening, settings=settings)
"""


@contextmanager
def process(**settings: Any) -> Iterator[Any]:
    """A process that serves what a director says."""
    given = ServiceSettings(**settings).model_dump_json()
    command = [sys.executable, "-c", TOLD, given]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as running:
        try:
            assert running.stdout is not None
            said = running.stdout.readline()
            url = said.removeprefix("listening on ").removesuffix(f"{CHAT}\n")
            yield SimpleNamespace(url=url, port=int(url.rpartition(":")[2]), running=running)
        finally:
            running.kill()


def test_termination_answers_all_that_was_accepted_and_takes_nothing_new() -> None:
    with (
        process(timeout_s=3, header_timeout_s=0.5, max_batch=1) as served,
        ThreadPoolExecutor(3) as pool,
    ):
        # Heads that never arrive hold nothing for ever, dripping or not, nor on used connections.
        half = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(200)]
        for number, one in enumerate(half):
            if number == 0:
                one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answered = b""
                while b'"ok"' not in answered:
                    answered += one.recv(10_000)
            one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: lo")
        began = time.monotonic()
        for one in half:
            one.settimeout(10)
            assert one.recv(100) == b""
            one.close()
        assert time.monotonic() - began < 5

        def ask(words: str, stream: bool) -> tuple[int, str]:
            answer = httpx.post(served.url + CHAT, json=body_of(words, stream=stream), timeout=30)
            return answer.status_code, answer.text

        streamed, whole = pool.submit(ask, "hold", True), pool.submit(ask, "hold", False)

        def is_inside(metric: str) -> bool:
            return f"\n{metric} 1.0\n" in httpx.get(f"{served.url}/metrics").text

        until(lambda: is_inside("gill_waiting") and is_inside("gill_running"))
        served.running.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            httpx.post(served.url + CHAT, json=body_of("new"))
        status, text = streamed.result()
        *_, last = [line for line in text.splitlines() if line]
        code = json.loads(last.removeprefix("data: "))["error"]["code"]
        assert (status, code) in [(200, "timeout"), (429, "rate_limit_exceeded")]
        status, text = whole.result()
        code = json.loads(text)["error"]["code"]
        # As it was being answered, or still in line.
        assert (status, code) in [(504, "timeout"), (429, "rate_limit_exceeded")]
        served.running.wait(15)
        assert served.running.returncode == -signal.SIGTERM
        assert served.running.stderr.read() == ""


def test_a_port_is_had_at_once_or_refused_in_one_line() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert address_of(listening) == f"http://127.0.0.1:{port}"
        began = time.monotonic()
        refused = subprocess.run(
            [sys.executable, "-c", "from stages.gill_cli import main; main()",
             "serve", "--port", str(port)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert time.monotonic() - began < 10  # nothing of a model is imported
    assert refused.returncode == 1
    assert refused.stderr == (
        f"error: cannot listen on port {port} of 127.0.0.1: Address already in use\n"
    )
    with pytest.raises(InputError, match="cannot listen on port 80 of no.such.host.invalid"):
        listen("no.such.host.invalid", 80)


def test_every_setting_comes_from_a_file_or_an_option(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(
        "model: ours\ntimeout_s: 30\nlimits: {max_tokens: 64, max_steps: 9}\n"
        'remote: {allowed_hosts: ["a.example"]}\n'
    )
    settings = read_settings(file, timeout_s=60.0, limits_max_tokens=128, model=None)
    assert (settings.model, settings.timeout_s) == ("ours", 60)
    assert (settings.limits.max_tokens, settings.limits.max_steps) == (128, 9)
    assert settings.remote.allowed_hosts == ("a.example",)
    assert read_settings(None) == ServiceSettings()
    for text, told in [
        ("modle: x", r"service.yaml: modle: Extra inputs.*found 'x'"),
        ("limits: {max_tokens: 0}", r"limits.max_tokens: .*greater than or equal to 1 \(found 0\)"),
        ("- a", "expected settings by name"),
        ("a: [", "service.yaml cannot be read"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=told) as refused:
            read_settings(file)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="absent.yaml cannot be read: No such file"):
        read_settings(tmp_path / "absent.yaml")
