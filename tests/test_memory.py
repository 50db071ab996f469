"""Predicted memory beside what torch's own profiler sees on a CPU, and derivations by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_language_models import tiny_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, OPTConfig

from doctor.blueprints import LanguageModelBlueprint
from doctor.chat_streams import chat_step
from doctor.document_streams import mixed_step
from doctor.dry_run import DryRun, Ledger
from doctor.memory import likely_draws, training_memory, validation_memory
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.packing import Packing
from pipeline.frozen.quantization import quantize
from pipeline.settings import MapperSizes, Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.fusion import join_products
from pipeline.training.recomputation import recompute_activations

LENGTHS = (5, 8, 9, 14)
VOCABULARY = 600
CONFIG = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    ffn_dim=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    word_embed_proj_dim=96,
    max_position_embeddings=64,
)
SIZES = HeadSizes(
    d=48, e=96, k=2, r=4, L=12, D=32, m=32, p=16,
    mapper=MapperSizes(encoder_layers=1, decoder_layers=1, adds_embedding=False),
)  # fmt: skip


def blueprint(dtype=torch.float32, quantization="none") -> LanguageModelBlueprint:
    return LanguageModelBlueprint(CONFIG, dtype, quantization)


def real_gill(dtype=torch.float32, quantization="none") -> MultimodalLanguageModel:
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    if quantization != "none":
        quantize(model, quantization, "cpu")
    return MultimodalLanguageModel(
        LanguageModel(model, tiny_tokenizer(), num_rows=VOCABULARY), Heads(SIZES)
    )


def real_batch(rows: int) -> CaptionBatch:
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(rows)]
    return CaptionBatch(
        tokens=torch.randint(3, 50, (sum(lengths),)),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        pooled=torch.randn(rows, SIZES.d),
        targets=torch.randn(rows, SIZES.L, SIZES.D),
        rows=torch.arange(rows),
    )


def allocated_at_most(call) -> int:
    """Bytes of torch's CPU allocator at the fullest moment of a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    total = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


