"""GILL around random weights of OPT's sizes, and batches for it: the published sizes, or toy ones.

Weights are made on the device, in bfloat16; the heads stay in float32, as training keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pipeline.multimodal_language_model import MultimodalLanguageModel
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.gpu_measure import Machine, made_in
from benchmarks.train_step import LENGTHS, NUM_ROWS, OPT_1_3B, OPT_6_7B
from pipeline.batch import CaptionBatch
from pipeline.heads import Heads, HeadSizes
from pipeline.language_model import LanguageModel
from pipeline.settings import MapperSizes
from tests.tiny_language_models import tiny_tokenizer


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model and of the heads around it."""

    opt: dict[str, Any]
    num_rows: int
    heads: HeadSizes

    @property
    def words(self) -> int:
        """Ids that captions are drawn from end here."""
        return self.num_rows - 8


_PAPER = HeadSizes(d=1024, e=1)
OPT_SHAPES = {
    "OPT-1.3B": Shape(OPT_1_3B, NUM_ROWS, _PAPER.model_copy(update={"e": 2048})),
    "OPT-6.7B": Shape(OPT_6_7B, NUM_ROWS, _PAPER.model_copy(update={"e": 4096})),
}
_TOY = Shape(
    {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "vocab_size": 72,
        "max_position_embeddings": 160,
    },
    66,
    HeadSizes(
        d=8, e=32, r=2, L=3, D=6, m=8, p=4, mapper=MapperSizes(encoder_layers=1, decoder_layers=1)
    ),
)


def shape_of(machine: Machine, name: str) -> Shape:
    """The sizes of `name`; toy ones on a toy machine."""
    return _TOY if machine.toy else OPT_SHAPES[name]


def random_opt(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformers model with random weights, made on `device`."""
    with made_in(dtype, device):
        return OPTForCausalLM(OPTConfig(**shape.opt))


def gill_around(model: Any, shape: Shape) -> MultimodalLanguageModel:
    """Heads of the paper's sizes, on the model's device."""
    language_model = LanguageModel(model, tiny_tokenizer(), num_rows=shape.num_rows)
    with torch.device(language_model.device):
        return MultimodalLanguageModel(language_model, Heads(shape.heads))


def batch_of(shape: Shape, num_examples: int, device: str) -> CaptionBatch:
    """Captions of 11 tokens on average, as benchmarks/train_step.py draws them."""
    random = torch.Generator().manual_seed(0)
    captions = [
        torch.randint(5, shape.words, (LENGTHS[i % len(LENGTHS)],), generator=random).tolist()
        for i in range(num_examples)
    ]
    heads = shape.heads
    return CaptionBatch.from_lists(
        captions,
        torch.randn(num_examples, heads.d, generator=random),
        torch.randn(num_examples, heads.L, heads.D, generator=random),
        torch.arange(num_examples),
        max_tokens=23,
    ).to(device)


def in_bfloat16(batch: CaptionBatch) -> CaptionBatch:
    """Features in bfloat16, as the released code has them; targets stay."""
    return replace(batch, pooled=batch.pooled.bfloat16())
