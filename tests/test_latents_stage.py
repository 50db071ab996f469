"""Stage precompute-latents, and the training that reads its store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stage_runs import refusal, run, write_params
from test_train_stage import BASE
from typer.testing import CliRunner

from cache import open_store, read_rows
from corpora.caption_table import CaptionTable
from evaluation.variants import lay_over
from gill.artifacts import ARTIFACTS
from miniature.backbones import SHIPPED
from pipeline.bridge.checkpoint import read_record
from pipeline.frozen.latent_encoder import load_latent_encoder
from settings.params import ParamsError, parse_params
from stages.cli import app

MANIFEST = ARTIFACTS.latents.with_suffix(".manifest.json")
HEADS = Path("artifacts/model/last.safetensors")
DENOISING = {"objective": {"diffusion_weight": 1.0, "condition_dropout": 0.25}}


def _params(**changes: Any) -> None:
    write_params(**lay_over(BASE, changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _params()
        for stage in ("prepare-captions", "prepare-backbones"):
            run(stage)
        for stage in ("precompute-features", "precompute-targets"):
            run(stage)
        yield folder


def test_where_nobody_asks_nothing_is_made(world: Path) -> None:
    _params()
    assert "nothing to do, objective.diffusion_weight is 0" in run("precompute-latents")
    assert json.loads(MANIFEST.read_text()) == {"content": None}
    assert not ARTIFACTS.latents.exists()
    run("train")
    [entry] = Path("work/training").iterdir()
    # As it was before there was such a loss: what is finished is found by these words.
    decided_by = json.loads((entry / "decided_by.json").read_text())
    assert decided_by["stores"].keys() == {"features", "targets"}
    assert not {"diffusion_weight", "condition_dropout"} & decided_by["objective"].keys()
    _params(**DENOISING)
    assert "run `stages precompute-latents`" in refusal("train")
    shutil.copy(HEADS, "regression.safetensors")
    shutil.rmtree("work/training")


def test_latents_are_those_of_every_row_and_training_goes_on_bit_by_bit(world: Path) -> None:
    _params(**DENOISING)
    table = CaptionTable(ARTIFACTS.captions)
    assert f"this run encoded {len(table)} " in run("precompute-latents")
    assert "nothing to do" in run("precompute-latents")
    assert open_store(ARTIFACTS.latents).spec.arrays["posterior"].shape == (2, 4, 8, 8)
    rows = np.asarray([0, 5, len(table) - 1])
    stored = read_rows(ARTIFACTS.latents, rows, ["posterior"])["posterior"]
    encoder = load_latent_encoder(str(SHIPPED.image_generator))
    pictures = [encoder.preprocess(Image.open(name)) for name in table.images(rows)]
    expected = encoder.encode(pictures).half().numpy()
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-4)

    run("train")
    whole = load_file(HEADS)
    record = read_record(HEADS)
    assert record.parameters["objective"]["diffusion_weight"] == 1.0
    assert record.metrics["validation/diffusion"] > 0
    shutil.rmtree("work/training")

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.head_training.show_progress", stop)
        assert CliRunner().invoke(app, ["train"]).exit_code == 130
    assert "going on from the last state" in run("train")
    resumed = load_file(HEADS)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_it_goes_on_from_heads_of_the_regression(world: Path) -> None:
    """Those of the first test."""
    training = {"start_from": "regression.safetensors", "steps": 1}
    _params(**DENOISING, training=training)
    run("train")
    before, after = load_file("regression.safetensors"), load_file(HEADS)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {"image_embeddings", "mapper.queries"} <= moved


def test_a_store_that_is_no_longer_asked_for_can_be_pruned(world: Path) -> None:
    _params(**DENOISING)
    run("precompute-latents")
    [store] = Path("work/latents").iterdir()
    run("work", "--prune")
    assert ARTIFACTS.latents.is_symlink()
    assert store.exists()
    _params()
    run("precompute-latents")
    assert not ARTIFACTS.latents.is_symlink()
    assert store.exists()
    run("work", "--prune")
    assert not store.exists()


def test_it_is_of_plain_captions_alone() -> None:
    with pytest.raises(ParamsError, match="the denoising loss is of plain captions alone"):
        parse_params({**DENOISING, "model": {"turns": "chat"}}, Path("params.yaml"))


def test_a_unet_in_float16_is_refused() -> None:
    backbones = {"image_generator_dtype": "float16"}
    with pytest.raises(ParamsError, match="gradients pass through the UNet, and underflow"):
        parse_params({**DENOISING, "backbones": backbones}, Path("params.yaml"))
