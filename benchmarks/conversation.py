"""What a conversation costs: its first words, a retrieval, a late turn, eight at once.

    python -m benchmarks.conversation [--device cuda] [--quick] [--json FILE]

    first_piece_passes     time to the first words / one forward pass of the prompt (wanted < 2)
    retrieval_ms_100k      what retrieval adds among 100 000 pictures, in ms (wanted < 1)
    turn_20_over_turn_2    time of late turns / time of early turns (wanted: about 1)
    http_turn_30_over_turn_2     the same over HTTP, where every request tells all (wanted <= 1.5)
    batch_8_speedup        8 conversations one by one / together (wanted >= 3)

Language model: random weights of OPT-125M's size, on a GPU of OPT-6.7B's. Index: ivf-sq8, 256 wide,
on the CPU. Also: how often the index finds the nearest picture; retrieval with cold caches, as it
is right after the language model's pass; a late turn read anew with its whole history, as without
memory; and the speedup of a batch that generates pictures, on the miniature models. --quick takes
fewer repetitions and a cheaper index.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from statistics import median
from typing import Any

import torch
from starlette.testclient import TestClient

from app.serving.service import create_app
from app.serving.settings import RequestLimits, ServiceSettings
from benchmarks.harness import Bench, Numbers, run
from benchmarks.index import pictures, queries
from benchmarks.random_models import opt_gill
from corpora.pictures import open_picture
from gill.loading import Gill
from miniature.backbones import SHIPPED
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.image_generator import load_image_generator
from pipeline.frozen.language_model import load_language_model
from pipeline.frozen.packing import Packing
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.frozen.visual_encoder import load_visual_encoder
from pipeline.settings import GenerationSettings, IndexSettings
from pipeline.talking.answers import ReplySettings, Text
from pipeline.talking.batch import reply_together
from pipeline.talking.conversation import Conversation
from pipeline.talking.decoding import DecodingSettings
from pipeline.talking.retrieval import build_index
from pipeline.talking.speaker import Speaker
from tests.tiny_language_models import NUM_WORDS


def measure(bench: Bench) -> None:
    (speaker, painter), short = speakers(bench), bench.quick or bench.toy
    first = partial(first_words, bench, speaker, 128, 3 if short else 9)
    bench.part("first words after 128", first, passes="first_piece_passes")
    turns = partial(long_conversation, bench, speaker, 6 if short else 16)
    headline = {"late/early": "turn_20_over_turn_2", "anew/late": "without_memory_over_turn_20"}
    bench.part("20 turns", turns, **headline)
    for name, prefix_bytes in (("30 turns over HTTP", 500_000_000), ("the same, no prefixes", 0)):
        over_http = partial(http_conversation, bench, speaker, 6 if short else 16, prefix_bytes)
        headline = {"30/2": "http_turn_30_over_turn_2"} if prefix_bytes else {}
        bench.part(name, over_http, **headline)
    texts = [some_words(6 + 2 * i, i) for i in range(8)]
    together = partial(batch, bench, speaker, texts, words(12 if short else 24), 1 if short else 3)
    bench.part("8 conversations", together, speedup="batch_8_speedup")
    texts = [f"in the sea there is a {color} ring." for color in ("red", "blue", "green", "big")]
    texts += [f"a {text}" for text in texts]
    pictured = partial(batch, bench, painter, texts, ReplySettings(want="generate"), 1)
    bench.part("8 miniature, with a picture each", pictured, speedup="batch_8_pictures_speedup")
    headline = {"warm_ms": "retrieval_ms_100k", "cold_ms": "retrieval_ms_100k_cold"}
    bench.part("retrieval", partial(retrieval, bench, speaker.model), **headline)


def first_words(bench: Bench, speaker: Speaker, length: int, rounds: int) -> Numbers:
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
    numbers = bench.in_turn(rounds, one_pass=one_pass, first_words=until_first_words)
    return {"passes": numbers.pop("speedup"), **numbers}


def long_conversation(bench: Bench, speaker: Speaker, tokens: int) -> Numbers:
    """20 turns; the late ones beside a turn read anew with all that was said before."""
    conversation, seconds, history = Conversation(speaker), [], ""
    settings = words(tokens)
    Conversation(speaker).reply([some_words(tokens, 0)], settings)
    for turn in range(1, 21):
        text, said = some_words(tokens, turn), []
        seconds.append(bench.once(lambda: said.append(conversation.reply([text], settings))))  # noqa: B023
        history += f" {text}{said[0].text}"
    anew = bench.once(lambda: Conversation(speaker).reply([history], settings))
    early, late = median(seconds[1:4]), median(seconds[17:20])
    ratios = {"late/early": late / early, "anew/late": anew / late}
    return {"turn_2_s": early, "turn_20_s": late, **ratios}


def http_conversation(bench: Bench, speaker: Speaker, tokens: int, prefix_bytes: int) -> Numbers:
    """30 turns by the service, each telling the whole history."""
    gill = Gill(**{field.name: getattr(speaker, field.name) for field in fields(Speaker)})
    settings = ServiceSettings(
        prefix_bytes=prefix_bytes, limits=RequestLimits(max_characters=10**6)
    )
    client = TestClient(create_app(gill, settings), base_url="http://localhost")
    told: list[dict[str, Any]] = []
    how = {"max_tokens": tokens, "gill": {"want": "text"}}
    seconds, said = [], []
    for turn in range(1, 33):
        told.append({"role": "user", "content": some_words(tokens, turn)})
        body = {"messages": told, **how}
        answer: Any = None

        def ask() -> None:
            nonlocal answer
            answer = client.post("/v1/chat/completions", json=body)  # noqa: B023

        seconds.append(bench.once(ask))
        told.append(answer.json()["choices"][0]["message"])
        said.append(answer.json()["usage"])
    early, tenth, late = (median(seconds[turn - 2 : turn + 1]) for turn in (2, 10, 30))
    cached = said[29]["prompt_tokens_details"]["cached_tokens"] / said[29]["prompt_tokens"]
    times = {"turn_2_s": early, "turn_10_s": tenth, "turn_30_s": late}
    return {**times, "10/2": tenth / early, "30/2": late / early, "cached_share": cached}


def batch(
    bench: Bench, speaker: Speaker, texts: list[str], settings: ReplySettings, rounds: int
) -> Numbers:
    """Conversations answered all together and each alone."""
    Conversation(speaker).reply(texts[:1], settings)
    return bench.in_turn(
        rounds,
        together=lambda: reply_together(
            [Conversation(speaker).prepare([text], settings) for text in texts]
        ),
        alone=lambda: [Conversation(speaker).reply([text], settings) for text in texts],
    )


def retrieval(bench: Bench, gill: MultimodalLanguageModel) -> Numbers:
    """Query and search among 100 000 vectors, beside exact search's result."""
    # Fewer lists are placed sooner; each then holds more vectors, so fewer are read.
    cheaper = {"ivf_lists": 400, "ivf_training_vectors": 16_000, "ivf_probes": 16}
    options = cheaper if bench.quick and not bench.toy else {}
    settings = IndexSettings.model_validate({"kind": "ivf-sq8", **options})
    blocks = pictures(2000 if bench.toy else 100_000)
    keys, asked = torch.cat([block for _, block in blocks]), queries(blocks, 200)
    index = build_index(blocks, settings, heads="random", features="random")
    hidden = torch.randn(1, gill.heads.sizes.r, gill.language_model.width).to(bench.device)

    @torch.no_grad()
    def add(query: torch.Tensor) -> int:
        gill.text_query(hidden)
        return index.search(query, 1, exclude=[5, 6, 7])[0][0].row

    nearest = (asked @ keys.T).argmax(1).tolist()
    right = [add(query) == row for query, row in zip(asked.split(1), nearest)]
    warm = [bench.once(partial(add, query)) for query in asked.split(1)]
    cold = []
    for query in asked.split(1):
        keys.sum()  # 100 MB: nothing of the index is left in the processor's caches
        cold.append(bench.once(partial(add, query)))
    times = {"warm_ms": 1e3 * median(warm), "cold_ms": 1e3 * median(cold)}
    return {**times, "recall_at_1": sum(right) / len(right)}


