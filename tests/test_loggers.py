"""The curve in other loggers: read back by each library's own reader, without a network."""

import json
import os
import socket
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from gill_errors import InputError
from pipeline.training.loggers import LOGGERS, Loggers

ROWS = [
    {"step": 10, "train/loss": 3.0, "train/learning_rate": 0.1},
    {"step": 20, "train/loss": 2.0, "train/learning_rate": 0.1},
    {"step": 20, "validation/loss": 2.5},
    {"step": 30, "train/loss": 1.5, "train/learning_rate": 0.05},
]
LOSSES = [(10, 3.0), (20, 2.0), (30, 1.5)]
ROOT = Path(__file__).parents[1]
PARAMETERS = {"training": {"steps": 30}, "model": {"r": 8}}
VARIABLES = ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_DIR")


def train_twice(kind, folder):
    """Killed after step 20 was logged, gone on from a state of step 10."""
    grid = Image.new("RGB", (16, 8), "red")
    with Loggers(["dvclive", kind], folder, "gill-1f3a", PARAMETERS) as loggers:
        for row in ROWS[:3]:
            loggers.log(row)
        loggers.show(grid, 20)
    with Loggers([kind], folder, "gill-1f3a", PARAMETERS) as loggers:
        loggers.log(ROWS[0])  # of the past
        for row in ROWS[1:]:  # trained again, but for the last
            loggers.log(row)
        loggers.show(grid, 20)
        loggers.show(grid, 30)
    return json.loads((folder / "loggers.json").read_text())[kind]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No variable asks for anything, and nobody connects elsewhere than to this machine."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_MODE", "TRACKIO_DIR", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # to be undone: adapters set them
        monkeypatch.delenv(name)
    connect = socket.socket.connect

    def watched(self, address):
        here = not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")
        assert here, f"somebody connects to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)


def test_tensorboard(tmp_path):
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="extra `tensorboard` is not installed",
    )
    told = train_twice("tensorboard", tmp_path)
    assert told["last"] == {"train": 30, "validation": 20, "pictures": 30}
    events = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == LOSSES
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(20, 2.5)]
    assert [(e.step, e.width) for e in events.Images("validation/pictures")] == [(20, 16), (30, 16)]


def test_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="extra `mlflow` is not installed")
    told = train_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'gill'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (
        told["run"],
        "gill-1f3a",
        "FINISHED",
    )
    assert run.data.params == {"training.steps": "30", "model.r": "8"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == LOSSES
    pictures = sorted((tmp_path / "mlflow").rglob("*.png"))
    assert [path.name for path in pictures] == ["000020.png", "000030.png"]


def test_wandb(tmp_path):
    wandb = pytest.importorskip("wandb", reason="extra `wandb` is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    told = train_twice("wandb", tmp_path)
    wandb.teardown()  # its service is a process of its own
    points = []
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert folders
    for folder in folders:  # every start has one; `wandb sync` puts them together by their id
        assert folder.name.endswith(told["run"])
        for content in records_of(next(folder.glob("*.wandb")).read_bytes()):
            record = Record()
            record.ParseFromString(content)
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if "train/loss" in items:
                points.append((items["step"], items["train/loss"]))
    assert points == LOSSES
    assert len(list((tmp_path / "wandb").rglob("pictures*.png"))) == 2


def records_of(log: bytes) -> list[bytes]:
    """Of a file of wandb's: LevelDB's log format, after 7 bytes of its own, in blocks of 32 KiB."""
    records, part, place = [], b"", 7
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", log[place + 4 : place + 7])
        part += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(part)
            part = b""
    return records


TRACKIO = """
import sys
import tomllib
from pathlib import Path
from pathlib import Path
from test_loggers import train_twice
told = train_twice("trackio", Path(sys.argv[1]))
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("gill", told["run"])
print([(log["step"], log["train/loss"]) for log in logs if "train/loss" in log])
print([log["step"] for log in logs if "validation/pictures" in log])
"""


def test_trackio(tmp_path):
    """In a process of its own: where it writes is settled when it is first imported."""
    pytest.importorskip("trackio", reason="extra `trackio` is not installed")
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert {str(LOSSES), "[20, 30]"} <= set(done.stdout.splitlines())
    assert list((tmp_path / "trackio").glob("*.db"))


@pytest.mark.parametrize("kind", sorted(LOGGERS))
def test_a_missing_library_is_named_with_its_extra(kind, tmp_path, monkeypatch):
    library = {"tensorboard": "torch.utils.tensorboard"}.get(kind, kind)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"run.loggers: {kind} is missing.*'\.\[{kind}\]'"):
        Loggers([kind], tmp_path, "gill", {})
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kind in extras["optional-dependencies"]
