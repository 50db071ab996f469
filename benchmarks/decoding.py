"""Greedy decoding with the key-value cache beside decoding without one.

    python -m benchmarks.decoding [--quick] [--json FILE]

Without a cache means the released structure: for every new token the whole sequence goes through
the language model again, all hidden states are kept and logits are formed at every position. Both
produce 32 tokens after prompts of 32, 128 and 512 tokens and must produce the same ones. An
OPT-125M-sized language model with random weights, one CPU thread, timed in CPU seconds, which a
busy machine disturbs least. The cached side includes reading the prompt.

--quick times the uncached side at its first, middle and last token and takes their mean for all 32;
the time grows evenly with the length.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from pipeline.multimodal_language_model import MultimodalLanguageModel
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from pipeline.decoding import Context, DecodingSettings, decode
from pipeline.heads import Heads, HeadSizes
from pipeline.language_model import LanguageModel
from tests.tiny_language_models import tiny_tokenizer

NUM_ROWS = 50266
NEW_TOKENS = 32
PROMPTS = (32, 128, 512)


def opt_gill() -> MultimodalLanguageModel:
    """Random weights, large enough that the model does not say one word for ever."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(init_std=0.1))
    language_model = LanguageModel(model, tiny_tokenizer(), num_rows=NUM_ROWS)
    return MultimodalLanguageModel(language_model, Heads(HeadSizes(d=1024, e=language_model.width)))


def cached(gill: MultimodalLanguageModel, prompt: Tensor) -> tuple[list[int], float]:
    """The tokens, and the seconds they took."""
    settings = DecodingSettings(max_tokens=NEW_TOKENS, max_images=0)
    start = time.process_time()
    [answer] = decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
    return answer.token_ids, time.process_time() - start


@torch.no_grad()
def uncached(
    gill: MultimodalLanguageModel, prompt: Tensor, tokens: Sequence[int], steps: Sequence[int]
) -> tuple[dict[int, int], float]:
    """What comes at `steps`, after the `tokens` before each, and the mean seconds of a step."""
    model, language_model = gill.language_model.model, gill.language_model
    said = language_model.embed(torch.tensor(tokens))
    found, elapsed = {}, 0.0
    for step in steps:
        start = time.process_time()
        sequence = torch.cat([prompt, said[:step]])[None]
        output = model(inputs_embeds=sequence, use_cache=False, output_hidden_states=True)
        found[step] = int(output.logits[0, -1, :NUM_ROWS].argmax())
        elapsed += time.process_time() - start
    return found, elapsed / len(steps)


def measure(quick: bool) -> dict[str, float]:
    """Both sides in turn for every prompt length."""
    torch.set_num_threads(1)
    gill = opt_gill()
    generator = torch.Generator().manual_seed(1)
    steps = (0, NEW_TOKENS // 2, NEW_TOKENS - 1) if quick else range(NEW_TOKENS)
    print("prompt  cached s  tokens/s  uncached s  speedup  distinct tokens")
    results: dict[str, float] = {}
    cached(gill, gill.language_model.embed(torch.arange(5, 9)))  # warm
    for length in PROMPTS:
        prompt = gill.language_model.embed(torch.randint(5, 50000, (length,), generator=generator))
        tokens, before = cached(gill, prompt)
        found, per_step = uncached(gill, prompt, tokens, steps)
        _, after = cached(gill, prompt)
        fast = (before + after) / 2
        if any(tokens[step] != token for step, token in found.items()):
            raise SystemExit(f"prompt of {length}: cached {tokens}, uncached {found}")
        slow = per_step * NEW_TOKENS
        results[f"speedup_{length}"] = slow / fast
        results[f"tokens_per_second_{length}"] = NEW_TOKENS / fast
        print(
            f"{length:6d}  {fast:8.2f}  {NEW_TOKENS / fast:8.1f}  {slow:10.2f}  {slow / fast:7.1f}"
            f"  {len(set(tokens)):15d}"
        )
    return results


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within 50 s")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    line = json.dumps(measure(arguments.quick))
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
