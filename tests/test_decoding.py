"""Decoding, against the language model's own generation and its own uncached forward pass."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.language_model import LanguageModel
from pipeline.settings import MapperSizes
from pipeline.talking.context import Context
from pipeline.talking.decoding import (
    DecodingSettings,
    EndPiece,
    ImagePiece,
    TextPiece,
    decode,
    next_logits,
    released_image_logit,
    stream,
)
from pipeline.talking.sampling import (
    draw_tokens,
    filtered_probabilities,
    penalise_presence,
    penalise_repetition,
)
from tests.tiny_language_models import (
    CONFIGURATIONS,
    NUM_WORDS,
    TABLE_ROWS,
    tiny_model,
    tiny_tokenizer,
)

R = 3


def tiny_gill(name: str) -> MultimodalLanguageModel:
    """A random model whose matrices are large enough that it does not repeat one word for ever."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    language_model = LanguageModel(model, tiny_tokenizer())
    torch.manual_seed(0)
    sizes = HeadSizes(
        d=6, e=language_model.width, k=2, r=R, L=4, D=5, m=8, p=4,
        mapper=MapperSizes(encoder_layers=1, decoder_layers=1),
    )  # fmt: skip
    heads = Heads(sizes).to(language_model.dtype)
    torch.nn.init.normal_(heads.image_embeddings, std=float(language_model.output_rows.std()))
    return MultimodalLanguageModel(language_model, heads)


def want_image(gill: MultimodalLanguageModel, prompt: torch.Tensor) -> None:
    """Make [IMG1] look like a word that greedily follows the prompt, only more so."""
    words = uncached_greedy(gill, prompt, 9, images=False)
    word = next(word for word in words if word != words[0])
    with torch.no_grad():
        gill.heads.image_embeddings[0] = 1.05 * gill.language_model.output_rows[word]


@pytest.fixture(scope="module")
def gill() -> MultimodalLanguageModel:
    gill = tiny_gill("opt")
    want_image(gill, prompts_of(gill, 4, 9)[0])
    return gill


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: a multi-byte character takes several tokens."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>")


