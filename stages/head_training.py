"""How the heads are trained: the frozen language model, rows of both stores, what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corpora.caption_table import CaptionTable
from corpora.chat_requests import phrasings
from corpora.document_table import read_document_table
from gill.artifacts import Artifacts
from gill.frozen import read_backbones
from gill_errors import StageError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.checkpoint import CurvePoint
from pipeline.bridge.document_objective import read_documents
from pipeline.bridge.documents import DocumentBatch
from pipeline.bridge.heads import Heads, HeadSizes, mean_image_embeddings, word_image_embeddings
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.streams import pair_rows
from pipeline.devices import quieten_libraries, set_up
from pipeline.frozen.backbones import Backbone, Backbones
from pipeline.frozen.language_model import LanguageModel, load_language_model
from pipeline.training.distribution import num_processes, rank
from pipeline.training.loggers import Loggers
from pipeline.training.loop import train
from pipeline.training.progress import DvcliveLog, TrainingProgress, show_progress
from pipeline.training.sharding import load_sharded_language_model
from settings.params import BatchesParams, ModelParams, Params
from stages.cached_batches import BatchMaker, CachedBatches, EncodeCaptions
from stages.chat_batches import ChatBatches, asked_and_shown
from stages.chat_documents import ChatDocuments
from stages.document_batches import DocumentBatches, DocumentMaker
from stages.mixed_batches import MixedBatches
from stages.reply_file import read_replies
from stages.trained_weights import read_captioning, read_weights
from stages.validation_rows import contents_of, one_row_per_picture

if TYPE_CHECKING:
    from pipeline.frozen.denoiser import Denoiser
    from stages.validation_pictures import ValidationPictures

_PICTURES = 8
_STATES = 128  # training rows whose states say how states are standardised


def train_heads(
    params: Params, artifacts: Artifacts, folder: Path, curve: Path, *, resume: bool
) -> None:
    """Train, or go on from the state in `folder`; this is one process of torchrun, or all.

    Writes `last.safetensors`, `best.safetensors` and `state.safetensors` to `folder`, and the curve
    to the folder `curve`. To be called within `pipeline.training.distribution.processes()`.
    """
    device = set_up(params.run.device, params.run.threads)
    backbones = read_backbones(artifacts)
    table = CaptionTable(artifacts.captions)
    settings = params.training_settings
    language_model = _language_model(params, backbones.language_model, device)
    # Seeded, hence alike in all processes and whatever was drawn while loading.
    heads = _first_heads(params, backbones, language_model).to(device)
    objective = params.objective
    if params.training.captioning_from is not None:  # W_cap is there: its pass is left out
        objective = objective.model_copy(update={"captioning_weight": 0.0})
    maker = BatchMaker(
        table,
        language_model,
        params.batches.max_caption_tokens,
        _online_encoder(params, backbones, device),
        artifacts,
        with_latents=bool(objective.diffusion_weight),
    )
    batches = _batches(params, artifacts, maker, table, language_model)
    # The same rows in every process: the passes of a sharded model are common ones.
    held_out = one_row_per_picture(table, maker.usable(table.rows_of_split("val")))
    held_out = held_out[: params.batches.validation_rows]
    # No larger than what training reads at once, as it needs no more memory then.
    part = settings.micro_batch_size or max(len(held_out), 1)
    validation: list[CaptionBatch | DocumentBatch] = [
        maker.read(held_out[i : i + part]) for i in range(0, len(held_out), part)
    ]
    if language_model.turns is not None:
        documents = ChatDocuments(
            language_model, phrasings("held_out"), params.batches.max_caption_tokens
        )
        validation = [
            asked_and_shown(table, documents, seen)
            for seen in validation
            if isinstance(seen, CaptionBatch)
        ]
    model = MultimodalLanguageModel(language_model, heads)
    if params.model.standardizes_states and params.training.start_from is None:
        heads.standardize_by(_first_states(model, maker, table, params.batches))
    if objective.diffusion_weight:
        model.denoiser = _denoiser(params, backbones, device)
    with _logging(params, backbones, model, folder, curve, table, held_out) as (log, told):
        result = train(
            model,
            batches,
            objective,
            settings,
            directory=folder,
            validation=validation,
            contents=torch.from_numpy(contents_of(table, held_out, params, artifacts)),
            backbones=backbones.fingerprints,
            parameters={"model": params.model.model_dump(mode="json")},
            resume=resume,
            log=log,
            on_progress=told,
        )
    if rank() == 0:
        if isinstance(batches, MixedBatches) and batches.num_cut:
            print(
                f"{batches.num_cut} documents did not fit and were cut at their end (of several "
                "epochs each counts anew; batches.max_document_tokens)"
            )
        if isinstance(batches, ChatBatches) and batches.num_left_out:
            print(
                f"{batches.num_left_out} replies of the stream joined were left out: features or "
                "targets of their rows could not be computed (stages inspect-cache)"
            )
        for name, value in result.metrics.items():
            print(f"{name}: {value:.4f}")


def _batches(
    params: Params,
    artifacts: Artifacts,
    maker: BatchMaker,
    table: CaptionTable,
    language_model: LanguageModel,
) -> CachedBatches | MixedBatches | ChatBatches:
    """Captions, or what `training.mixture` says."""
    shares, settings, batches = params.stream_shares, params.training_settings, params.batches
    where: dict[str, int] = {"seed": settings.seed, "rank": rank(), "world_size": num_processes()}
    if language_model.turns is not None:
        return ChatBatches(
            maker,
            table,
            ChatDocuments(language_model, phrasings("train"), batches.max_caption_tokens),
            read_replies(artifacts.replies) if params.needs_replies else [],
            table.rows_of_split("train"),
            shares,
            reading=params.reading,
            **where,
        )
    captions = documents = None
    if shares.get("captions"):
        captions = CachedBatches(
            maker,
            table.rows_of_split("train"),
            batch_size=shares["captions"],
            reading=params.reading,
            **where,
        )
    if shares.get("documents"):
        model = params.model
        writer = DocumentMaker(
            language_model,
            model.k,
            model.r,
            batches.max_document_tokens,
            batches.documents_without_pictures_between,
        )
        texts = read_document_table(artifacts.documents)
        documents = DocumentBatches(maker, writer, texts, batch_size=shares["documents"], **where)
    if documents is None and captions is not None:
        return captions
    return MixedBatches(captions, documents)


@contextmanager
def _logging(
    params: Params,
    backbones: Backbones,
    model: MultimodalLanguageModel,
    folder: Path,
    curve: Path,
    table: CaptionTable,
    held_out: np.ndarray,
) -> Iterator[tuple[Callable[[CurvePoint], None] | None, Callable[[TrainingProgress], None]]]:
    """What takes the rows of the curve, and what is told how it goes; the first process alone."""
    if rank() != 0:
        yield None, show_progress
        return
    run = params.run
    pictures: ValidationPictures | None = None
    if run.pictures_every and len(held_out):
        # Here, as most runs make no picture: diffusers takes seconds to import.
        from stages.validation_pictures import ValidationPictures

        quieten_libraries()
        captions = table.captions(held_out[:_PICTURES])
        pictures = ValidationPictures(model, backbones, captions, params.generation_settings)
    parameters = params.model_dump(mode="json", include={"model", "objective", "training"})
    with (
        DvcliveLog(curve) as dvclive,
        Loggers(run.loggers, folder / "loggers", f"gill-{folder.name}", parameters) as loggers,
    ):

        def log(row: CurvePoint) -> None:
            dvclive(row)
            loggers.log(row)

        def told(progress: TrainingProgress) -> None:
            show_progress(progress)
            # Only here are the weights those of this step: a resumed run logs its past first.
            if pictures is not None and progress.step % run.pictures_every == 0:
                grid = pictures.draw()
                dvclive.show(grid, progress.step)
                loggers.show(grid, progress.step)

        yield log, told


def _first_heads(params: Params, backbones: Backbones, language_model: LanguageModel) -> Heads:
    """Untrained heads, or those that `training.start_from` and `captioning_from` name."""
    heads = new_heads(params.model, backbones, language_model)
    if params.training.start_from is not None:
        found = read_weights(params.training.start_from, params, backbones).heads
        heads.load_state_dict(found.state_dict())
    if params.training.captioning_from is not None:
        captioning = read_captioning(params.training.captioning_from, params, backbones)
        heads.caption_projection.load_state_dict(captioning.state_dict())
    return heads


@torch.no_grad()
def _first_states(
    model: MultimodalLanguageModel, maker: BatchMaker, table: CaptionTable, batches: BatchesParams
) -> Float[Tensor, "N r e"]:
    """[IMG] states behind training captions; the same in every process."""
    rows = maker.usable(table.rows_of_split("train"))
    seen = maker.read(rows[:: -(-len(rows) // _STATES)])
    if model.language_model.turns is None:
        alone = pair_rows(len(seen), [False] * (len(seen) // 2))
        return model.image_tokens(seen, alone, False, True).hidden
    documents = ChatDocuments(model.language_model, phrasings("train"), batches.max_caption_tokens)
    return read_documents(model, asked_and_shown(table, documents, seen)).drawn


def _language_model(params: Params, backbone: Backbone, device: torch.device) -> LanguageModel:
    chosen = params.training.language_model_dtype
    dtype = backbone.torch_dtype if chosen is None else getattr(torch, chosen)
    if params.training_settings.shard_language_model:
        return load_sharded_language_model(backbone.path, dtype, device, backbone.chat)
    return load_language_model(
        backbone.path, dtype, device, quantization=backbone.quantization, chat=backbone.chat
    )


def _online_encoder(
    params: Params, backbones: Backbones, device: torch.device
) -> EncodeCaptions | None:
    """The generator's text encoder, where targets are not to come from the cache."""
    if params.targets.source == "cache":
        return None
    from pipeline.frozen.text_conditioner import load_text_conditioner

    quieten_libraries()
    generator = backbones.image_generator
    return load_text_conditioner(generator.path, dtype=generator.torch_dtype, device=device).encode