CASES = {
    "plain": ({}, {}, False, torch.float32, "none"),
    "packed": ({}, {}, True, torch.float32, "none"),
    "no captioning": ({"captioning_weight": 0.0}, {}, False, torch.float32, "none"),
    "bfloat16": ({}, {}, False, torch.bfloat16, "none"),
    "recomputed": ({}, {"recompute_activations": True}, False, torch.float32, "none"),
    "joined": ({}, {"fuse_layers": True}, False, torch.float32, "none"),
    "in parts": ({}, {"micro_batch_size": 8}, True, torch.float32, "none"),
    "int8": ({}, {}, False, torch.float32, "int8"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_step_takes_what_was_predicted(case):
    objective, settings, packed, dtype, quantization = case
    objective = Objective(**objective)
    settings = TrainingSettings(batch_size=32, **settings)
    part = settings.micro_batch_size or 32
    predicted = training_memory(
        blueprint(dtype, quantization),
        SIZES,
        objective,
        settings,
        caption_tokens=LENGTHS,
        draws=PackingDraws.same(part, packed),
        device_type="cpu",
    )
    gill, batch = real_gill(dtype, quantization), real_batch(32)
    if settings.fuse_layers:
        join_products(gill.language_model)
    if settings.recompute_activations:
        recompute_activations(gill.language_model)
    draws = PackingDraws.same(32, packed)

    def step():
        backpropagate(gill, batch, objective, draws, settings.micro_batch_size)

    step()  # the start ids are read once
    gill.heads.zero_grad()
    assert predicted.working == pytest.approx(allocated_at_most(step), rel=0.2)


TURNS = partial(chat_step, shares={"asked": 8, "shown": 3, "told": 4, "joined": 1}, answer=10)
DOCUMENTS = partial(mixed_step, shares={"captions": 16, "documents": 16}, sizes=SIZES, room=60)


@pytest.mark.parametrize("part", [None, 8])
@pytest.mark.parametrize(
    ("turns", "draws"),
    [
        pytest.param(TURNS, PackingDraws.same(32, packed=False), id="turns"),
        pytest.param(DOCUMENTS, likely_draws(16, Objective()), id="documents"),
    ],
)
def test_a_step_of_turns_or_documents_takes_what_was_predicted(turns, draws, part):
    objective, settings = Objective(), TrainingSettings(batch_size=32, micro_batch_size=part)
    predicted = training_memory(
        blueprint(),
        SIZES,
        objective,
        settings,
        caption_tokens=LENGTHS,
        turns=turns,
        device_type="cpu",
    )
    gill, batch = real_gill(torch.float32, "none"), turns(real_batch(32))

    def step():
        backpropagate(gill, batch, objective, draws, part)

    step()
    gill.heads.zero_grad()
    assert predicted.working == pytest.approx(allocated_at_most(step), rel=0.2)


def test_documents_come_in_their_share_and_fit():
    batch = mixed_step(real_batch(32), {"captions": 24, "documents": 8}, SIZES, room=60)
    assert len(batch.captions) == 24
    assert len(batch.documents) == 8
    pictures = [part.picture for doc in batch.documents.documents for part in doc[1::3]]
    assert pictures == list(range(40))
    longest = max(
        sum(len(part.ids) for part in doc[::3]) + 5 * (SIZES.r + SIZES.k)
        for doc in batch.documents.documents
    )
    assert longest <= 60
    assert mixed_step(real_batch(4), {"documents": 4}, SIZES, room=60).captions is None


def test_turns_come_in_their_shares():
    documents = chat_step(real_batch(32), {"asked": 2, "shown": 1, "told": 1}, 30).documents
    kinds = [tuple(type(part).__name__ for part in document) for document in documents.documents]
    assert kinds.count(("Words", "Drawn")) == 16
    assert kinds.count(("Shown", "Words", "Words")) == 8
    assert kinds.count(("Words", "Words")) == 8


def test_weights_are_counted_exactly():
    heads = sum(p.numel() * 4 for p in Heads(SIZES).parameters())
    for dtype, quantization in ((torch.float32, "none"), (torch.bfloat16, "int8")):
        model = real_gill(dtype, quantization).language_model.model
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        predicted = training_memory(
            blueprint(dtype, quantization), SIZES, Objective(), TrainingSettings(batch_size=4),
            caption_tokens=LENGTHS, device_type="cpu",
        )  # fmt: skip
        assert predicted.weights == sum(t.nbytes for t in tensors.values())
        assert predicted.heads == 3 * heads


def test_nf4_takes_four_bits_and_eight_per_sixty_four():
    linear = 4 * (4 * 96 * 96 + 2 * 96 * 384)
    plain = training_memory(
        blueprint(), SIZES, Objective(), TrainingSettings(batch_size=4), caption_tokens=LENGTHS
    )
    nf4 = training_memory(
        blueprint(quantization="nf4"), SIZES, Objective(), TrainingSettings(batch_size=4),
        caption_tokens=LENGTHS,
    )  # fmt: skip
    saved = plain.weights - nf4.weights
    assert saved == pytest.approx(linear * (4 - 0.5 - 1 / 64 - 4 / (64 * 256)), rel=1e-3)


def test_an_opt_layer_keeps_what_the_derivation_says():
    """8 e per token, and 2 e of keys and values per token attended to (docstring of memory.py)."""
    tokens, e = 30, 96
    lengths = [10, 10, 10]

    def kept(layers: int) -> int:
        model = blueprint().build(layers)
        run = DryRun("cpu")
        inputs = torch.zeros(tokens, e, device="meta", requires_grad=True)
        out = run(lambda: model.hidden_states(inputs, Packing.of(lengths, inputs.device)))
        assert out.requires_grad
        return run.ledger.live

    per_layer = kept(5) - kept(4)
    assert per_layer == pytest.approx(4 * tokens * (8 * e + 2 * e), rel=0.03)


def test_fewer_layers_predict_the_whole_model(monkeypatch):
    settings = TrainingSettings(batch_size=32, micro_batch_size=8)

    def predict():
        more = {"caption_tokens": LENGTHS}
        step = training_memory(blueprint(), SIZES, Objective(), settings, **more)
        return step.with_validation(
            validation_memory(blueprint(), SIZES, Objective(), rows=200, **more)
        )

    short = predict()
    monkeypatch.setattr("doctor.memory._DEPTHS", (50, 100))
    assert short == predict()


def test_parts_and_recomputation_take_less():
    def peak(**settings):
        return training_memory(
            blueprint(), SIZES, Objective(), TrainingSettings(batch_size=64, **settings),
            caption_tokens=LENGTHS,
        ).working  # fmt: skip

    whole = peak()
    assert peak(micro_batch_size=8) < 0.4 * whole
    assert peak(recompute_activations=True) < 0.8 * whole


def test_a_ledger_counts_a_storage_once_and_until_it_is_gone():
    before = torch.zeros(1000, device="meta")
    with Ledger() as ledger:
        a = torch.zeros(10, device="meta")
        b = a.view(2, 5).t()
        c = before.view(10, 100)  # was there
        assert ledger.live == 40
        del a
        assert ledger.live == 40  # the view holds it
        product = b @ b.t()
        assert ledger.live == 40 + 4 * 25
        assert ledger.flop == 2 * 5 * 2 * 5
        del b, product, c
    assert (ledger.live, ledger.peak) == (0, 140)


@pytest.mark.parametrize(("unit", "packed"), [("pair", [0, 1, 0, 1]), ("batch", [1, 1, 1, 1])])
def test_likely_draws_pack_as_many_pairs_as_expected(unit, packed):
    draws = likely_draws(8, Objective(packing_unit=unit))
    assert draws.captioning == draws.generation == [bool(p) for p in packed]
    assert not any(likely_draws(8, Objective(pack_probability=0)).retrieval)