def prompts_of(gill: MultimodalLanguageModel, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [
        gill.language_model.embed(torch.randint(3, NUM_WORDS, (n,), generator=generator))
        for n in lengths
    ]


def uncached_greedy(
    gill: MultimodalLanguageModel, prompt: torch.Tensor, steps: int, images: bool
) -> list[int]:
    """The slow way: the whole sequence through the model again for every token."""
    model, table = gill.language_model.model, gill.language_model
    image_rows = gill.heads.image_embeddings.detach()
    x, ids = prompt, []
    for _ in range(steps):
        hidden = model.base_model(inputs_embeds=x[None]).last_hidden_state[0, -1]
        logits = torch.cat([table.output_rows @ hidden, image_rows[:1] @ hidden])
        if not images:
            logits[-1] = -torch.inf
        token = int(logits.argmax())
        if token == table.num_rows:
            ids += range(token, token + R)
            x = torch.cat([x, image_rows])
        else:
            ids.append(token)
            x = torch.cat([x, table.embed(torch.tensor([token]))])
    return ids


def test_greedy_equals_the_models_own_generation(gill):
    [prompt] = prompts_of(gill, 7)
    own = gill.language_model.model.generate(
        inputs_embeds=prompt[None],
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        # Rows that the frozen softmax leaves out.
        bad_words_ids=[[i] for i in range(gill.language_model.num_rows, TABLE_ROWS)],
    )
    settings = DecodingSettings(max_tokens=20, max_images=0)
    [answer] = decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
    assert answer.token_ids == own[0].tolist()
    assert answer.end == "max_tokens"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ragged_batches_with_images_equal_the_uncached_single_rows(name):
    gill = tiny_gill(name)
    prompts = prompts_of(gill, 3, 11, 1, 6)
    want_image(gill, prompts[0])
    settings = DecodingSettings(max_tokens=9, max_images=9, image_bias=0.0)
    context = Context(gill.language_model, 4)
    answers = decode(gill, context, prompts, settings, stop_ids=())
    expected = [uncached_greedy(gill, prompt, 9, images=True) for prompt in prompts]
    assert [answer.token_ids for answer in answers] == expected
    # Words and images came side by side.
    assert 0 < sum(len(answer.images) for answer in answers) < 4 * 9
    assert context.lengths == [len(p) + len(ids) for p, ids in zip(prompts, expected)]


def test_by_majority_an_image_comes_where_it_is_likelier_than_all_words_together(gill):
    model = gill.language_model
    prompt = [model.embed(torch.tensor([5, 6, 7]))]
    context = Context(model)
    context.note(0, prompt[0])
    context.read()
    logits = next_logits(gill, context.last_hidden)[0].detach()
    words, image = logits[:-1], float(logits[-1])
    likeliest, together = float(words.max()) - image, float(words.logsumexp(0)) - image

    def first(bias, **settings):
        asked = DecodingSettings(max_tokens=1, image_bias=bias, **settings)
        [answer] = decode(gill, Context(model), prompt, asked, seeds=[0])
        return type(answer.pieces[0])

    between = (likeliest + together) / 2
    assert [first(bias) for bias in (likeliest - 0.1, between)] == [TextPiece, ImagePiece]
    majority = [first(b, image_choice="majority") for b in (between, together + 0.1)]
    assert majority == [TextPiece, ImagePiece]
    assert first(between, image_choice="majority", temperature=1e-6) is ImagePiece, "sampled"


def test_hidden_states_of_an_image_are_those_of_an_uncached_pass(gill):
    prompts = prompts_of(gill, 3, 9)
    settings = DecodingSettings(max_tokens=6, max_images=2, min_tokens_before_image=2,
                                image_bias=1e4)  # fmt: skip
    answers = decode(gill, Context(gill.language_model, 2), prompts, settings, stop_ids=())
    for prompt, answer in zip(prompts, answers):
        assert [len(piece.token_ids) for piece in answer.pieces] == [2, R, R, 2]
        words = gill.language_model.embed(torch.tensor(answer.pieces[0].token_ids))
        image = gill.heads.image_embeddings.detach()
        x = torch.cat([prompt, words, image, image])
        hidden = gill.language_model.model.base_model(inputs_embeds=x[None]).last_hidden_state[0]
        for i, piece in enumerate(answer.images):
            start = len(prompt) + 2 + i * R
            torch.testing.assert_close(piece.hidden, hidden[start : start + R])


def test_an_image_at_the_very_last_token_has_its_hidden_states(gill):
    [prompt] = prompts_of(gill, 5)
    settings = DecodingSettings(max_tokens=1, image_bias=1e4)
    [answer] = decode(gill, Context(gill.language_model), [prompt], settings)
    assert [type(piece) for piece in answer.pieces] == [ImagePiece]
    assert answer.images[0].hidden.shape == (R, 32)
    assert answer.end == "max_tokens"


def test_a_conversation_reads_each_turn_once(gill):
    settings = DecodingSettings(max_tokens=5, max_images=1)
    turns = [prompts_of(gill, 4, 9), prompts_of(gill, 6, 2), prompts_of(gill, 1, 3)]
    context, history = Context(gill.language_model, 2), [turns[0][0][:0]] * 2
    for turn in turns:
        answers = decode(gill, context, turn, settings, stop_ids=())
        for row, answer in enumerate(answers):
            history[row] = torch.cat([history[row], turn[row]])
            [alone] = decode(
                gill, Context(gill.language_model), [history[row]], settings, stop_ids=()
            )
            assert alone.token_ids == answer.token_ids
            for piece in answer.pieces:
                if isinstance(piece, ImagePiece):
                    spoken = gill.heads.image_embeddings.detach()
                else:
                    spoken = gill.language_model.embed(torch.tensor(piece.token_ids))
                history[row] = torch.cat([history[row], spoken])
    assert context.lengths == [len(x) for x in history]


def test_an_empty_prompt_goes_on_where_the_context_stands(gill):
    [prompt] = prompts_of(gill, 6)
    [whole] = decode(
        gill, Context(gill.language_model), [prompt],
        DecodingSettings(max_tokens=8, max_images=9), stop_ids=(),
    )  # fmt: skip
    context, half = Context(gill.language_model), DecodingSettings(max_tokens=4, max_images=9)
    [first] = decode(gill, context, [prompt], half, stop_ids=())
    [second] = decode(gill, context, [prompt[:0]], half, stop_ids=())
    assert first.token_ids + second.token_ids == whole.token_ids


def test_samples_depend_on_the_rows_own_seed_alone(gill):
    prompts = prompts_of(gill, 3, 8, 5)
    settings = DecodingSettings(max_tokens=12, max_images=2, temperature=0.9, top_p=0.95)
    together = decode(gill, Context(gill.language_model, 3), prompts, settings, seeds=[7, 8, 7])
    for prompt, seed, answer in zip(prompts, [7, 8, 7], together):
        [alone] = decode(gill, Context(gill.language_model), [prompt], settings, seeds=[seed])
        assert alone.token_ids == answer.token_ids
    [other] = decode(gill, Context(gill.language_model), prompts[:1], settings, seeds=[9])
    assert other.token_ids != together[0].token_ids


def test_samples_follow_the_models_odds(gill):
    [prompt] = prompts_of(gill, 4)
    num = 2000
    settings = DecodingSettings(max_tokens=1, max_images=0, temperature=2.0, top_k=4)
    answers = decode(
        gill, Context(gill.language_model, num), [prompt] * num, settings,
        seeds=range(num), stop_ids=(),
    )  # fmt: skip
    hidden = gill.language_model.model.base_model(inputs_embeds=prompt[None]).last_hidden_state
    odds = (gill.language_model.output_rows @ hidden[0, -1] / 2.0).topk(4)
    expected = dict(zip(odds.indices.tolist(), odds.values.softmax(0).tolist()))
    drawn = [answer.token_ids[0] for answer in answers]
    assert set(drawn) <= expected.keys()
    for token, probability in expected.items():
        error = (probability * (1 - probability) / num) ** 0.5
        assert abs(drawn.count(token) / num - probability) < 4 * error


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.6), (5, 1.0), (7, 0.8), (500, 0.3)])
def test_filters_are_those_of_transformers(top_k, top_p):
    torch.manual_seed(1)
    logits = torch.randn(6, 50) * 2
    expected = logits
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = filtered_probabilities(logits, 1.0, top_k, top_p)
    ours = ours / ours.sum(-1, keepdim=True)
    torch.testing.assert_close(ours.float(), expected.softmax(-1))


