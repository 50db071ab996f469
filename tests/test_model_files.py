"""Frozen models that are broken in one place: refused at once, in a line that names the place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch

from doctor.models import outline_models
from doctor.weights import check_weights
from gill_errors import GillError
from miniature.backbones import SHIPPED
from pipeline.frozen.backbones import Role
from settings.params import Params
from stages import prepare_backbones

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
LLM, EYE, PAINTER = get_args(Role)
Break = Callable[[Path], object]


def holds(file: str, data: bytes) -> Break:
    return lambda folder: (folder / file).write_bytes(data)


def without(file: str) -> Break:
    def remove(folder: Path) -> None:
        shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return remove


def says(file: str, **keys: Any) -> Break:
    """Keys of a JSON file, of an inner record where they are given as OUTER__KEY; ... drops one."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in keys.items():
            outer, _, inner = key.rpartition("__")
            record = content[outer] if outer else content
            record[inner] = value
            if value is ...:
                del record[inner]
        (folder / file).write_text(json.dumps(content))

    return edit


def weighs(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Break:
    """Other tensors in the language model's file."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)

    return edit


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def pickled(content: Any) -> Break:
    def write(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(content(weights), folder / "pytorch_model.bin")

    return write


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def linked_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/nowhere/blob")


LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "intermediate_size": 384}


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        (LLM, holds("config.json", POINTER), r"/config.json is a git-lfs pointer: run `git lfs p"),
        (LLM, holds("tokenizer.json", POINTER), r"/tokenizer.json is a git-lfs pointer"),
        (PAINTER, holds("tokenizer/tokenizer.json", POINTER), r"tokenizer.json is a git-lfs poi"),
        (PAINTER, holds("scheduler/scheduler_config.json", POINTER), r"config.json is a git-lfs"),
        (LLM, holds("tokenizer.json", b'{"a": "'), r"/tokenizer.json is not JSON \(Unterminated"),
        (
            LLM,
            holds("config.json", b"\xef\xbb\xbf{}"),
            r"/config.json is not JSON \(Unexpected UTF",
        ),
        (LLM, holds("config.json", b"[" * 100_000), r"/config.json is not JSON \(maximum recursio"),
        (LLM, holds("tokenizer.json", b"null"), r"/tokenizer.json holds no object"),
        (PAINTER, holds("scheduler/scheduler_config.json", b"[]"), r"config.json holds no object"),
        (PAINTER, without("scheduler"), r"its tokenizer or scheduler cannot be made: "),
        (PAINTER, without("tokenizer/tokenizer.json"), r"/tokenizer has no tokenizer: files are"),
        (PAINTER, says("model_index.json", _class_name="FluxPipeline"), r"cannot be made: "),
        (PAINTER, says("scheduler/scheduler_config.json", beta_start="x"), r"cannot be made: "),
        (
            PAINTER,
            says("vae/config.json", scaling_factor=None),
            r"vae/config.json: scaling_factor ",
        ),
        (LLM, says("config.json", num_attention_heads=0), r"its config.json: ZeroDivisionError"),
        (LLM, says("config.json", num_attention_heads=7), r"config.json: ValueError: embed_dim m"),
        (EYE, says("open_clip_config.json", model_cfg__vision_cfg=None), r"its open_clip_config"),
        (EYE, says("open_clip_config.json", model_cfg__embed_dim=None), r"its open_clip_config"),
        (LLM, says("config.json", **LLAMA), r"none of the 68 tensors in the weights is one of its"),
        (LLM, says("config.json", num_hidden_layers=...), r"layers\.10\.\S* is missing in the wei"),
        (LLM, says("config.json", num_hidden_layers=3), r"layers\.3\.\S* is in the weights, its c"),
        (LLM, weighs(lambda _: {}), r"none of the 0 tensors in the weights"),
        (
            LLM,
            weighs(lambda all_: {n: t for n, t in all_.items() if "layers.2.fc1" not in n}),
            r"layers\.2\.fc1\.bias is missing in the weights",
        ),
        (LLM, pickled(lambda _: {"a": _Bomb()}), r"/pytorch_model.bin holds Python objects, whic"),
        (LLM, pickled(lambda weights: {"state_dict": weights}), r"none of the 0 tensors in the w"),
        (LLM, sharded, r"index.json names model-00001-of-00002.safetensors, which is not there"),
        (LLM, linked_to_nothing, r"/model.safetensors is a link to /nowhere/blob, which is not th"),
        (
            LLM,
            says("config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
            r"config.json: The repository .* contains custom code",
        ),
    ],
)
def test_what_is_broken_is_named_before_anything_is_computed(
    role: Role, change: Break, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(getattr(SHIPPED, role), folder)
    change(folder)
    params = Params.model_validate({"backbones": {role: str(folder)}})
    with pytest.raises(GillError, match=message) as caught:
        prepare_backbones.run(params, retrain=False)
    assert str(folder) in str(caught.value)
    problems = outline_models(params, None).problems
    assert any(str(folder) in problem for problem in problems)
    assert not (tmp_path / "artifacts/backbones").exists()
    assert not (tmp_path / "exploded").exists()


def test_whole_models_pass(tmp_path: Path) -> None:
    for role in get_args(Role):
        check_weights(role, getattr(SHIPPED, role))
