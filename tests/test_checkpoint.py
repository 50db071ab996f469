"""Checkpoints: what is in them, what is refused, and that a reader never sees half of one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.bridge import checkpoint
from pipeline.bridge.checkpoint import (
    BEST,
    STATE,
    CheckpointError,
    CheckpointRecord,
    TrainingState,
    load_heads,
    load_state,
    optimizer_tensors,
    put_optimizer_tensors,
    read_record,
    save_heads,
    save_state,
    unlike_run,
)
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.settings import MapperSizes

SIZES = HeadSizes(d=6, e=8, k=2, r=2, L=4, D=5, m=8, p=4, mapper=MapperSizes(kind="linear"))
RECORD = CheckpointRecord(
    sizes=SIZES,
    backbones={"language_model": "a" * 64, "visual_encoder": "b" * 64},
    parameters={"training": {"steps": 10, "betas": [0.9, 0.95], "clip_norm": None}},
    step=7,
    metrics={"recall": 0.5},
)


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(0)
    return Heads(SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_come_back_bit_by_bit_with_their_record(heads, tmp_path, dtype):
    heads.to(dtype)
    save_heads(tmp_path / BEST, heads, RECORD)
    again, record = load_heads(tmp_path / BEST, sizes=SIZES, backbones=RECORD.backbones)
    assert record == RECORD == read_record(tmp_path / BEST)
    for name, tensor in heads.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor)


def test_only_trained_tensors_are_saved(heads, tmp_path):
    save_heads(tmp_path / BEST, heads, RECORD)
    assert load_file(tmp_path / BEST).keys() == dict(heads.named_parameters()).keys()
    with safe_open(tmp_path / BEST, framework="pt") as file:
        assert json.loads(file.metadata()["gill"])["record"]["step"] == 7


def test_every_difference_is_named(heads, tmp_path):
    save_heads(tmp_path / BEST, heads, RECORD)
    other = SIZES.model_copy(update={"e": 16, "mapper": MapperSizes(kind="mlp")})
    with pytest.raises(CheckpointError) as refusal:
        load_heads(
            tmp_path / BEST, sizes=other, backbones=RECORD.backbones | {"visual_encoder": "c"}
        )
    message = str(refusal.value)
    assert "size e is 8 in the checkpoint, 16 here" in message
    assert "size mapper.kind is linear in the checkpoint, mlp here" in message
    assert "visual encoder is another one: bbbbbbbbbbbb in the checkpoint, c here" in message
    assert "language model" not in message


def test_differences_of_parameters():
    same = RECORD.model_copy(update={"step": 9, "metrics": {}})
    assert unlike_run(RECORD, same) == []
    training = {"steps": 20, "betas": (0.9, 0.95), "clip_norm": 1.0, "seed": 3}
    other = RECORD.model_copy(update={"parameters": {"training": training}})
    assert unlike_run(RECORD, other) == [
        "training.clip_norm is None in the checkpoint, 1.0 here",
        "training.seed is absent in the checkpoint, 3 here",
        "training.steps is 10 in the checkpoint, 20 here",
    ]


def test_tensors_that_do_not_fit_their_record_are_named(heads, tmp_path):
    state = heads.state_dict()
    del state["logit_scale"]
    state["text_to_image.bias"] = torch.zeros(3)
    state["surprise"] = torch.zeros(2)
    state["text_to_image.weight"] = state["text_to_image.weight"].half()
    save_file(
        state, tmp_path / BEST, metadata={"gill": f'{{"record": {RECORD.model_dump_json()}}}'}
    )
    with pytest.raises(CheckpointError) as refusal:
        load_heads(tmp_path / BEST)
    for part in (
        "missing logit_scale []",
        "unknown surprise [2]",
        "shape [3], expected [4]",
        "float16",
    ):
        assert part in str(refusal.value)


def test_missing_damaged_and_foreign_files_are_refused(heads, tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        load_heads(tmp_path / BEST)
    save_heads(tmp_path / BEST, heads, RECORD)
    whole = (tmp_path / BEST).read_bytes()
    (tmp_path / BEST).write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        load_heads(tmp_path / BEST)
    save_file(heads.state_dict(), tmp_path / BEST)
    with pytest.raises(CheckpointError, match="holds no record"):
        load_heads(tmp_path / BEST)
    save_heads(tmp_path / STATE, heads, RECORD)
    with pytest.raises(CheckpointError, match="is not a training state"):
        load_state(tmp_path / STATE)


def test_a_failed_write_leaves_the_old_file(heads, tmp_path, monkeypatch):
    save_heads(tmp_path / BEST, heads, RECORD)
    before = (tmp_path / BEST).read_bytes()

    def half(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_heads(tmp_path / BEST, heads, RECORD)
    assert (tmp_path / BEST).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [BEST]


def test_training_state_comes_back_whole(heads, tmp_path):
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1)
    heads.text_to_image.weight.grad = torch.ones_like(heads.text_to_image.weight)
    optimizer.step()
    state = TrainingState(
        record=RECORD,
        heads=heads.state_dict(),
        optimizer=optimizer_tensors(optimizer, heads),
        generators={"coins": torch.Generator().manual_seed(3).get_state()},
        data={"epoch": 2, "step": 5},
        curve=[{"step": 1, "train/loss": 0.1 + 0.2}],
    )
    save_state(tmp_path / STATE, state)
    again = load_state(tmp_path / STATE)
    assert (again.record, again.data, again.curve) == (RECORD, state.data, state.curve)
    for group in ("heads", "optimizer", "generators"):
        ours, theirs = getattr(state, group), getattr(again, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert again.optimizer.keys() == {
        f"text_to_image.weight|{key}" for key in ("step", "exp_avg", "exp_avg_sq")
    }

    # An optimiser that got the state goes on exactly like the one that it came from.
    twin = Heads(SIZES)
    twin.load_state_dict(again.heads)
    other = torch.optim.AdamW(twin.parameters(), lr=0.1)
    put_optimizer_tensors(other, twin, again.optimizer)
    twin.text_to_image.weight.grad = torch.full_like(twin.text_to_image.weight, 0.3)
    heads.text_to_image.weight.grad = torch.full_like(heads.text_to_image.weight, 0.3)
    optimizer.step()
    other.step()
    assert torch.equal(twin.text_to_image.weight, heads.text_to_image.weight)


def test_numbers_that_json_cannot_hold_are_refused(heads, tmp_path):
    state = TrainingState(RECORD, {}, {}, {}, {}, curve=[{"train/loss": float("nan")}])
    with pytest.raises(ValueError, match="JSON"):
        save_state(tmp_path / STATE, dataclasses.replace(state))
    assert not (tmp_path / STATE).exists()