@given(
    logits=arrays(
        np.float32, (2, 9), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
    ),
    temperature=st.floats(min_value=2.0**-1022, allow_infinity=False),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.floats(2.0**-1022, 1),
    seed=st.integers(0, 99),
)
@example(np.eye(2, 9, dtype=np.float32), 5e-324, None, 1.0, 0)
@example(np.eye(2, 9, dtype=np.float32), 1e-40, None, 1.0, 0)
@example(np.eye(2, 9, dtype=np.float32), 1.0, None, 1e-300, 0)
@example(np.eye(2, 9, dtype=np.float32), 1e308, None, 1.0, 0)
def test_every_temperature_and_top_p_draws_a_token_that_may_be_said(
    logits, temperature, top_k, top_p, seed
):
    given_logits = torch.from_numpy(logits)
    given_logits[:, 8] = -torch.inf  # an image that is not allowed yet
    best = given_logits == given_logits.amax(dim=-1, keepdim=True)
    odds = filtered_probabilities(given_logits, temperature, top_k, top_p)
    assert odds.isfinite().all()
    assert ((odds > 0) & best).any(dim=-1).all()
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    drawn = draw_tokens(given_logits, temperature, top_k, top_p, generators)
    for row, token in enumerate(drawn):
        assert odds[row, token] > 0
        assert token < 8
        better = int((given_logits[row] > given_logits[row, token]).sum())
        assert better < (top_k or 9)
        if temperature < 1e-60 or top_p < 1e-9:
            assert better == 0, "greedy"


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 1e308), ("temperature", float("nan")), ("image_bias", 1e300)],
)
def test_numbers_beyond_all_use_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        DecodingSettings(**{name: value})


def test_the_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(2)
    logits, said = torch.randn(2, 30), [[3, 3, 9], [4, 0, 7]]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(said), logits.clone())
    for row, ids in zip(logits, said):
        penalise_repetition(row, ids, 1.7)
    torch.testing.assert_close(logits, expected)


def test_a_stop_token_ends_its_row_only_and_is_not_part_of_the_answer(gill):
    prompts = prompts_of(gill, 3, 11)
    settings = DecodingSettings(max_tokens=8, max_images=0)
    free = decode(gill, Context(gill.language_model, 2), prompts, settings, stop_ids=())
    stop = next(i for i in free[0].token_ids if i not in free[1].token_ids)
    context = Context(gill.language_model, 2)
    stopped = decode(gill, context, prompts, settings, stop_ids=[stop])
    at = free[0].token_ids.index(stop)
    assert stopped[0].token_ids == free[0].token_ids[:at]
    assert (stopped[0].end, stopped[1].end) == ("stop", "max_tokens")
    assert stopped[1].token_ids == free[1].token_ids
    assert context.lengths == [3 + at, 11 + 8]


