"""Stage train: which state it goes on from, and what it refuses."""

from pathlib import Path

import pytest
import torch

from gill.artifacts import Artifacts
from gill_errors import StageError
from pipeline.bridge.checkpoint import STATE, CheckpointRecord, TrainingState, save_state
from pipeline.bridge.heads import HeadSizes
from pipeline.frozen.backbones import Backbone
from settings.params import Params
from stages.train import _language_model, _may_resume

PARAMS = Params.model_validate({"training": {"steps": 8}})


def leave_state(folder: Path, step: int, **changed: object) -> Artifacts:
    artifacts = Artifacts(folder)
    parameters = {
        name: getattr(PARAMS, name).model_dump(mode="json")
        for name in ("model", "objective", "training")
    }
    record = CheckpointRecord(sizes=HeadSizes(d=2, e=2), parameters=parameters | changed, step=step)
    save_state(
        artifacts.model / STATE, TrainingState(record, {"x": torch.zeros(1)}, {}, {}, {}, [])
    )
    return artifacts


def test_an_unfinished_run_with_the_same_params_goes_on(tmp_path, capsys):
    assert not _may_resume(PARAMS, Artifacts(tmp_path))
    assert _may_resume(PARAMS, leave_state(tmp_path, 4))
    assert "going on at step 4 of 8" in capsys.readouterr().out


def test_one_with_other_params_is_put_aside(tmp_path, capsys):
    artifacts = leave_state(tmp_path, 4, model={"k": 3})
    assert not _may_resume(PARAMS, artifacts)
    assert "other params (model) was put aside" in capsys.readouterr().out
    assert sorted(path.name for path in artifacts.model.iterdir()) == ["unfinished.safetensors"]


def test_a_restart_after_the_last_step_does_not_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    artifacts = leave_state(tmp_path, 8)
    assert _may_resume(PARAMS, artifacts)
    # A first start trains again, and a restart of it must not find the finished state.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not _may_resume(PARAMS, artifacts)
    assert not (artifacts.model / STATE).exists()


def test_a_quantised_language_model_is_not_sharded():
    backbone = Backbone(
        role="language_model", source="x", path="x", revision=None, fingerprint="f",
        quantization="nf4", widths={"e": 2},
    )  # fmt: skip
    with pytest.raises(StageError, match="does not go with a language model in nf4"):
        _language_model(backbone, torch.device("cpu"), sharded=True)
