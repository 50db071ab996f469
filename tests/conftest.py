"""Shared fixtures, and the import hook that checks every tensor shape in `pipeline` at run time."""

import os
from collections.abc import Iterator

# One thread per process: small models are slower with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import httpx
import pytest
from jaxtyping import install_import_hook

install_import_hook("pipeline", "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the shared test data; tests that need it skip, saying so, without it."""
    folder = Path(os.environ.get("GILL_SHARED_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"shared test data not found at {folder}: set GILL_SHARED_DATA")
    return folder.resolve()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a local server that speaks S3: its URL."""
    fsspec = pytest.importorskip("fsspec")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    # moto keeps what was written in the process, not in the server: an earlier test's too
    httpx.post(f"http://{host}:{port}/moto-api/reset").raise_for_status()
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps that of another server
    fsspec.filesystem("s3").mkdir("corpus")
    yield "s3://corpus"
    running.stop()