def scripted(monkeypatch, text: str, settings: DecodingSettings) -> list:
    """The pieces of an answer whose tokens are the bytes of `text`."""
    tokenizer = byte_tokenizer()
    config = OPTConfig(
        vocab_size=260, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=64, word_embed_proj_dim=8,
    )  # fmt: skip
    language_model = LanguageModel(OPTForCausalLM(config), tokenizer)
    gill = MultimodalLanguageModel(
        language_model, Heads(HeadSizes(d=6, e=8, r=R, L=4, D=5, m=8, p=4))
    )
    queue = [[token] for token in tokenizer(text)["input_ids"]]
    monkeypatch.setattr("pipeline.talking.decoding._choose", lambda *_: queue.pop(0))
    prompt = language_model.embed(torch.tensor([5, 6]))
    return list(stream(gill, Context(language_model), [prompt], settings))


def test_streamed_pieces_are_whole_characters(monkeypatch):
    # The last character is incomplete: three bytes, of which two are said.
    script = byte_tokenizer()("é€!é")["input_ids"][:-1]
    *texts, end = scripted(monkeypatch, "é€!é", DecodingSettings(max_tokens=len(script)))
    assert [piece.text for piece in texts] == ["é", "€", "!", "\ufffd"]
    assert [len(piece.token_ids) for piece in texts] == [2, 3, 1, 1]
    assert [token for piece in texts for token in piece.token_ids] == script
    assert end == EndPiece(0, "max_tokens")


@pytest.mark.parametrize(
    ("stop", "expected", "end"),
    [
        (("zz",), "one, two, three", "max_tokens"),
        ((", th",), "one, two", "stop"),
        (("two", "e"), "on", "stop"),
        (("one",), "", "stop"),
        (("three!",), "one, two, three", "max_tokens"),  # it may have come, and did not
    ],
)
def test_a_stop_text_ends_the_answer_before_it_and_no_letter_of_it_is_shown(
    monkeypatch, stop, expected, end
):
    settings = DecodingSettings(max_tokens=15, stop=stop)
    *texts, last = scripted(monkeypatch, "one, two, three", settings)
    assert "".join(piece.text for piece in texts) == expected
    told = [token for piece in texts for token in piece.token_ids]
    assert byte_tokenizer().decode(told) == expected
    assert last == EndPiece(0, end)


def test_presence_and_frequency_are_taken_off_what_was_said():
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    logits = torch.arange(5.0)
    penalise_presence(logits, [3, 3, 1], presence=0.5, frequency=0.25)
    assert logits.tolist() == [0, 1 - 0.75, 2, 3 - 1.0, 4]


def test_penalties_are_each_row_s_own(gill):
    prompts = prompts_of(gill, 9, 9)[:1] * 2
    plain, heavy = (
        DecodingSettings(max_tokens=12, max_images=0, frequency_penalty=penalty)
        for penalty in (0.0, 100.0)
    )
    [free, never_twice] = decode(gill, Context(gill.language_model, 2), prompts, [plain, heavy])
    assert len(set(free.token_ids)) < 12
    assert len(set(never_twice.token_ids)) == len(never_twice.token_ids) > 6


def test_the_last_position_ends_an_answer_and_a_longer_prompt_is_refused(gill):
    [prompt] = prompts_of(gill, 90)
    settings = DecodingSettings(max_tokens=50, max_images=9, image_bias=1e4)
    context = Context(gill.language_model)
    [answer] = decode(gill, context, [prompt], settings, stop_ids=())
    assert answer.end == "max_positions"
    assert len(answer.token_ids) == 6
    assert len(answer.images) == 2
    with pytest.raises(ValueError, match="pass the language model's limit of 96"):
        decode(gill, context, [prompt[:1]], settings)


def test_impossible_requests_are_refused(gill):
    [prompt] = prompts_of(gill, 3)
    context = Context(gill.language_model)
    with pytest.raises(ValueError, match="row 0: the prompt is empty"):
        decode(gill, context, [prompt[:0]], DecodingSettings())
    with pytest.raises(ValueError, match="one seed per row: 1 rows, 0 seeds"):
        decode(gill, context, [prompt], DecodingSettings(temperature=1.0))
    with pytest.raises(ValueError, match="2 prompts for a context of 1 rows"):
        decode(gill, context, [prompt, prompt], DecodingSettings())
    with pytest.raises(ValueError, match="image_bias"):
        DecodingSettings(image_bias=float("inf"))


def test_the_released_factors_multiply_a_magnitude():
    logit = torch.tensor([-2.0, 3.0])
    assert released_image_logit(1.0, 1.0)(logit).tolist() == [-2.0, 3.0]
    assert released_image_logit(1.5, 1.0)(logit).tolist() == [3.0, 4.5]
    assert released_image_logit(1.5, 2.0)(logit).tolist() == [6.0, 9.0]
