"""The product's training step beside the plain one, and what a step takes at published sizes.

    python -m benchmarks.train_step [--device cuda] [--quick] [--json FILE]

    documents_cost          time of a step over documents, over that of their texts and pictures as
                            captions: the same tokens, each picture shown besides
    turns_bfloat16, _grids  on a CPU, of a step over a chat model's turns: speedup by its weights in
                            bfloat16, and by a grid of their own for short sequences
    speedup, memory_ratio   of the step over the plain step, on one case; of the plain step's memory
                            beyond what is held anyway, the share that the step takes
    fused_layers            speedup by run.fuse_layers, on a GPU at OPT-6.7B's size
    flop_per_example        operations at OPT-6.7B's sizes, counted on meta tensors
    denoising_flop          what the denoising loss adds to them, at Stable Diffusion 1.5's sizes

The plain step is the released structure (tests/plain.py): captions padded to 32 tokens, three
passes, full logits, the whole embedding table a parameter with optimiser state. Both steps include
backward, clipping, AdamW and the rescaling of the [IMG] rows. Random weights, captions of 11 tokens
on average; on a CPU OPT-125M's size, on a GPU OPT-1.3B's in bfloat16. The released step also runs
CLIP ViT-L/14 three times per picture: measured apart, and added in `with_clip`.

On a GPU also: steps at OPT-6.7B's and 1.3B's sizes, alone, packed, recomputed, in micro-batches and
with quantised weights; where a step's time goes; and steps over batches that differ in shape, as a
run's do, with and without cuDNN's attention. `run_h` are hours for 20 000 steps; rates are of
useful FLOP: what is computed again to save memory is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.harness import ATTENTION, Bench, Numbers, Unavailable, count_flop, run
from benchmarks.random_models import batch_of, opt_gill
from doctor.blueprints import born, find, generator_blueprint
from doctor.chat_streams import chat_step
from doctor.denoising import denoising_memory
from doctor.document_streams import PICTURES, story
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.documents import DocumentBatch
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, draw_packing, training_losses
from pipeline.frozen import grid_attention
from pipeline.frozen.backbones import Quantization
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.stepping import Stepper
from tests.plain import Plain

OBJECTIVE = Objective.released()
# A coin for each pair, as in the paper: then nearly every batch has a shape of its own.
PAIRED = OBJECTIVE.model_copy(update={"packing_unit": "pair"})
HOURS = 20_000 / 3600
GENERATORS = {
    "SD 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
}
Step = Callable[[CaptionBatch, PackingDraws], object]
"""A whole optimiser step."""


def measure(bench: Bench) -> None:
    size = "toy" if bench.toy else "6.7b"
    whole = bench.extra and not bench.quick
    if whole:
        at_size(bench, size)
    compare(bench)
    for packed in (False,) if bench.quick else (False, True):
        name = f"flop_per_example{'_packed' * packed}"
        flop = partial(flop_per_example, size, packed)
        bench.part(f"operations, {size}{' packed' * packed}", lambda: {"flop": flop()}, flop=name)  # noqa: B023
    if not (bench.quick or bench.toy):
        at_generators(bench)
    if whole:
        at_size(bench, size, "int8")
        at_size(bench, size, "nf4")
        if not bench.toy:
            at_size(bench, "1.3b")
    if not (bench.quick or bench.toy):
        model, examples = ("6.7b", 200) if bench.on_gpu else ("125m", 16)
        work = partial(fused_layers, bench, model, examples)
        bench.part(f"{model}, {examples}, fused layers", work, speedup="fused_layers")


def compare(bench: Bench) -> None:
    """Both steps in turn on each case; the first is the headline."""
    gill = opt_gill(bench.size("toy", "125m", "1.3b"), bench.device, bench.dtype)
    model = gill.language_model
    plain = Plain(model.model, gill.heads, model.num_rows, model.start_ids, pad_to=32)
    plain.heads.to(bench.dtype)  # as the released code keeps them
    bench.part("gradients", partial(gradients, gill, plain, bench.size(2, 2, 8)))
    fast, slow = product_step(gill), plain_step(plain)
    fast(batch_of(gill, 2), PackingDraws.same(2, False))  # the optimiser has its state from here
    clip = clip_seconds(bench)

    def both(examples: int, packed: bool) -> Numbers:
        """Times, and most memory beyond what is held anyway."""
        batch, draws = batch_of(gill, examples), PackingDraws.same(examples, packed)
        taken: dict[Step, int] = {}

        def watched(step: Step) -> None:
            gill.heads.zero_grad()  # which the plain step does at its end
            held, most = bench.memory(lambda: step(batch, draws))
            taken[step] = most - held

        rounds = 1 if bench.quick or bench.toy else 3
        numbers = bench.in_turn(rounds, fast=partial(watched, fast), plain=partial(watched, slow))
        with_clip = (numbers["plain_s"] + 3 * examples * clip) / numbers["fast_s"]
        memory = {"fast_mib": taken[fast] / 2**20, "memory_ratio": taken[fast] / taken[slow]}
        return {**numbers, "with_clip": with_clip, **memory}

    small, large = bench.size((4, 6), (8 if bench.quick else 16, 32), (64, 200))
    headline = {"speedup": "speedup", "memory_ratio": "memory_ratio"}
    bench.part(f"{small} examples", partial(both, small, False), **headline)
    for examples, packed in () if bench.quick else ((small, True), (large, False), (large, True)):
        bench.part(f"{examples} examples{' packed' * packed}", partial(both, examples, packed))
    stories = bench.size(2, 6, 24)
    bench.part(
        f"{stories} stories of {PICTURES}",
        partial(documents, bench, gill, stories),
        cost="documents_cost",
    )
    if bench.device == "cpu":
        turns(bench, gill, bench.size(8, 32, 32))


def documents(bench: Bench, gill: MultimodalLanguageModel, stories: int) -> Numbers:
    """Stories of five captions and their pictures, beside the same captions one by one."""
    captions = batch_of(gill, PICTURES * stories)
    texts = [tuple(ids.tolist()) for ids in captions.tokens.split(captions.lengths)]
    firsts = range(0, len(texts), PICTURES)
    batch = MixedBatch(
        None,
        DocumentBatch(
            tuple(story(texts[first : first + PICTURES], first) for first in firsts),
            captions.pooled,
            captions.targets,
            captions.rows,
        ),
    )
    step, one_by_one = product_step(gill), PackingDraws.same(len(captions), False)
    step(captions, one_by_one)  # the optimiser has its state from here
    rounds = 1 if bench.quick or bench.toy else 3
    numbers = bench.in_turn(
        rounds,
        documents=lambda: step(batch, PackingDraws.same(0, False)),
        captions=lambda: step(captions, one_by_one),
    )
    return {**numbers, "cost": 1 / numbers["speedup"], "tokens": batch.num_tokens}


def turns(bench: Bench, gill: MultimodalLanguageModel, count: int) -> None:
    """A chat model's turns in either dtype, and with one grid for all sequences, however long."""
    shares = {"asked": 5, "shown": 1, "told": 1, "joined": 1}
    batch = chat_step(batch_of(gill, count), shares, answer=40)
    low = opt_gill(bench.size("toy", "125m", "1.3b"), bench.device, torch.bfloat16)
    steps = {"own_grids": product_step(gill), "bfloat16": product_step(low)}
    take = {name: partial(step, batch, PackingDraws.same(0, False)) for name, step in steps.items()}

    def in_one_grid() -> object:
        with mock.patch.object(grid_attention, "_GAIN", float("inf")):
            return take["own_grids"]()

    for step in take.values():
        step()  # the optimisers have their state from here
    rounds = 1 if bench.quick or bench.toy else 5
    ways: dict[str, dict[str, Callable[[], object]]] = {
        "turns_bfloat16": {"bfloat16": take["bfloat16"], "float32": take["own_grids"]},
        "turns_grids": {"own_grids": take["own_grids"], "one_grid": in_one_grid},
    }
    for name, pair in ways.items():
        work = partial(bench.in_turn, rounds, **pair)
        bench.part(f"{count} turns, {' and '.join(pair)}", work, speedup=name)