def speakers(bench: Bench) -> tuple[Speaker, Speaker]:
    """One that says words; and the miniature, with untrained heads, that makes pictures."""
    encoder = load_visual_encoder(f"local-dir:{SHIPPED.visual_encoder}", device=bench.device)
    conditioner = load_text_conditioner(str(SHIPPED.image_generator), device=bench.device)
    miniature = load_language_model(SHIPPED.language_model, device=bench.device)
    widths = {"d": encoder.width, "e": miniature.width, "D": conditioner.width}
    heads = Heads(HeadSizes(**widths, L=conditioner.length, m=64)).eval()
    alike = partial(
        Speaker,
        encoder=encoder,
        empty_prompt=conditioner.encode([""]),
        index=None,
        decision=None,
        open_picture=open_picture,
        generation=GenerationSettings(steps=2 if bench.toy else 12, guidance=2.5),
    )
    size = bench.size("toy", "125m", "6.7b")
    gill = opt_gill(size, bench.device, bench.dtype, talks=not bench.on_gpu)
    generator = load_image_generator(str(SHIPPED.image_generator), device=bench.device)
    pictured = MultimodalLanguageModel(miniature, heads)
    return alike(model=gill, generator=None), alike(model=pictured, generator=generator)


def some_words(number: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, NUM_WORDS - 4, (number,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in chosen)


def words(number: int) -> ReplySettings:
    return ReplySettings(want="text", decoding=DecodingSettings(max_tokens=number, max_images=0))


if __name__ == "__main__":
    run(measure, __doc__)
