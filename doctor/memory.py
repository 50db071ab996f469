"""How much memory each kind of work takes, predicted without weights.

    device memory = weights of the frozen models                          n_frozen * bytes each
                  + heads and Adam's two moments                          P * (4 + 8)
                  + targets and features, of the batch and of validation  rows * 4 * (L D + d)
                  + what one step makes, at its fullest moment            a dry run

n_frozen parameters of the frozen models, P trained ones, float32. The last (`doctor.dry_run`) is
mostly what the backward pass needs of the positions that are differentiated, which for OPT with
frozen weights is, per position and layer: the inputs of two norms (2 e), the query and what
attention gives (2 e), what the ReLU gives (4 e), and a key and a value of each position of the
sequence, the captions in front included. A frozen linear layer keeps nothing but its weight. So B
captions of T tokens with r [IMG] tokens each keep, in one pass after the other,

    B * layers * (8 e r + 2 e (T + r)) numbers in the image pass, and
    B * layers * (8 e + 2 e) (k + T)   in the captioning pass, differentiated at every position

to which come the heads' activations, gradients (4 P), one block of logits, and under autocast the
heads' weights in the smaller dtype. The dry run finds these numbers (tests/test_memory.py), and as
well those of other architectures, of recomputation and of micro-batches.

Quantised weights: nf4 takes 4 bits, and 8 more per 64 weights; int8 takes 8 bits, and a float32 per
output row. Embeddings, norms and output rows keep the dtype. A product needs its weight in the
dtype again, one at a time, which the dry run sees too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from doctor.blueprints import GeneratorBlueprint, LanguageModelBlueprint
from doctor.dry_run import DryRun
from pipeline.bridge.batch import CaptionBatch, take_examples
from pipeline.bridge.document_objective import document_losses, document_queries
from pipeline.bridge.documents import DocumentBatch, Words
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.mixed_batch import MixedBatch, corpora_of
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, retrieval_queries, training_losses
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.settings import GenerationSettings, Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.fusion import join_products
from pipeline.training.recomputation import recompute_activations

InTurns = Callable[[CaptionBatch], MixedBatch] | None


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, by what holds them; `peak` is their sum at the fullest moment."""

    weights: int
    """Frozen models."""
    heads: int = 0
    """Trained parameters and Adam's two moments."""
    data: int = 0
    """Batches that lie there, of training and of validation."""
    working: int = 0
    """Activations, kept keys and values, blocks of logits, gradients, copies in a smaller dtype."""
    flop: float = 0.0
    """Operations of what was run, per row."""

    def with_validation(self, other: Memory) -> Memory:
        """Training that is interrupted by validation, whose rows lie there all the time."""
        return replace(self, data=self.data + other.data, working=max(self.working, other.working))

    @property
    def peak(self) -> int:
        """Most bytes at one time."""
        return self.weights + self.heads + self.data + self.working


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def training_memory(
    language_model: LanguageModelBlueprint,
    sizes: HeadSizes,
    objective: Objective,
    settings: TrainingSettings,
    *,
    caption_tokens: Sequence[int],
    turns: InTurns = None,
    draws: PackingDraws | None = None,
    device_type: str = "cuda",
) -> Memory:
    """Peak memory of `pipeline.training.loop.train` in one process, and the operations per example;
    validation apart.

    Args:
        caption_tokens: lengths of the captions of a batch, repeated until there are enough.
        turns: what is read in place of captions: turns of a chat model, or documents too.
        draws: which pairs of the examples that are read at once share sequences; by default what
            the objective makes likely (`likely_draws`).
        device_type: `cpu` or `cuda`; what is thought of, not what is here.

    Raises:
        ValueError: what `training_losses` refuses; the message says why.
    """
    part_size = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    with torch.device("meta"):
        heads = Heads(sizes).to(getattr(torch, objective.trained_dtype))
    trained = sum(parameter.numel() * parameter.element_size() for parameter in heads.parameters())
    corpora = corpora_of(_batch(caption_tokens, settings.batch_size, sizes, turns))
    parts = [part for corpus in corpora for part in _parts(corpus, part_size)]

    def one_part(model: LanguageModel) -> tuple[int, int]:
        run, flop = DryRun(device_type), 0.0
        gill = _DryGill(model, heads, run)
        if settings.fuse_layers:
            join_products(model)
        if settings.recompute_activations:
            recompute_activations(model)
        # One part after the other, as a step reads them.
        for part, times in parts:
            before = run.ledger.flop
            coins = draws or likely_draws(len(part), objective)
            run(partial(backpropagate, gill, _alone(part), objective, coins))
            # They stay on meta too: the next part would take them for what was there before it.
            heads.zero_grad()
            flop += times * (run.ledger.flop - before)
            if part_size < settings.batch_size and objective.retrieval_weight:
                run(partial(_queries, gill, part, objective, coins))
        peak = run.ledger.peak
        if len(parts) > 1 or parts[0][1] > 1:
            peak += trained  # the gradients of the parts before
        return peak, int(flop)

    step, flop = _at_full_depth(language_model, one_part)
    whole = language_model.build()
    # Not at once: what counts is the fullest of them.
    moments = [
        step,
        8 * whole.num_rows * sizes.e,  # the mean norm of the rows, in float64
    ]
    return Memory(
        weights=weight_bytes(whole.model),
        heads=3 * trained,
        data=sum(len(corpus.pooled) for corpus in corpora) * _row_bytes(sizes),
        working=max(moments),
        flop=flop / settings.batch_size,
    )