def fused_layers(bench: Bench, size: str, examples: int) -> Numbers:
    """The step with fused decoder layers beside the step with transformers' own."""
    gill = opt_gill(size, bench.device, bench.dtype)
    fused = product_step(copy.deepcopy(gill), fuse_layers=True)
    steps = {"fused": fused, "as_they_are": product_step(gill)}
    batch, draws = batch_of(gill, examples), PackingDraws.same(examples, False)
    for step in steps.values():
        step(batch, draws)  # compiled, and the optimisers have their state from here
    return bench.in_turn(5, **{name: partial(step, batch, draws) for name, step in steps.items()})


def gradients(gill: MultimodalLanguageModel, plain: Plain, examples: int) -> Numbers:
    """How far the step's gradients are from the plain step's, over their norm: of all tensors
    together, and of the worst."""
    batch, draws = batch_of(gill, examples), PackingDraws.same(examples, False)
    backpropagate(gill, batch, OBJECTIVE, draws)
    plain_losses(plain, batch, draws)["total"].backward()
    theirs = {name: grad.float() for name, grad in plain.gradients().items()}
    ours = {n: p.grad.float() for n, p in gill.heads.named_parameters() if p.grad is not None}
    apart = torch.stack([(ours[name] - grad).norm() for name, grad in theirs.items()])
    norms = torch.stack([grad.norm() for grad in theirs.values()])
    gill.heads.zero_grad()
    plain.zero_grad()
    return {
        "relative_error": float(apart.norm() / norms.norm()),
        "of_worst_tensor": float((apart / norms)[norms > 0].max()),
    }


