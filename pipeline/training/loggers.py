"""The curve in the loggers that a laboratory uses, beside dvclive: thin adapters, each an extra.

    with Loggers(["wandb", "tensorboard"], folder, "gill-1f3a", parameters) as loggers:
        loggers.log(row)              # a row of the curve, as `train` gives them
        loggers.show(picture, 250)    # the validation grid of step 250

Nothing is sent anywhere unless the library's own environment variable says where to
(WANDB_MODE=online, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID); without it each writes below `folder`.
What has been logged is remembered there: a run that was killed and goes on, which gives its whole
curve again, continues the same run of each logger and logs no point twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from gill_errors import InputError
from gill_files import written_whole
from pipeline.bridge.checkpoint import CurvePoint

_PROJECT = "gill"


class Logger(Protocol):
    """One library; `run_id` is what it calls this run by, so that it can go on with it."""

    run_id: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Points of the curve."""

    def show(self, picture: Image.Image, step: int) -> None:
        """The grid of pictures."""

    def close(self) -> None:
        """Have everything written."""


class _Wandb:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run_id: str | None):
        os.environ.setdefault("WANDB_MODE", "offline")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own counter only grows; ours is the step of training.
        self._run.define_metric("*", step_metric="step")
        self._picture = wandb.Image
        self.run_id = self._run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def show(self, picture: Image.Image, step: int) -> None:
        self._run.log({"validation/pictures": self._picture(picture), "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run_id: str | None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=where)
        if run_id is None:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = self._client.get_experiment_by_name(project)
            if experiment is not None:
                number = experiment.experiment_id
            elif where.startswith("sqlite:"):
                location = (folder / "mlflow").absolute().as_uri()
                number = self._client.create_experiment(project, artifact_location=location)
            else:
                number = self._client.create_experiment(project)
            run_id = self._client.create_run(number, run_name=name).info.run_id
            for key, value in _flat(config).items():
                self._client.log_param(run_id, key, value)
        self.run_id = run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self.run_id, name, value, step=step)

    def show(self, picture: Image.Image, step: int) -> None:
        self._client.log_image(self.run_id, picture, artifact_file=f"pictures/{step:06d}.png")

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class _Trackio:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run_id: str | None):
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
        import trackio

        self.run_id = run_id or name
        self._run = trackio.init(
            project=_PROJECT,
            name=self.run_id,
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._picture = trackio.Image

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def show(self, picture: Image.Image, step: int) -> None:
        self._run.log({"validation/pictures": self._picture(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run_id: str | None):
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or name
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        if run_id is None:
            self._writer.add_text("parameters", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def show(self, picture: Image.Image, step: int) -> None:
        from torchvision.transforms.functional import pil_to_tensor

        self._writer.add_image("validation/pictures", pil_to_tensor(picture), step)

    def close(self) -> None:
        self._writer.close()


LOGGERS: dict[str, Callable[[Path, str, Mapping[str, Any], str | None], Logger]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
    "tensorboard": _Tensorboard,
}


class Loggers:
    """All loggers of a run; `dvclive`, which is always there, is not one of them.

    Args:
        names: some of `LOGGERS`, and `dvclive`, which is passed over.
        folder: below it local ones write, and loggers.json says what has been logged.
        name: of the run, for people.
        parameters: what the run was made with.

    Raises InputError naming the command that installs a library which is missing.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, name: str, parameters: Mapping[str, Any]
    ) -> None:
        self._file = folder / "loggers.json"
        self._logged: dict[str, dict[str, Any]] = {}
        if self._file.is_file():
            self._logged = json.loads(self._file.read_text(encoding="utf-8"))
        self._loggers: dict[str, Logger] = {}
        for kind in names:
            if kind == "dvclive":
                continue
            folder.mkdir(parents=True, exist_ok=True)
            before = self._logged.setdefault(kind, {"run": None, "last": {}})
            try:
                logger = LOGGERS[kind](folder, name, parameters, before["run"])
            except ImportError as error:
                raise InputError(
                    f"run.loggers: {kind} is missing ({error}): pip install '.[{kind}]'"
                ) from None
            self._loggers[kind] = logger
            before["run"] = logger.run_id
        self._remember()

    def log(self, row: CurvePoint) -> None:
        """Log a row, but where it was logged before."""
        step = int(row["step"])
        values = {key: value for key, value in row.items() if key != "step"}
        if values:
            kind = next(iter(values)).partition("/")[0]
            self._each(kind, step, lambda logger: logger.log(values, step))

    def show(self, picture: Image.Image, step: int) -> None:
        """Log a grid of pictures, but where it was logged before."""
        self._each("pictures", step, lambda logger: logger.show(picture, step))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *error: object) -> None:
        for logger in self._loggers.values():
            logger.close()

    def _each(self, kind: str, step: int, write: Callable[[Logger], None]) -> None:
        for name, logger in self._loggers.items():
            last = self._logged[name]["last"]
            if step > last.get(kind, -1):
                write(logger)
                last[kind] = step
        self._remember()

    def _remember(self) -> None:
        if self._loggers:
            with written_whole(self._file) as part:
                part.write_text(json.dumps(self._logged, indent=1) + "\n", encoding="utf-8")


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
