"""Whole optimiser steps of training on random weights of OPT's sizes, in bfloat16.

The step is `pipeline.stepping.Stepper`, what `stages train` takes, on a batch that is already on
the device; the plain step is the released structure (tests/plain.py), without the three passes of
CLIP per picture that it also makes. FLOP are counted on meta tensors, forward and backward, as
benchmarks/train_step.py counts them. What is computed again to save memory is never counted: those
rates are of the same useful FLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pipeline.multimodal_language_model import MultimodalLanguageModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_measure import Machine, Numbers, Report
from benchmarks.gpu_opt import Shape, batch_of, gill_around, in_bfloat16, random_opt, shape_of
from benchmarks.train_step import OBJECTIVE, plain_step
from pipeline.batch import CaptionBatch
from pipeline.objective import PackingDraws, training_losses
from pipeline.quantization import quantize
from pipeline.settings import TrainingSettings
from pipeline.stepping import Stepper
from tests.plain import Plain

STEPS = 20_000
COUNTED = 16  # examples: every length of a caption twice
FlopPerExample = dict[bool, float]
"""Packed or not -> FLOP."""
Step = Callable[[CaptionBatch, bool], object]


def opt_1_3b(machine: Machine, report: Report) -> None:
    """The step at OPT-1.3B's sizes."""
    training(machine, report, "OPT-1.3B")


def opt_6_7b(machine: Machine, report: Report) -> None:
    """The step at OPT-6.7B's sizes, the published run's."""
    training(machine, report, "OPT-6.7B")


def training(machine: Machine, report: Report, name: str) -> None:
    """Batches of 64 and 200, alone and packed; the plain step where it fits; less memory."""
    shape = shape_of(machine, name)
    small, large = (4, 6) if machine.toy else (64, 200)
    gill = gill_around(random_opt(shape, machine.device), shape)
    flop = flop_per_example(shape)

    def case(size: int, packed: bool, **settings: Any) -> Numbers:
        return measured(machine, shape, stepper(gill, **settings), size, packed, flop)

    for size in (large, small):
        report.measure(f"batch {size}", partial(case, size, False))
        report.measure(f"batch {size} packed", partial(case, size, True))
    report.measure(
        f"kernels of batch {large} packed", partial(profiled, machine, shape, gill, large)
    )
    for size in (small, large):
        report.measure(f"plain step, batch {size}", partial(plain, machine, shape, gill, size))
    part = small // 4 * 2
    report.measure(
        f"batch {large} packed, {part} at once", partial(case, large, True, micro_batch_size=part)
    )
    # Last, as the language model recomputes from then on.
    report.measure(
        f"batch {large} packed, recomputed", partial(case, large, True, recompute_activations=True)
    )


def quantised_6_7b(machine: Machine, report: Report) -> None:
    """The step with the frozen weights in 8 and 4 bits: the published batch, and on 24 GB."""
    shape = shape_of(machine, "OPT-6.7B")
    size, part = (6, 2) if machine.toy else (200, 32)
    flop = flop_per_example(shape)

    def quantised(kind: Any, **settings: Any) -> Numbers:
        if kind == "nf4":
            import bitsandbytes  # noqa: F401

        model = random_opt(shape, machine.device)
        quantize(model, kind, machine.device)
        step = stepper(gill_around(model, shape), **settings)
        return measured(machine, shape, step, size, True, flop)

    for kind in ("int8", "nf4"):
        report.measure(f"{kind}, batch {size} packed", partial(quantised, kind))
        report.measure(
            f"{kind}, batch {size} packed, {part} at once, recomputed",
            partial(quantised, kind, micro_batch_size=part, recompute_activations=True),
        )


def stepper(gill: MultimodalLanguageModel, **settings: Any) -> Step:
    """The product's step; the rate is so small that random weights stay what they are."""
    given = TrainingSettings.released().model_copy(update={"learning_rate": 1e-8, **settings})
    steps = Stepper(gill, OBJECTIVE, given)

    def take(batch: CaptionBatch, packed: bool) -> object:
        return steps.take(0, batch, PackingDraws.same(len(batch), packed))

    return take


def flop_per_example(shape: Shape) -> FlopPerExample:
    """Of one step, counted in float32: meta tensors have no autocast, and the sums are the same."""
    gill = gill_around(random_opt(shape, "meta", torch.float32), shape)
    batch = batch_of(shape, COUNTED, "meta")
    found = {}
    for packed in (False, True):
        draws = PackingDraws.same(COUNTED, packed)
        with FlopCounterMode(display=False) as counter:
            training_losses(gill, batch, OBJECTIVE, draws).total.backward()
        found[packed] = counter.get_total_flops() / COUNTED
    return found


def measured(
    machine: Machine, shape: Shape, step: Step, size: int, packed: bool, flop: FlopPerExample
) -> Numbers:
    """Time, rate and memory of a step on a batch of `size`."""
    batch = batch_of(shape, size, machine.device)
    seconds = machine.seconds(lambda: step(batch, packed))
    return {
        "step_s": seconds,
        "examples_per_s": size / seconds,
        "tokens_per_s": len(batch.tokens) / seconds,
        "tflop_per_example": flop[packed] / 1e12,
        **machine.rate(size * flop[packed], seconds),
        "peak_gib": machine.peak_gib(lambda: step(batch, packed)),
        "h_for_20000_steps": seconds * STEPS / 3600,
    }


def plain(machine: Machine, shape: Shape, gill: MultimodalLanguageModel, size: int) -> Numbers:
    """The released structure beside the product's step on the same batch, unpacked."""
    model = gill.language_model
    # tests/plain.py makes its index tensors on the default device.
    with torch.device(machine.device):
        released = Plain(model.model, gill.heads, shape.num_rows, model.start_ids, pad_to=32)
        released.heads.to(torch.bfloat16)  # as the released code keeps them
        slow, batch = plain_step(released), in_bfloat16(batch_of(shape, size, machine.device))
        seconds = machine.seconds(lambda: slow(batch, False), warmups=1, times=3)
        peak = machine.peak_gib(lambda: slow(batch, False))
    del released, slow
    fast, batch = stepper(gill), batch_of(shape, size, machine.device)
    ours = machine.seconds(lambda: fast(batch, False), times=3)
    return {"step_s": seconds, "peak_gib": peak, "speedup": seconds / ours}


def profiled(machine: Machine, shape: Shape, gill: MultimodalLanguageModel, size: int) -> Numbers:
    """Where the time of a packed step goes."""
    step, batch = stepper(gill), batch_of(shape, size, machine.device)
    seconds = machine.seconds(lambda: step(batch, True), times=3)
    return machine.kernels(lambda: step(batch, True), seconds)
