"""Words after a picture: captions and answers, greedily (Table 7).

    picture -> pooled [d] -> [vis (k), start ids, prompt] -> words

A chat model is shown picture and prompt in a turn of its user, and answers.

Picture first and start ids behind it is the order of the captioning loss (UPSTREAM 23) and of the
released code's own evaluation (UPSTREAM 34, 41). Everybody who asks for a caption gets the one that
Table 7 measures: `Gill.caption`, the command `gill caption` and the evaluation end here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, decode
from pipeline.talking.reading import Said, embed_turns

CAPTION_PROMPT = "A picture of"
"""What the released validation says between a picture and its caption (gill/validate.py)."""
CAPTION_QUESTION = "What is on this picture?"
"""What a chat model is asked instead."""
CAPTION_TOKENS = 32
"""The longest caption there."""


def caption_pictures(
    model: MultimodalLanguageModel,
    pooled: Float[Tensor, "N d"],
    prompt: str = CAPTION_PROMPT,
    max_tokens: int = CAPTION_TOKENS,
) -> list[str]:
    """A caption of each picture: greedy words after picture and prompt, up to the first full stop.

    Args:
        pooled: v_phi of the pictures.
        prompt: empty where captions are to come right after the picture, as in training.
        max_tokens: longest caption.
    """
    said = words_after_pictures(model, pooled, [prompt] * len(pooled), max_tokens)
    return [first_sentence(text) for text in said]


@torch.no_grad()
def words_after_pictures(
    model: MultimodalLanguageModel,
    pooled: Float[Tensor, "N d"],
    prompts: Sequence[str],
    max_tokens: int,
) -> list[str]:
    """What GILL says after each picture and its prompt, up to a line break; no [IMG] tokens.

    Args:
        pooled: v_phi of the pictures.
        prompts: one text per picture, may be empty.
        max_tokens: longest answer.

    Raises:
        ValueError: not one prompt per picture.
    """
    if len(prompts) != len(pooled):
        raise InputError(f"{len(pooled)} pictures and {len(prompts)} prompts")
    language_model = model.language_model
    start = language_model.embed(torch.tensor(language_model.start_ids, dtype=torch.int64))
    embedded = []
    for prefix, prompt in zip(model.visual_prefix(pooled), prompts, strict=True):
        if language_model.turns is not None:
            asked = embed_turns(model, [Said("user", (prefix, prompt))])
            embedded.append(torch.cat([vectors for _, vectors in asked]))
            continue
        ids = language_model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        words = language_model.embed(torch.tensor(ids, dtype=torch.int64))
        embedded.append(torch.cat([prefix, start, words]))
    settings = DecodingSettings(max_tokens=max_tokens, max_images=0, stop_at_newline=True)
    answers = decode(model, Context(language_model, len(embedded)), embedded, settings)
    return [answer.text.strip().partition("\n")[0].strip() for answer in answers]


def first_sentence(text: str) -> str:
    """A caption up to its first full stop, unless that comes within the first six characters.

    As the released validation cuts captions (gill/validate.py).
    """
    stop = text.find(".")
    return text[:stop].strip() if stop > 5 else text.strip()
