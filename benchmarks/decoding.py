"""Greedy decoding with the key-value cache beside decoding without one.

    python -m benchmarks.decoding [--device cuda] [--quick] [--json FILE]

    speedup_32, speedup_128, speedup_512    by the length of the prompt
    of_generate_32, ...                     transformers' own `generate` with its cache, over ours

Without a cache means the released structure: for every new token the whole sequence goes through
the language model again, all hidden states are kept and logits are formed at every position. Both
say 32 tokens, and must say the same ones (on a GPU, whose bfloat16 rounds differently in different
shapes, `same_tokens` is a share). Random weights, of OPT-125M's size on a CPU and OPT-6.7B's on a
GPU. The cached side includes reading the prompt. --quick times the uncached side at its first,
middle and last token and takes their mean for all; the time grows evenly with the length.

On a GPU also: one and eight conversations at OPT-1.3B's and 6.7B's sizes. Every token reads all
weights, so the rate of a copy bounds a single conversation: `of_copy` is the share that the weights
alone account for. The first answer meets every length of the keys for the first time, for each of
which cuDNN's attention makes a plan: `first_s` beside `again_s`, with it and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.harness import ATTENTION, Bench, Numbers, copy_rate, run
from benchmarks.random_models import opt_gill
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.talking.decoding import Context, DecodingSettings, decode

NEW_TOKENS = 32


def measure(bench: Bench) -> None:
    size = bench.size("toy", "125m", "6.7b")
    gill = opt_gill(size, bench.device, bench.dtype, talks=not bench.on_gpu)
    model, generator = gill.language_model, torch.Generator().manual_seed(1)
    answer(gill, [model.embed(torch.arange(5, 9))])  # warm
    for length in (32, 128, 512):
        ids = torch.randint(5, model.num_rows - 8, (length,), generator=generator)
        headline = {"speedup": f"speedup_{length}", "tokens_per_s": f"tokens_per_second_{length}"}
        headline["of_generate"] = f"of_generate_{length}"
        work = partial(compared, bench, gill, model.embed(ids))
        bench.part(f"prompt of {length}", work, **headline)
    if bench.extra:
        copies = copy_rate(bench)
        conversations(bench, gill, size, copies)
        del gill, model, work
        if not bench.quick and not bench.toy:
            conversations(bench, opt_gill("1.3b", bench.device, bench.dtype), "1.3b", copies)


def compared(bench: Bench, gill: MultimodalLanguageModel, prompt: Tensor) -> Numbers:
    """Both sides, and whether they say the same.

    Raises RuntimeError where they do not on a CPU, whose float32 decides no tie differently.
    """
    model = gill.language_model.model

    def generate() -> None:
        model.generate(
            inputs_embeds=prompt[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=prompt.device),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )

    steps = (0, NEW_TOKENS // 2, NEW_TOKENS - 1) if bench.quick else range(NEW_TOKENS)
    answers: list[list[int]] = []
    found: list[int] = []
    # In turns, as the machine may slow down between one and the other.
    times = [
        (bench.once(lambda: answers.extend(answer(gill, [prompt]))), bench.once(generate))
        for _ in range(3)
    ]
    cached, generated = (median(side) for side in zip(*times))
    tokens = answers[0]
    slow = bench.once(lambda: found.extend(uncached(gill, prompt, tokens, steps)))
    slow *= NEW_TOKENS / len(steps)
    same = sum(tokens[step] == token for step, token in zip(steps, found)) / len(steps)
    if same < 1 and not bench.on_gpu:
        raise RuntimeError(f"cached {tokens}, uncached {found}")
    return {
        "cached_s": cached,
        "uncached_s": slow,
        "speedup": slow / cached,
        "of_generate": generated / cached,
        "tokens_per_s": NEW_TOKENS / cached,
        "same_tokens": same,
        "distinct": len(set(tokens)),
    }


def answer(
    gill: MultimodalLanguageModel, prompts: Sequence[Tensor], new: int = NEW_TOKENS
) -> list[list[int]]:
    """`new` tokens after each prompt, together."""
    settings = DecodingSettings(max_tokens=new, max_images=0)
    context = Context(gill.language_model, len(prompts))
    return [answer.token_ids for answer in decode(gill, context, prompts, settings, stop_ids=())]


@torch.no_grad()
def uncached(
    gill: MultimodalLanguageModel, prompt: Tensor, tokens: Sequence[int], steps: Sequence[int]
) -> list[int]:
    """What comes at `steps`, after the `tokens` before each."""
    model = gill.language_model
    said, found = model.embed(torch.tensor(tokens)), []
    for step in steps:
        sequence = torch.cat([prompt, said[:step]])[None]
        output = model.model(inputs_embeds=sequence, use_cache=False, output_hidden_states=True)
        found.append(int(output.logits[0, -1, : model.num_rows].argmax()))
    return found


def conversations(bench: Bench, gill: MultimodalLanguageModel, size: str, copies: float) -> None:
    """One and eight at once, then lengths of the keys that were not seen before."""
    model, new = gill.language_model, 4 if bench.toy else 64
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())

    def speed(rows: int) -> Numbers:
        prompts = [model.embed(torch.arange(5, 37))] * rows
        seconds = bench.seconds(lambda: answer(gill, prompts, new), times=3)
        return {
            "tokens_per_s": rows * new / seconds,
            "ms_per_token": 1e3 * seconds / new,
            "of_copy": weights * new / seconds / copies,
        }

    def new_lengths(attention: str) -> Numbers:
        prompts = [model.embed(torch.arange(200) % 50)]
        with sdpa_kernel(ATTENTION[attention]):
            first, again = (bench.once(lambda: answer(gill, prompts, new)) for _ in range(2))
        return {"first_s": first, "again_s": again}

    for rows in (1, 8):
        bench.part(f"{size}, {rows} at once", partial(speed, rows))
    for attention in ATTENTION:
        bench.part(f"{size}, new lengths, {attention}", partial(new_lengths, attention))


if __name__ == "__main__":
    run(measure, __doc__)
