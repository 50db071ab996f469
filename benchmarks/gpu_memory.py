"""Predicted peak memory beside what is measured: what `stages doctor` says before a run.

The cases are benchmarks/memory.py's, and so is what is measured on a GPU.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from transformers import OPTConfig

from benchmarks.gpu_measure import Machine, Numbers, Report, Unavailable
from benchmarks.memory import Case, predict, prepare

TOY: dict[str, Any] = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 32,
    "architectures": ["OPTForCausalLM"],
}


def memory(machine: Machine, report: Report) -> None:
    """The published batch at OPT-1.3B's sizes: as it is, with less memory, and quantised."""
    with tempfile.TemporaryDirectory() as folder:
        if machine.toy:
            OPTConfig(**TOY).save_pretrained(folder)
        whole = Case(
            "train",
            4 if machine.toy else 200,
            "bfloat16",
            model=folder if machine.toy else "facebook/opt-1.3b",
        )
        part = whole.batch_size // 4 * 2
        less = {"recompute_activations": True, "micro_batch_size": part}
        cases = [whole, replace(whole, settings=less)]
        if not machine.toy:
            cases += [replace(whole, quantization="int8"), replace(whole, quantization="nf4")]
        for case in cases:
            report.measure(case.name, partial(compared, machine, case))


def compared(machine: Machine, case: Case) -> Numbers:
    """Both, and the ratio that must be within a fifth of 1 (on a GPU)."""
    if case.quantization == "nf4" and find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed")
    predicted = predict(case, machine.device) / 2**30
    measured = machine.peak_gib(lambda: prepare(case, machine.device)())
    return {"predicted_gib": predicted, "measured_gib": measured, "ratio": predicted / measured}
