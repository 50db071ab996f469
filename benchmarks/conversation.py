"""What a conversation costs: its first words, a retrieval, a late turn, eight at once.

    python -m benchmarks.conversation [--quick] [--json FILE]

    first_piece_passes     time to the first words / one forward pass of the prompt (wanted < 2)
    retrieval_ms_100k      what retrieval adds among 100 000 pictures, in ms (wanted < 1)
    turn_20_over_turn_2    time of late turns / time of early turns (wanted: about 1)
    batch_8_speedup        8 conversations one by one / together (wanted >= 3)

Language model: the shape of OPT-125M with random weights. Index: ivf-sq8, 256 wide, vectors in
clusters. Also printed: how often the index finds the nearest picture; retrieval with cold caches,
as it is right after the language model's pass; a late turn read anew with its whole history, as
without memory; and the speedup of a batch that generates pictures, on the miniature models. One
CPU thread; times are CPU seconds, which a busy machine disturbs least. --quick takes fewer
repetitions and a cheaper index.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.functional import normalize
from transformers import OPTConfig, OPTForCausalLM

from miniature.backbones import SHIPPED
from pipeline.answers import ReplySettings, Text
from pipeline.conversation import Conversation, reply_together
from pipeline.decoding import DecodingSettings
from pipeline.heads import Heads, HeadSizes
from pipeline.image_generator import load_image_generator
from pipeline.language_model import LanguageModel, load_language_model
from pipeline.multimodal_language_model import MultimodalLanguageModel
from pipeline.packing import Packing
from pipeline.retrieval import RetrievalIndex, build_index
from pipeline.settings import GenerationSettings, IndexSettings
from pipeline.speaker import Speaker
from pipeline.text_conditioner import load_text_conditioner
from pipeline.visual_encoder import load_visual_encoder
from tests.tiny_language_models import NUM_WORDS, tiny_tokenizer

NUM_ROWS = 50266
WIDTH = 256


def speaker_of(gill: MultimodalLanguageModel, encoder: Any = None, **parts: Any) -> Speaker:
    """A speaker with the given parts and no others."""
    absent: dict[str, Any] = dict.fromkeys(("generator", "empty_prompt", "index", "decision"))
    return Speaker(model=gill, encoder=encoder, open_picture=_no_picture, **(absent | parts))


def _no_picture(name: str) -> Any:
    raise FileNotFoundError(name)


def opt_gill() -> MultimodalLanguageModel:
    """Random weights, large enough that the model does not say one word for ever."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(init_std=0.1))
    language_model = LanguageModel(model, tiny_tokenizer(), num_rows=NUM_ROWS)
    return MultimodalLanguageModel(
        language_model, Heads(HeadSizes(d=1024, e=language_model.width, p=WIDTH)).eval()
    )


