"""What an answer costs: words, a retrieved picture, a generated picture (appendix E.4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from evaluation.results import Result
from evaluation.scores import Found, Rows
from gill.loading import Gill
from pipeline.settings import GenerationSettings
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, decode
from pipeline.talking.reading import read_contexts

_TOKENS = 32
_TEXT_REPEATS, _RETRIEVAL_REPEATS, _PICTURE_REPEATS = 5, 50, 3


@torch.no_grad()
def latency(gill: Gill, text: str, settings: GenerationSettings, seed: int) -> list[Result]:
    """Batch 1, on this machine, wall-clock; each measured several times after one warm-up.

    Appendix E.4, one A6000: text as fast as the language model alone; retrieval "less than 0.001s"
    more; "3.5s on average" for a picture of Stable Diffusion. Here, after `text`: tokens per second
    of 32 greedy tokens, of GILL and of the language model alone (transformers' own `generate`);
    seconds from the [IMG] hidden states to the retrieved row; and from there to the picture.
    """
    rows = {
        name: Rows(name, title, repeats, repeats, seed)
        for name, title, repeats in (
            ("text", f"{_TOKENS} greedy tokens", _TEXT_REPEATS),
            ("retrieval", "What a retrieved picture adds", _RETRIEVAL_REPEATS),
            ("generation", "A generated picture", _PICTURE_REPEATS),
        )
    }
    device = gill.language_model.device
    results = []
    for method, say in (("language_model", _alone(gill, text)), ("gill", _with_heads(gill, text))):
        seconds = _timed(say, _TEXT_REPEATS, device)
        speeds = Found(values={"tokens_per_second": [_TOKENS / one for one in seconds]})
        results += rows["text"].results(method, speeds)

    hidden = read_contexts(gill.model, gill.encoder, [[text]])
    index = gill.index
    if index is None:
        results.append(rows["retrieval"].absent("gill", "seconds", "there is no candidate index"))
    else:

        def retrieve() -> None:
            index.nearest(gill.model.text_query(hidden).float().cpu(), 1)

        seconds = _timed(retrieve, _RETRIEVAL_REPEATS, device)
        results += rows["retrieval"].results("gill", Found(values={"seconds": seconds}))

    generator = gill.generator
    if generator is None:
        results.append(rows["generation"].absent("gill", "seconds", "no image generator is loaded"))
        return results

    def generate() -> None:
        conditioning = gill.model.conditioning(hidden)
        generator.generate(conditioning, gill.empty_prompt, seeds=[seed], settings=settings)

    seconds = _timed(generate, _PICTURE_REPEATS, device)
    return results + rows["generation"].results("gill", Found(values={"seconds": seconds}))


def _with_heads(gill: Gill, text: str) -> Callable[[], object]:
    model = gill.model
    language_model = model.language_model
    prompt = language_model.embed(torch.tensor(_ids(gill, text)))
    settings = DecodingSettings(max_tokens=_TOKENS, max_images=0)
    return lambda: decode(model, Context(language_model), [prompt], settings, stop_ids=[])


def _alone(gill: Gill, text: str) -> Callable[[], object]:
    model = gill.language_model.model
    ids = torch.tensor([_ids(gill, text)], device=model.device)
    count = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS}
    mask = torch.ones_like(ids)
    return lambda: model.generate(
        ids, attention_mask=mask, do_sample=False, pad_token_id=0, **count
    )


def _ids(gill: Gill, text: str) -> Sequence[int]:
    language_model = gill.language_model
    words = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    room = language_model.max_positions - _TOKENS - len(language_model.start_ids)
    return [*language_model.start_ids, *words[:room]]


def _timed(work: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each repetition, the first one left out."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]