def validation_memory(
    language_model: LanguageModelBlueprint,
    sizes: HeadSizes,
    objective: Objective,
    *,
    caption_tokens: Sequence[int],
    rows: int,
    turns: InTurns = None,
    device_type: str = "cuda",
) -> Memory:
    """What held-out rows add: they lie on the device while training, and go through it at once."""
    with torch.device("meta"):
        heads = Heads(sizes).to(getattr(torch, objective.trained_dtype))
    batch = _batch(caption_tokens, rows, sizes, turns)

    def count(model: LanguageModel) -> tuple[int, int]:
        run = DryRun(device_type)
        gill = _DryGill(model, heads, run)
        run(lambda: _validate(gill, batch, objective))
        return run.ledger.peak, run.ledger.flop

    peak, flop = _at_full_depth(language_model, count)
    return Memory(weights=0, data=rows * _row_bytes(sizes), working=peak, flop=flop / rows)


def likely_draws(num_examples: int, objective: Objective) -> PackingDraws:
    """Where each pair tosses its coin, as many pairs packed as are expected, spread evenly; where
    one coin decides for the whole batch, all of them packed if they can be."""
    chance = objective.pack_probability
    if objective.packing_unit == "batch":
        return PackingDraws.same(num_examples, packed=chance > 0)
    # Packed where the running sum of chances passes a whole number: 0.5 packs every second pair.
    pairs = [int((i + 1) * chance) > int(i * chance) for i in range(num_examples // 2)]
    return PackingDraws(pairs, pairs, pairs)


def features_memory(encoder: VisualEncoder, batch_size: int, device_type: str = "cuda") -> Memory:
    """Peak memory of the visual encoder (on the meta device) over `batch_size` pictures."""
    shape = (batch_size, 3, *encoder.image_size)
    pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
    run = DryRun(device_type)
    run(lambda: encoder.pooled(encoder.normalise(pixels)))
    return Memory(
        weights=weight_bytes(encoder.model),
        data=pixels.numel() * pixels.element_size(),
        working=run.ledger.peak,
        flop=run.ledger.flop / batch_size,
    )


@torch.no_grad()
def targets_memory(
    generator: GeneratorBlueprint, batch_size: int, device_type: str = "cuda"
) -> Memory:
    """Peak memory of the generator's text encoders over `batch_size` captions."""
    ids = torch.zeros(batch_size, generator.length, dtype=torch.int64, device="meta")
    run = DryRun(device_type)

    def encode() -> list[Any]:
        # Two encoders are read at their last layer but one, which keeps the states of all layers.
        several = len(generator.text_encoders) > 1
        return [e(input_ids=ids, output_hidden_states=several) for e in generator.text_encoders]

    run(encode)
    return Memory(
        weights=sum(map(weight_bytes, generator.text_encoders)),
        working=run.ledger.peak,
        flop=run.ledger.flop / batch_size,
    )


@torch.no_grad()
def generation_memory(
    generator: GeneratorBlueprint, settings: GenerationSettings, device_type: str = "cuda"
) -> Memory:
    """Peak memory of denoising and decoding one batch of pictures; `flop` is per picture.

    With guidance a denoising step reads twice as many latents as there are pictures. Pipelines with
    two text encoders decode in float32 where their weights are float16 (`force_upcast`). Offloaded,
    UNet and decoder are on the device in turn; layer by layer, only their work is counted.
    """
    unet, vae = generator.unet, generator.vae
    size, count = generator.latent_size, settings.batch_size
    read = count * (2 if settings.guidance > 1 else 1)

    def zeros(*shape: int, dtype: torch.dtype = unet.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    conditions: dict[str, Any] = {}
    if generator.pooled_width is not None:
        conditions["added_cond_kwargs"] = {
            "text_embeds": zeros(read, generator.pooled_width),
            "time_ids": zeros(read, 6),
        }
    # What the UNet reads at one step: latents twice under guidance, and L vectors for each.
    latents = zeros(read, unet.config.in_channels, size, size)
    states = zeros(read, generator.length, generator.cross_attention_width)
    unet.set_attention_slice("auto" if settings.attention_slicing else None)
    denoise, decode = DryRun(device_type), DryRun(device_type)
    denoise(lambda: unet(latents, zeros(1, dtype=torch.int64), states, **conditions))

    own, overflows = vae.dtype, vae.dtype == torch.float16 and bool(vae.config.force_upcast)
    wide = torch.float32 if generator.pooled_width is not None and overflows else own
    # Tiles overlap: each step forward is a tile less its overlap.
    tile, tiles = size, 1
    if settings.vae_tiling and size > vae.tile_latent_min_size:
        tile = vae.tile_latent_min_size
        tiles = math.ceil(size / int(tile * (1 - vae.tile_overlap_factor))) ** 2
    at_once = 1 if settings.vae_slicing else count
    shape = (at_once, vae.config.latent_channels, tile, tile)
    if wide != own:
        vae.to(wide)
    decode(lambda: vae.decode(zeros(*shape, dtype=wide)))
    # Slices and tiles that are done wait to be put together.
    waiting = 0 if (at_once, tile) == (count, size) else 2 * count * 3 * generator.picture_size**2
    waiting *= wide.itemsize
    weights, working = (
        [weight_bytes(unet), weight_bytes(vae)],
        [denoise.ledger.peak, decode.ledger.peak + waiting],
    )
    if wide != own:
        vae.to(own)
    if settings.cpu_offload == "none":
        held = sum(weights)
    elif settings.cpu_offload == "model":
        # So that `held` and the larger `working` add up to the fuller of the two turns.
        held = max(w + step for w, step in zip(weights, working)) - max(working)
    else:
        held = 0
    return Memory(
        weights=held,
        data=3 * latents.nbytes + states.nbytes,
        working=max(working),
        flop=settings.steps * denoise.ledger.flop / count + tiles * decode.ledger.flop / at_once,
    )


def _at_full_depth(
    blueprint: LanguageModelBlueprint, count: Callable[[LanguageModel], tuple[int, int]]
) -> tuple[int, int]:
    """What `count` gives for the whole model, from two shallower ones: layers are alike, so bytes
    and operations are straight lines in their number."""
    few, more = _DEPTHS
    if blueprint.num_layers <= more:
        return count(blueprint.build())
    # Two depths give the line; the peak is no line from 0, as embeddings and heads do not grow.
    (peak, flop), (next_peak, next_flop) = (count(blueprint.build(depth)) for depth in _DEPTHS)
    times = (blueprint.num_layers - more) / (more - few)
    return (
        int(next_peak + times * (next_peak - peak)),
        int(next_flop + times * (next_flop - flop)),
    )


_DEPTHS = (2, 4)


class _DryGill(MultimodalLanguageModel):
    """GILL on the meta device, where autocast is imitated."""

    def __init__(self, language_model: LanguageModel, heads: Heads, run: DryRun) -> None:
        super().__init__(language_model, heads)
        self._run = run

    def _compute(self) -> AbstractContextManager:
        dtype = self.language_model.dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return self._run.autocast(dtype)


def _row_bytes(sizes: HeadSizes) -> int:
    """Of an example's target and features on the device, in float32."""
    return 4 * (sizes.L * sizes.D + sizes.d + (sizes.D_pooled or 0))


def _batch(
    caption_tokens: Sequence[int], rows: int, sizes: HeadSizes, turns: InTurns
) -> CaptionBatch | MixedBatch:
    """A batch of `rows` captions of these lengths, or of turns with them, on the meta device."""
    lengths = [caption_tokens[i % len(caption_tokens)] for i in range(rows)]
    captions = CaptionBatch(
        tokens=torch.zeros(sum(lengths), dtype=torch.int64, device="meta"),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        pooled=torch.zeros(rows, sizes.d, device="meta"),
        targets=torch.zeros(rows, sizes.L, sizes.D, device="meta"),
        rows=torch.arange(rows),
        pooled_targets=None
        if sizes.D_pooled is None
        else torch.zeros(rows, sizes.D_pooled, device="meta"),
    )
    return captions if turns is None else turns(captions)


def _parts(
    corpus: CaptionBatch | DocumentBatch, size: int
) -> list[tuple[CaptionBatch | DocumentBatch, float]]:
    """What goes through the language model at once, and how often a step has the like of it:
    captions are all alike, of documents each order of lengths and kinds is a part of its own."""
    if isinstance(corpus, CaptionBatch):
        size = min(size, len(corpus))
        return [(take_examples(corpus, 0, size), len(corpus) / size)]
    alike: dict[tuple, list[DocumentBatch]] = {}
    for start in range(0, len(corpus), size):
        part = corpus.part(start, min(start + size, len(corpus)))
        kinds = tuple(
            tuple(len(piece.ids) if isinstance(piece, Words) else type(piece) for piece in document)
            for document in part.documents
        )
        alike.setdefault(kinds, []).append(part)
    return [(parts[0], len(parts)) for parts in alike.values()]


def _alone(corpus: CaptionBatch | DocumentBatch) -> CaptionBatch | MixedBatch:
    return corpus if isinstance(corpus, CaptionBatch) else MixedBatch(None, corpus)


@torch.no_grad()
def _queries(
    gill: MultimodalLanguageModel,
    part: CaptionBatch | DocumentBatch,
    objective: Objective,
    draws: PackingDraws,
) -> None:
    if isinstance(part, CaptionBatch):
        retrieval_queries(gill, part, objective, draws)
    else:
        document_queries(gill, part)


@torch.no_grad()
def _validate(
    gill: MultimodalLanguageModel, batch: CaptionBatch | MixedBatch, objective: Objective
) -> None:
    if isinstance(batch, MixedBatch):
        assert batch.documents is not None
        document_losses(gill, batch.documents, objective)
        return
    training_losses(gill, batch, objective, PackingDraws.same(len(batch), packed=False))
