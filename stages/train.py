"""Stage train: the heads against the frozen language model."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch

from app.artifacts import Artifacts
from corpora.caption_table import CaptionTable
from pipeline.backbones import Backbone, Backbones
from pipeline.checkpoint import STATE, read_record
from pipeline.gill import Gill
from pipeline.heads import (
    Heads,
    HeadSizes,
    mean_image_embeddings,
    word_image_embeddings,
)
from pipeline.language_model import LanguageModel, load_language_model
from pipeline.sharding import load_sharded_language_model
from pipeline.text_conditioner import load_text_conditioner
from pipeline.training import DvcliveLog, from_first_process, processes, show_progress, train
from stages.cached_batches import BatchMaker, CachedBatches, EncodeCaptions
from stages.devices import set_up
from stages.failures import StageError
from stages.params import ModelParams, Params
from stages.paths import ARTIFACTS, METRICS


def run(params: Params, artifacts: Artifacts = ARTIFACTS, metrics: Path = METRICS) -> None:
    """Train, or go on where an unfinished run with the same params stopped."""
    device = set_up(params.run)
    backbones = Backbones.read(artifacts.backbones)
    table = CaptionTable(artifacts.captions)
    with processes() as rank:
        language_model = _language_model(
            backbones.language_model, device, params.training.shard_language_model
        )
        heads = new_heads(params.model, backbones, language_model).to(device)
        maker = BatchMaker(
            table,
            language_model,
            params.batches.max_caption_tokens,
            _online_encoder(params, backbones, device),
            artifacts,
        )
        batches = CachedBatches(
            maker,
            table.rows_of_split("train"),
            batch_size=params.training.batch_size,
            seed=params.training.seed,
            rank=rank,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            reading=params.batches.reading,
        )
        held_out = table.rows_of_split("val")[: params.batches.validation_rows]
        part = params.training.micro_batch_size or max(len(held_out), 1)
        validation = [maker.read(held_out[i : i + part]) for i in range(0, len(held_out), part)]
        parameters = {"model": params.model.model_dump(mode="json")}
        resume = from_first_process(_may_resume(params, artifacts) if rank == 0 else False)
        with DvcliveLog(metrics / "train") if rank == 0 else nullcontext() as log:
            result = train(
                Gill(language_model, heads),
                batches,
                params.objective,
                params.training,
                directory=artifacts.model,
                validation=validation,
                backbones=backbones.fingerprints,
                parameters=parameters,
                resume=resume,
                log=log,
                on_progress=show_progress,
            )
        if rank == 0:
            for name, value in result.metrics.items():
                print(f"{name}: {value:.4f}")


def _language_model(backbone: Backbone, device: torch.device, sharded: bool) -> LanguageModel:
    if sharded and backbone.quantization != "none":
        raise StageError(
            f"training.shard_language_model does not go with a language model in "
            f"{backbone.quantization}: set backbones.language_model_quantization to none"
        )
    if sharded:
        return load_sharded_language_model(backbone.path, backbone.torch_dtype, device)
    return load_language_model(
        backbone.path, backbone.torch_dtype, device, quantization=backbone.quantization
    )


def _online_encoder(
    params: Params, backbones: Backbones, device: torch.device
) -> EncodeCaptions | None:
    """The generator's text encoder, where targets are not to come from the cache."""
    if params.targets.source == "cache":
        return None
    generator = backbones.image_generator
    return load_text_conditioner(generator.path, dtype=generator.torch_dtype, device=device).encode


def new_heads(params: ModelParams, backbones: Backbones, language_model: LanguageModel) -> Heads:
    """Untrained heads whose widths come from the frozen models.

    Raises StageError where words for the [IMG] rows are too few.
    """
    generator = backbones.image_generator.widths
    sizes = HeadSizes(
        d=backbones.visual_encoder.widths["d"],
        e=language_model.width,
        k=params.k,
        r=params.r,
        L=generator["L"],
        D=generator["text_width"],
        m=params.m,
        p=params.p,
        D_pooled=generator.get("pooled_width"),
        mapper=params.mapper,
    )
    torch.manual_seed(params.seed)
    heads = Heads(sizes)
    init = params.image_token_init
    if init.kind == "words":
        try:
            rows = word_image_embeddings(language_model, params.r, init.text)
        except ValueError as error:
            raise StageError(f"model.image_token_init.text: {error}") from None
    else:
        rows = mean_image_embeddings(language_model, params.r)
    heads.set_image_embeddings(rows)
    return heads


def _may_resume(params: Params, artifacts: Artifacts) -> bool:
    """Whether an unfinished run with these params lies there; one with others is put aside."""
    state = artifacts.model / STATE
    if not state.exists():
        return False
    record = read_record(state)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if record.step >= params.training.steps and not restarted:
        state.unlink()  # of an earlier run: a restart of this one must not take it for its own
        return False
    ours = {
        "model": params.model.model_dump(mode="json"),
        "objective": params.objective.model_dump(mode="json"),
        "training": params.training.model_dump(mode="json"),
    }
    changed = sorted(name for name in ours if record.parameters.get(name) != ours[name])
    if changed:
        aside = state.with_name("unfinished.safetensors")
        state.replace(aside)
        print(
            f"an unfinished run with other params ({', '.join(changed)}) was put aside as {aside}; "
            "starting over"
        )
        return False
    print(f"going on at step {record.step} of {params.training.steps}")
    return True