def product_step(
    gill: MultimodalLanguageModel, **settings: Any
) -> Callable[[CaptionBatch | MixedBatch, PackingDraws], object]:
    """The step of `stages train`; its rate is so small that random weights stay what they are."""
    given = TrainingSettings.released().model_copy(update={"learning_rate": 1e-8, **settings})
    return partial(Stepper(gill, OBJECTIVE, given).take, 0)


def plain_step(plain: Plain) -> Step:
    """The released structure; the optimiser has its state already."""
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, (0.9, 0.95), weight_decay=0.01)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    table, r = plain.input_table, plain.r

    def step(batch: CaptionBatch, draws: PackingDraws) -> None:
        plain_losses(plain, batch, draws)["total"].backward()
        assert table.grad is not None
        table.grad[:-r] = 0
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            mean_norm = table[:-r].norm(dim=-1).mean()
            table[-r:] *= mean_norm / table[-r:].norm(dim=-1, keepdim=True)

    return step


def plain_losses(plain: Plain, batch: CaptionBatch, draws: PackingDraws) -> dict[str, Tensor]:
    """On the model's device, where `Plain` makes its index tensors by default."""
    pooled = batch.pooled.to(plain.heads.logit_scale.dtype)
    captions = [part.tolist() for part in batch.tokens.split(batch.lengths)]
    with torch.device(pooled.device):
        return plain.losses(captions, pooled, batch.targets, OBJECTIVE, draws)


def clip_seconds(bench: Bench) -> float:
    """CLIP ViT-L/14 on a picture: a quarter of its layers, times four."""
    width, heads, pictures = bench.size((32, 2, 1), (1024, 16, 1), (1024, 16, 64))
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    with born(bench.dtype, bench.device), torch.no_grad():
        config = CLIPVisionConfig(**sizes, num_hidden_layers=6, image_size=224, patch_size=14)
        model, pixels = CLIPVisionModel(config).eval(), torch.randn(pictures, 3, 224, 224)
        return 4 * bench.seconds(lambda: model(pixels), times=2) / pictures


