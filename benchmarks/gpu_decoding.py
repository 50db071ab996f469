"""Greedy decoding with the key-value cache, on random weights of OPT's sizes, in bfloat16.

Every new token reads all weights once, so the rate of the copy bounds the rate of a single
conversation: `of_copy` is the share of it that the weights alone account for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pipeline.multimodal_language_model import MultimodalLanguageModel

from benchmarks.gpu_measure import Machine, Numbers, Report
from benchmarks.gpu_opt import OPT_SHAPES, Shape, gill_around, random_opt, shape_of
from pipeline.decoding import Context, DecodingSettings, decode

PROMPT, NEW = 32, 64


def decoding(machine: Machine, report: Report) -> None:
    """One and eight conversations."""
    for name in OPT_SHAPES:
        shape = shape_of(machine, name)
        gill = gill_around(random_opt(shape, machine.device), shape)
        for rows in (1, 8):
            report.measure(f"{name}, {rows} at once", partial(decoded, machine, shape, gill, rows))
        del gill


def decoded(machine: Machine, shape: Shape, gill: MultimodalLanguageModel, rows: int) -> Numbers:
    """`NEW` tokens after prompts of `PROMPT`; reading the prompt is included."""
    new, model = 4 if machine.toy else NEW, gill.language_model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, shape.words, (rows, PROMPT), generator=generator)
    prompts = list(model.embed(ids))
    settings = DecodingSettings(max_tokens=new, max_images=0)

    def answer() -> Any:
        return decode(gill, Context(model, rows), prompts, settings, stop_ids=())

    seconds = machine.seconds(answer, warmups=1, times=3)
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    known = {}
    if machine.copy_rate is not None:
        known["of_copy"] = weights * new / seconds / machine.copy_rate
    return {"tokens_per_s": rows * new / seconds, "ms_per_token": 1e3 * seconds / new, **known}
