"""Every number and switch that this room takes from a params file, as frozen models.

They are here, apart from the code that obeys them, so that a params file can be checked whole in no
time: nothing in this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer

from gill_records import Record

MapperKind = Literal["gill_mapper", "linear", "mlp", "encoder"]


class MapperSizes(Record):
    """Kind and depth of the mapping network."""

    kind: MapperKind = Field(
        default="gill_mapper",
        description="gill_mapper: encoder-decoder with L learnt queries (the paper's); linear, "
        "mlp, encoder: the three baselines of the paper's Table 3",
    )
    encoder_layers: int = Field(default=4, ge=1, description="layers over the r [IMG] states")
    decoder_layers: int = Field(
        default=4,
        ge=1,
        description="layers over the L queries (gill_mapper only). The paper says '4-layer'; 4 + 4 "
        "is what was trained and what gives its 50 M parameters",
    )
    feedforward: int = Field(default=4, ge=1, description="feed-forward width, in multiples of m")
    num_heads: int = Field(default=4, ge=1, description="attention heads")
    adds_embedding: bool = Field(
        default=False,
        description="gill_mapper only. true: its input is hidden state + input embedding of each "
        "[IMG] token, as released (13); false: hidden states alone, as in Eq. 3",
    )


class Objective(Record):
    """What is minimised. The defaults are `Objective.paper()`; `Objective.released()` is the code
    that produced the published numbers. Numbers in brackets are items of UPSTREAM.md."""

    captioning_weight: float = Field(
        default=1.0, ge=0, description="weight of l_c (Eq. 5); 0 leaves its pass out"
    )
    image_token_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of l_p (Eq. 5). The released code counts it twice with 0.5 (4): also 1",
    )
    retrieval_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of l_r, the sum of the two terms of Eq. 4. Released: 0.5, their mean "
        "(7). 0 trains for generation only",
    )
    generation_weight: float = Field(
        default=1.0, ge=0, description="weight of l_g (Eq. 3); 0 trains for retrieval only"
    )
    diffusion_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the generator's own denoising loss, with the mapper's output as its "
        "condition; not in the paper. Above 0 `precompute-latents` encodes every picture, and a "
        "step runs the frozen UNet forward and backward",
    )
    condition_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of examples whose condition is the empty prompt's in the denoising "
        "loss, as generators are trained for guidance. Where the UNet is frozen they teach the "
        "heads nothing",
    )
    token_reduction: Literal["examples", "tokens"] = Field(
        default="examples",
        description="examples: sum over the tokens of a caption, mean over examples (Eq. 1 and 5). "
        "tokens: mean over all supervised tokens of the batch, as released (1)",
    )
    supervise_start: bool = Field(
        default=False,
        description="predict the start id from the last visual token: released (2), not in Eq. 1",
    )
    captioning_softmax: Literal["words", "words_and_images"] = Field(
        default="words",
        description="words: p_theta of Eq. 1, over the frozen vocabulary. words_and_images: the "
        "[IMG] rows share the softmax, so that l_c trains E_img too, as released (11)",
    )
    image_token_targets: Literal["image_token", "caption_and_image_token"] = Field(
        default="image_token",
        description="image_token: Eq. 2, [IMG1] alone. caption_and_image_token: every caption "
        "token as well, without any image, as released (3)",
    )
    supervise_second: bool = Field(
        default=True,
        description="l_p also for the second caption of a packed pair. Released: false, because "
        "its label mask stops at the first [IMG1] of a row; an accident (5)",
    )
    generation_loss: Literal["squared_error", "distance"] = Field(
        default="squared_error",
        description="squared_error: mean over all elements, the 'MSE' of section 3.2 (the sum "
        "printed in Eq. 3 is L * D times this). distance: L2 norm per position, not squared, as "
        "released (6)",
    )
    learn_temperature: bool = Field(
        default=True,
        description="train log(1/tau). As released (8); Eq. 5 does not list tau, but the paper "
        "gives no value to fix it at",
    )
    contrastive_gradient: Literal["global", "divided"] = Field(
        default="global",
        description="global: l_r's true gradient over the batch of all ranks. divided: 1/W of it "
        "on W ranks, as released; an accident (12). Same on one rank",
    )
    pack_probability: float = Field(
        default=0.5, ge=0, le=1, description="how often two examples share a sequence (section 3.4)"
    )
    packing_unit: Literal["pair", "batch"] = Field(
        default="pair",
        description="what a coin decides. pair: each two neighbours, the paper's 'two random "
        "examples with probability 0.5'. batch: the whole batch, as released (22)",
    )
    separate_image_draws: bool = Field(
        default=False,
        description="retrieval and generation toss their own coins, as released (22); then a batch "
        "may need two passes. false: one coin and one pass for both. Each loss has the same "
        "distribution either way, only their joint randomness differs, so both presets say false",
    )
    rescale_image_rows: bool = Field(
        default=False,
        description="after each step scale the rows of E_img to the mean norm of the frozen rows: "
        "released (31), not in the paper. Applied by training",
    )
    trained_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of trained parameters and optimiser state. bfloat16 is what the "
        "released code kept (32): small steps are rounded away and the temperature cannot move; an "
        "accident, so both presets say float32. Applied by training",
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """What has no denoising loss is written as before there was one: keys of finished work,
        and states to resume from, stay what they are."""
        written = write(self)
        if not self.diffusion_weight:
            for name in ("diffusion_weight", "condition_dropout"):
                written.pop(name, None)
        return written

    @classmethod
    def paper(cls) -> Objective:
        """Equations 1 to 5 as printed."""
        return cls()

    @classmethod
    def released(cls) -> Objective:
        """The released code, on one GPU, with float32 parameters."""
        return cls(
            retrieval_weight=0.5,
            token_reduction="tokens",
            supervise_start=True,
            captioning_softmax="words_and_images",
            image_token_targets="caption_and_image_token",
            supervise_second=False,
            generation_loss="distance",
            packing_unit="batch",
            rescale_image_rows=True,
        )


_KIND = "constant; linear: down to zero; step: one drop, as released"


class Constant(Record):
    """No change after the warm-up."""

    kind: Literal["constant"] = Field(default="constant", description=_KIND)

    def factor(self, step: int, steps: int) -> float:
        """1 at every step."""
        return 1.0


class LinearDecay(Record):
    """Straight down to zero over the last part of the run."""

    kind: Literal["linear"] = Field(default="linear", description=_KIND)
    begin: float = Field(default=0.5, ge=0, lt=1, description="where it begins, of all steps")

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied with at a step, counted from 0."""
        begin = self.begin * steps
        return min(1.0, (steps - step) / (steps - begin))


