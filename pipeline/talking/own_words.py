"""What the frozen language model says by itself: its greedy answers, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import GenerationConfig

from gill_errors import InputError
from pipeline.frozen.language_model import LanguageModel


@dataclass(frozen=True)
class OwnWords:
    """An answer: token ids without the one that ends it."""

    ids: tuple[int, ...]
    ended: bool
    """Whether the model ended it; False: it was cut."""


@torch.no_grad()
def own_words(
    language_model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[OwnWords]:
    """Greedy answers of transformers' own `generate`, all prompts in one batch.

    Args:
        prompts: token ids, start ids included.
        max_tokens: longest answer; what is longer is cut there.

    Raises:
        ValueError: a prompt is empty, or leaves no room for an answer.
    """
    room = language_model.max_positions - max(map(len, prompts), default=0)
    if min(map(len, prompts), default=1) == 0 or room < 1:
        raise InputError(
            f"a prompt is empty, or longer than the {language_model.max_positions - 1} tokens "
            "after which the language model can still answer"
        )
    stops = [id_ for id_ in language_model.stop_ids if id_ is not None]
    pad = stops[0] if stops else 0
    # [B, T], padded on the left: every answer begins at the end of its row.
    longest = max(map(len, prompts))
    ids: Int64[Tensor, "B T"] = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    rows = len(language_model.model.get_output_embeddings().weight)
    said = language_model.model.generate(
        ids.to(language_model.device),
        attention_mask=mask.to(language_model.device),
        # Plain greedy decoding, whatever penalties the model's own defaults have.
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            max_new_tokens=min(max_tokens, room),
            eos_token_id=stops or None,
            pad_token_id=pad,
            # Rows behind the frozen vocabulary are no words.
            suppress_tokens=list(range(language_model.num_rows, rows)) or None,
        ),
    )[:, longest:].tolist()
    return [_until_stop(row, stops) for row in said]


def _until_stop(row: list[int], stops: Sequence[int]) -> OwnWords:
    end = next((place for place, id_ in enumerate(row) if id_ in stops), None)
    return OwnWords(tuple(row[:end]), end is not None)