def _denoiser(params: Params, backbones: Backbones, device: torch.device) -> Denoiser:
    """The generator's UNet, and its text encoder's empty prompt where conditions are dropped."""
    from pipeline.frozen.denoiser import load_denoiser
    from pipeline.frozen.text_conditioner import load_text_conditioner

    quieten_libraries()
    generator, empty = backbones.image_generator, None
    to: dict[str, Any] = {"dtype": generator.torch_dtype, "device": device}
    if params.objective.condition_dropout:
        empty = load_text_conditioner(generator.path, **to).unconditional()
    denoiser = load_denoiser(generator.path, **to, empty=empty)
    if params.run.recompute_activations:
        denoiser.recompute_activations()
    return denoiser


def new_heads(params: ModelParams, backbones: Backbones, language_model: LanguageModel) -> Heads:
    """Untrained heads whose widths come from the frozen models.

    Raises StageError where words for the [IMG] rows are too few.
    """
    torch.manual_seed(params.seed)
    heads = Heads(HeadSizes.model_validate({**backbones.widths, **params.sizes}))
    init = params.image_token_init
    if init.kind == "words":
        try:
            rows = word_image_embeddings(language_model, params.r, init.texts)
        except ValueError as error:
            raise StageError(f"model.image_token_init.texts: {error}") from None
    else:
        rows = mean_image_embeddings(language_model, params.r)
    heads.set_image_embeddings(rows)
    return heads