class StepDecay(Record):
    """One drop, as released: to a tenth at step 12008 of 20000 (UPSTREAM 30)."""

    kind: Literal["step"] = Field(default="step", description=_KIND)
    at: int = Field(default=12008, ge=0, description="first step with the lower rate")
    to: float = Field(default=0.1, gt=0, description="factor from there on")

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied with at a step, counted from 0."""
        return self.to if step >= self.at else 1.0


class TrainingNumbers(Record):
    """How the objective is minimised: what decides the trained weights."""

    steps: int = Field(default=20000, ge=1, description="optimiser steps")
    batch_size: int = Field(default=200, ge=1, description="examples per step, over all processes")
    learning_rate: float = Field(default=1e-3, gt=0, description="highest rate (section 4)")
    image_token_rate: float = Field(
        default=1.0,
        gt=0,
        description="rate of E_img as a multiple of learning_rate; below 1 its rows stay near "
        "where they started. Ours: the paper and the released code have one rate for all",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Adam's")
    epsilon: float = Field(default=1e-8, gt=0, description="Adam's")
    warmup_steps: int = Field(
        default=0, ge=0, description="the rate grows from 0 (at the first step) over these steps"
    )
    schedule: Annotated[Constant | LinearDecay | StepDecay, Field(discriminator="kind")] = Field(
        default=LinearDecay(), description="what the rate does after the warm-up"
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="longest gradient over all trained tensors; released: 1.0"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's, on every trained tensor; released: 0.01"
    )
    validate_every: int = Field(
        default=500,
        ge=1,
        description="steps between validations, of which the best is chosen and shown",
    )
    seed: int = Field(default=0, description="of the packing coins")


class TrainingRun(Record):
    """How a training runs: memory, speed, what is written when. The same weights either way."""

    log_every: int = Field(default=10, ge=1, description="steps between points of the curve")
    checkpoint_every: int = Field(
        default=500, ge=1, description="steps between the states from which to resume"
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=2,
        multiple_of=2,
        description="examples that the language model reads at once in each process; less memory, "
        "the same step: retrieval still compares the whole batch. null: all of the process's",
    )
    recompute_activations: bool = Field(
        default=False,
        description="keep only the input of each decoder layer and compute the rest again in the "
        "backward pass: less memory, one more forward pass of what has a gradient",
    )
    fuse_layers: bool = Field(
        default=False,
        description="on a GPU: query, key and value of a decoder layer in one product, ReLU within "
        "the product before it, norms and residuals compiled; some seconds at the start",
    )
    shard_language_model: bool = Field(
        default=False,
        description="spread the frozen decoder layers over the processes of torchrun (FSDP), for "
        "a language model larger than one card",
    )


class TrainingSettings(TrainingNumbers, TrainingRun):
    """Both: all that `pipeline.training.loop` takes."""

    @property
    def numbers(self) -> TrainingNumbers:
        """What decides the weights: a run goes on from a state with the same of these."""
        return TrainingNumbers.part_of(self)

    @classmethod
    def paper(cls) -> TrainingSettings:
        """Section 4: Adam, 20000 steps of 200, rate 0.001; what it leaves open is off."""
        return cls(schedule=Constant())

    @classmethod
    def released(cls) -> TrainingSettings:
        """The released code (UPSTREAM 28 to 31, 33), with float32 master copies."""
        return cls(
            warmup_steps=2000,
            schedule=StepDecay(),
            clip_norm=1.0,
            weight_decay=0.01,
            validate_every=2000,
            checkpoint_every=2000,
        )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return self.learning_rate * warm * self.schedule.factor(step, self.steps)


class IndexSettings(Record):
    """How candidate vectors are stored and searched."""

    kind: Literal["flat", "hnsw", "ivf-sq8", "ivf-pq"] = Field(
        default="flat",
        description="flat: exact, on a GPU where a model is there. hnsw: a graph, the most memory. "
        "ivf-sq8: inverted lists of 8-bit codes, the fastest. ivf-pq: of 4-bit product codes, the "
        "least memory",
    )
    hnsw_links: int = Field(
        default=32, ge=2, le=128, description="hnsw: links per vector and level"
    )
    hnsw_build_effort: int = Field(
        default=80, ge=8, description="hnsw: candidates kept while linking"
    )
    hnsw_search_effort: int = Field(
        default=192, ge=1, description="hnsw: candidates kept while searching"
    )
    ivf_lists: int | None = Field(
        default=None, ge=1, description="ivf: number of lists; none: 4 sqrt(N), at most N / 39"
    )
    ivf_probes: int = Field(default=32, ge=1, description="ivf: lists read per query")
    ivf_training_vectors: int = Field(
        default=400_000, ge=256, description="ivf: largest random sample that places the lists"
    )
    pq_bytes: int = Field(
        default=64, ge=1, description="ivf-pq: bytes per vector; 2 * this divides p"
    )
    rerank: int = Field(
        default=8,
        ge=0,
        description="ivf: candidates per result that are scored again at float16 (2 p bytes a "
        "vector); 0 keeps the codes alone, whose scores are approximate",
    )
    seed: int = Field(
        default=0, ge=0, description="ivf: the seed of the training sample and its clusters"
    )


class DecisionSettings(Record):
    """What the classifier reads and how it is fitted."""

    img_tokens: Literal["first", "all"] = Field(
        default="first", description="hidden states it reads: of [IMG1], or of all r tokens"
    )
    use_similarity: bool = Field(
        default=True, description="whether it reads the highest cosine similarity as well"
    )
    regularisation: tuple[float, ...] = Field(
        default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        min_length=1,
        description="inverse strengths of the L2 penalty; cross-validation picks one",
    )
    folds: int = Field(default=5, ge=2, description="folds of the stratified cross-validation")
    test_fraction: float = Field(
        default=0.33, gt=0, lt=1, description="share of test rows where the caller names none"
    )
    seed: int = Field(default=0, ge=0, description="seed of the split, the folds and the draws")


ReadBack = Literal["image_tokens", "nothing", "picture", "image_tokens_and_picture"]


class TalkingSettings(Record):
    """How answers go on behind their own pictures."""

    read_back: ReadBack = Field(
        "nothing",
        description="what is read in place of a picture of an answer as the answer, and the talk, "
        "go on. nothing: the words alone. picture: the k visual vectors of what was shown. "
        "image_tokens_and_picture: the r [IMG] tokens and these. image_tokens: the former within "
        "the answer, nothing later. After training on captions `nothing` draws what is said best, "
        "`picture` keeps what was shown (table stories_told)",
    )


class GenerationNumbers(Record):
    """How the generator samples: what decides a picture."""

    steps: int = Field(50, ge=1, description="denoising steps")
    guidance: float = Field(7.5, ge=1, description="classifier-free guidance scale; 1 turns it off")
    scheduler: Literal["pipeline", "ddim", "dpm-solver", "euler"] = Field(
        "pipeline", description="`pipeline` keeps the scheduler that the pipeline came with"
    )
    vae_tiling: bool = Field(
        False,
        description="decode large pictures in overlapping tiles: far less memory, and seams that "
        "are hard to see. Pictures no larger than a tile are unchanged",
    )


class GenerationRun(Record):
    """How sampling runs: memory and speed. Pictures differ by rounding at most."""

    preview_every: int = Field(
        default=0, ge=0, description="decode a half-made picture every so many steps; 0: never"
    )
    attention_slicing: bool = Field(
        False,
        description="attention of the UNet in slices: less memory where there is no fused "
        "attention, and slower. The numbers differ by rounding",
    )
    vae_slicing: bool = Field(False, description="decode one picture of a batch at a time")
    cpu_offload: Literal["none", "model", "sequential"] = Field(
        "none",
        description="model: UNet and decoder lie in main memory and come to the GPU in turn. "
        "sequential: layer by layer, least memory and slowest. Without a GPU: nothing to do",
    )
    convolutions: Literal["plain", "channels_last", "compiled"] = Field(
        "plain",
        description="channels_last: in the memory format that GPUs prefer. compiled: that, and on "
        "a GPU the UNet compiled, which takes minutes for every batch size: for many pictures",
    )


class GenerationSettings(GenerationNumbers, GenerationRun):
    """Both, and the batch: all that the image generator takes."""

    batch_size: int = Field(8, ge=1, description="pictures per forward of the UNet")