def some_words(number: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, NUM_WORDS - 4, (number,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in chosen)


def words(number: int) -> ReplySettings:
    return ReplySettings(want="text", decoding=DecodingSettings(max_tokens=number, max_images=0))


def timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def first_piece(speaker: Speaker, length: int, times: int) -> dict[str, float]:
    """A conversation's first words, beside one pass of the language model over its prompt."""
    model, text = speaker.language_model, some_words(length, 1)
    inputs = torch.cat([speaker.start(), *(vectors for _, vectors in speaker.embed([text]))])

    @torch.no_grad()
    def one_pass() -> None:
        model.logits(model.hidden_states(inputs, Packing.of([len(inputs)], model.device))[-1:])

    def until_first_words() -> None:
        events = Conversation(speaker).stream([text], words(8))
        next(event for event in events if isinstance(event, Text))

    one_pass()
    until_first_words()
    pairs = [(timed(one_pass), timed(until_first_words)) for _ in range(times)]
    alone, first = (median(side) for side in zip(*pairs))
    print(f"prompt of {length}: one pass {1e3 * alone:.0f} ms, first words {1e3 * first:.0f} ms")
    return {"first_piece_passes": first / alone}


def retrieval(
    gill: MultimodalLanguageModel, settings: IndexSettings, times: int
) -> dict[str, float]:
    """Query and search among 100 000 vectors, beside the exact search's result."""
    generator = torch.Generator().manual_seed(2)
    spectrum = torch.arange(1, WIDTH + 1) ** -0.5
    centres = torch.randn(316, WIDTH, generator=generator) * spectrum
    own = torch.randint(0, 316, (100_000,), generator=generator)
    noise = torch.randn(100_000, WIDTH, generator=generator) * spectrum
    keys = normalize(centres[own] + 0.7 * noise, dim=1)
    start = time.perf_counter()
    index: RetrievalIndex = build_index(
        [(torch.arange(100_000), keys)], settings, heads="", features=""
    )
    built = time.perf_counter() - start
    push = torch.randn(times, WIDTH, generator=generator) * spectrum
    queries = normalize(keys[:times] + 0.5 * push / push.norm(dim=1, keepdim=True), dim=1)
    hidden = torch.randn(1, 8, gill.language_model.width, generator=generator)

    @torch.no_grad()
    def project() -> None:
        gill.text_query(hidden)

    def add(query: torch.Tensor) -> int:
        project()
        return index.search(query, 1, exclude=[5, 6, 7])[0][0].row

    nearest = (queries @ keys.T).argmax(1).tolist()
    right = sum(add(query) == row for query, row in zip(queries.split(1), nearest))
    warm = 1e3 * median(timed(partial(add, query)) for query in queries.split(1))
    cold = []
    for query in queries.split(1):
        keys.sum()  # 100 MB: nothing of the index is left in the processor's caches
        cold.append(timed(partial(add, query)))
    print(
        f"retrieval among 100 000 ({settings.kind}, built in {built:.0f} s): {warm:.2f} ms, with "
        f"cold caches {1e3 * median(cold):.2f} ms; nearest found {100 * right / times:.0f} %"
    )
    return {
        "retrieval_ms_100k": warm,
        "retrieval_ms_100k_cold": 1e3 * median(cold),
        "retrieval_recall_at_1": right / times,
    }


def long_conversation(speaker: Speaker, tokens: int) -> dict[str, float]:
    """20 turns; each late one beside the same turn read anew with all that was said before."""
    conversation, seconds, history = Conversation(speaker), [], ""
    settings = words(tokens)
    Conversation(speaker).reply([some_words(tokens, 0)], settings)
    for turn in range(1, 21):
        text = some_words(tokens, turn)
        start = time.process_time()
        reply = conversation.reply([text], settings)
        seconds.append(time.process_time() - start)
        history += f" {text}{reply.text}"
    anew = timed(lambda: Conversation(speaker).reply([history], settings))
    early, late = median(seconds[1:4]), median(seconds[17:20])
    print(
        f"turns of {tokens} + {tokens} tokens: turn 2 {1e3 * early:.0f} ms, turn 20 "
        f"{1e3 * late:.0f} ms; without memory turn 20 would take {1e3 * anew:.0f} ms"
    )
    return {"turn_20_over_turn_2": late / early, "without_memory_over_turn_20": anew / late}


def batch(speaker: Speaker, tokens: int, rounds: int) -> dict[str, float]:
    """8 conversations with prompts of different lengths, each answered alone and all together."""
    settings = words(tokens)
    texts = [some_words(6 + 2 * i, i) for i in range(8)]
    alone = together = 0.0
    for _ in range(rounds):
        alone += timed(lambda: [Conversation(speaker).reply([text], settings) for text in texts])
        together += timed(
            lambda: reply_together([Conversation(speaker).prepare([t], settings) for t in texts])
        )
    print(
        f"8 conversations, {tokens} tokens each: one by one {alone / rounds:.2f} s, "
        f"together {together / rounds:.2f} s"
    )
    return {"batch_8_speedup": alone / together}


def batch_with_pictures(steps: int) -> dict[str, float]:
    """The same with a generated picture each, on the miniature models."""
    language_model = load_language_model(SHIPPED.language_model)
    encoder = load_visual_encoder(f"local-dir:{SHIPPED.visual_encoder}")
    conditioner = load_text_conditioner(str(SHIPPED.image_generator))
    sizes = HeadSizes(
        d=encoder.width, e=language_model.width, L=conditioner.length, D=conditioner.width, m=64
    )
    speaker = speaker_of(
        MultimodalLanguageModel(language_model, Heads(sizes).eval()),
        encoder,
        generator=load_image_generator(str(SHIPPED.image_generator)),
        empty_prompt=conditioner.encode([""]),
        generation=GenerationSettings(steps=steps, guidance=2.5),
    )
    settings = ReplySettings(want="generate")
    texts = [f"in the sea there is a {color} ring." for color in ("red", "blue", "green", "big")]
    texts += [f"a {text}" for text in texts]
    Conversation(speaker).reply(texts[:1], settings)
    alone = timed(lambda: [Conversation(speaker).reply([text], settings) for text in texts])
    together = timed(
        lambda: reply_together([Conversation(speaker).prepare([t], settings) for t in texts])
    )
    print(
        f"8 miniature conversations with a picture each: one by one {alone:.2f} s, "
        f"together {together:.2f} s"
    )
    return {"batch_8_pictures_speedup": alone / together}


def measure(quick: bool) -> dict[str, float]:
    """All of it, in turn."""
    torch.set_num_threads(1)
    gill = opt_gill()
    speaker = speaker_of(gill)
    # Fewer lists are placed sooner; each then holds more vectors, so fewer are read.
    cheaper = {"ivf_lists": 400, "ivf_training_vectors": 16_000, "ivf_probes": 16}
    index = IndexSettings.model_validate({"kind": "ivf-sq8"} | (cheaper if quick else {}))
    results = first_piece(speaker, 128, 3 if quick else 9)
    results |= long_conversation(speaker, 6 if quick else 16)
    results |= batch(speaker, 16 if quick else 24, 1 if quick else 3)
    results |= batch_with_pictures(12)
    results |= retrieval(gill, index, 200)
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