@cache
def flop_per_example(size: str, packed: bool) -> float:
    """Of a step, forward and backward. In float32, as meta tensors have no autocast; the same."""
    gill = opt_gill(size, "meta")
    batch, draws = batch_of(gill, 16), PackingDraws.same(16, packed)
    return count_flop(lambda: training_losses(gill, batch, OBJECTIVE, draws).total.backward()) / 16


def at_generators(bench: Bench) -> None:
    """What the denoising loss adds at the sizes of published generators."""
    for name, source in GENERATORS.items():
        headline = {"flop": "denoising_flop"} if name == "SD 1.5" else {}
        bench.part(f"operations, denoising, {name}", partial(denoising, source), **headline)


def denoising(source: str) -> Numbers:
    """Of the generator's loss per example: operations, and what is kept for the backward pass."""
    generator = generator_blueprint(find("image_generator", source), torch.bfloat16)
    whole = denoising_memory(generator)
    less = denoising_memory(generator, recompute=True)
    return {
        "flop": whole.flop,
        "weights_gib": whole.weights / 2**30,
        "mib": whole.working / 2**20,
        "recomputed_mib": less.working / 2**20,
        "recomputed_flop": less.flop,
    }


def at_size(bench: Bench, size: str, kind: Quantization = "none") -> None:
    """Batches of 64 and 200, packed and not, then with less memory; quantised, the published batch
    and what a card of 24 GB takes. Not for OPT-1.3B: over batches of many shapes."""
    said = size if kind == "none" else f"{size} {kind}"
    small, large = (4, 6) if bench.toy else (64, 200)

    @cache
    def gill() -> MultimodalLanguageModel:  # made within a part, as it may not fit
        if kind == "nf4" and find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed")
        return opt_gill(size, bench.device, bench.dtype, kind)

    def timed(examples: int, packed: bool, **settings: Any) -> Numbers:
        """Time, rate and memory."""
        step, flop = product_step(gill(), **settings), examples * flop_per_example(size, packed)
        batch, draws = batch_of(gill(), examples), PackingDraws.same(examples, packed)
        seconds = bench.seconds(lambda: step(batch, draws))
        return {
            "step_s": seconds,
            "run_h": seconds * HOURS,
            "examples/s": examples / seconds,
            "tokens/s": len(batch.tokens) / seconds,
            "tflop": flop / 1e12,
            **bench.rate(flop, seconds),
            "peak_gib": bench.memory(lambda: step(batch, draws))[1] / 2**30,
        }

    def kernels() -> Numbers:
        step, batch = product_step(gill()), batch_of(gill(), large)
        return bench.kernels(lambda: step(batch, PackingDraws.same(large, True)))

    def many_shapes(attention: str) -> Numbers:
        """Batches each with captions and packed pairs of its own."""
        step, random = product_step(gill()), torch.Generator().manual_seed(0)
        taken = []
        with sdpa_kernel(ATTENTION[attention]):
            for number in range(2 if bench.toy else 60):
                batch = batch_of(gill(), large, seed=number)
                draws = draw_packing(large, PAIRED, random)
                taken.append(bench.once(partial(step, batch, draws)))
        times = {"median_s": median(taken), "mean_s": mean(taken), "slowest_s": max(taken)}
        return {**times, "run_h": mean(taken) * HOURS}

    def add(examples: int, packed: bool, less: str = "", **settings: Any) -> None:
        name = f"{said}, {examples}{' packed' * packed}{less}"
        bench.part(name, partial(timed, examples, packed, **settings))

    recomputed, part = {"recompute_activations": True}, {"micro_batch_size": small // 4 * 2}
    add(large, True)
    if kind == "none":
        add(large, False)
        bench.part(f"{said}, kernels", kernels)
        for name in ATTENTION if size != "1.3b" else ():
            bench.part(f"{said}, many shapes, {name}", partial(many_shapes, name))
        add(small, True)
        add(small, False)
        add(large, True, " in parts", **part)
        # Last, as the language model recomputes from then on.
        add(large, True, " recomputed", **recomputed)
    add(large, True, " recomputed, in parts", **recomputed, **part)


if __name__ == "__main__":
    run(measure, __doc__)
