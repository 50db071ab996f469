"""Tokens read in memory of one size, as on a GPU from a captured graph: what eager reading says."""

import copy

import pytest
import torch
from test_decoding import R, prompts_of, tiny_gill, uncached_greedy, want_image

from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.talking import token_pass
from pipeline.talking.context import Context
from pipeline.talking.decoding import Answer, DecodingSettings, ImagePiece, decode, stream
from pipeline.talking.key_memory import BLOCK, KeyMemory
from pipeline.talking.token_pass import TokenPass
from tests.tiny_language_models import CONFIGURATIONS, TABLE_ROWS


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[TokenPass]:
    """Which pass read each token, on the CPU as on a GPU, with room for few keys."""
    read, passes = TokenPass.read, []

    def counted(self, *args):
        passes.append(self)
        return read(self, *args)

    monkeypatch.setattr(token_pass, "DEVICES", ("cpu",))
    monkeypatch.setattr(token_pass, "BLOCK", 8)
    monkeypatch.setattr(TokenPass, "read", counted)
    return passes


def same(ours: list[Answer], theirs: list[Answer]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_ids, one.end) == (other.token_ids, other.end)
        for image, expected in zip(one.images, other.images, strict=True):
            torch.testing.assert_close(image.hidden, expected.hidden)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ragged_answers_with_images_are_those_of_whole_sequences(name, played):
    gill = tiny_gill(name)
    prompts = prompts_of(gill, 3, 11, 1, 6)
    want_image(gill, prompts[0])
    settings = DecodingSettings(max_tokens=9, max_images=9)
    context = Context(gill.language_model, 4)
    answers = decode(gill, context, prompts, settings, stop_ids=())
    expected = [uncached_greedy(gill, prompt, 9, images=True) for prompt in prompts]
    assert [answer.token_ids for answer in answers] == expected
    assert played
    assert {one.capacity % 8 for one in played} == {0}


def test_greedy_is_the_models_own_generation_and_the_memory_grows(played):
    gill = tiny_gill("opt")
    [prompt] = prompts_of(gill, 7)
    own = gill.language_model.model.generate(
        inputs_embeds=prompt[None],
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        bad_words_ids=[[i] for i in range(gill.language_model.num_rows, TABLE_ROWS)],
    )
    settings = DecodingSettings(max_tokens=20, max_images=0)
    [answer] = decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
    assert answer.token_ids == own[0].tolist()
    # The last token is chosen and not read. Keys 8, 16 and 24 find no place in what there was.
    assert [one.capacity for one in played] == [8, *[16] * 8, *[24] * 8, *[32] * 2]


@pytest.mark.parametrize("read_back", ["image_tokens", "nothing"])
def test_turns_joining_splitting_and_forgetting_go_on_from_it(monkeypatch, played, read_back):
    gill = tiny_gill("opt")
    settings = DecodingSettings(
        max_tokens=7, max_images=2, min_tokens_before_image=2, image_bias=1e4, read_back=read_back
    )
    turns = [prompts_of(gill, 4, 9), prompts_of(gill, 6, 2), prompts_of(gill, 1, 3)]

    def talk() -> tuple[list[Answer], list[int]]:
        rows, answers = [Context(gill.language_model) for _ in range(2)], []
        for turn in turns:
            context = Context.join(rows)
            answers += decode(gill, context, turn, settings, stop_ids=())
            rows = context.split()
            rows[0].rewind(rows[0].lengths[0] - 1)
        answers += decode(gill, rows[0].beginning(5), [turns[0][0]], settings, stop_ids=())
        return answers, [row.num_bytes for row in rows]

    ours = talk()
    assert len(played) > 9
    monkeypatch.setattr(token_pass, "DEVICES", ())
    del played[:]
    theirs = talk()
    assert not played
    same(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert sum(len(answer.images) for answer in ours[0]) > 4


def test_an_answer_uses_the_memory_of_the_last_and_two_at_once_have_two(played):
    gill = tiny_gill("opt")
    prompts = prompts_of(gill, 3, 2)
    settings = DecodingSettings(max_tokens=4, max_images=0)

    def pieces(prompt):
        return stream(gill, Context(gill.language_model), [prompt], settings, stop_ids=())

    for prompt in prompts:
        list(pieces(prompt))
    assert len(set(map(id, played))) == 1
    alone = [[str(piece) for piece in pieces(prompt)] for prompt in prompts]
    del played[:]
    mixed = [[], []]
    for both in zip(*(pieces(prompt) for prompt in prompts), strict=True):
        for said, piece in zip(mixed, both, strict=True):
            said.append(str(piece))
    assert mixed == alone
    assert len(set(map(id, played))) == 2


def test_an_answer_that_is_given_up_leaves_its_context_whole(played):
    gill = tiny_gill("opt")
    [prompt] = prompts_of(gill, 3)
    settings = DecodingSettings(max_tokens=6, max_images=0)
    [whole] = decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
    context = Context(gill.language_model)
    pieces = stream(gill, context, [prompt], settings, stop_ids=())
    said = [next(pieces).token_ids[0] for _ in range(3)]
    pieces.close()
    rest = settings.model_copy(update={"max_tokens": 3})
    [more] = decode(gill, context, [prompt[:0]], rest, stop_ids=())
    assert [*said, *more.token_ids] == whole.token_ids


def test_a_model_that_cannot_be_captured_or_differs_is_read_eagerly(monkeypatch, played):
    [prompt] = prompts_of(tiny_gill("opt"), 3)
    settings = DecodingSettings(max_tokens=4, max_images=0)

    def refused(work, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    def wrong(work, device):
        return lambda: work() + 1

    answers = []
    for captured, reason in ((refused, "not permitted"), (wrong, "differs by")):
        monkeypatch.setattr(token_pass, "captured", captured)
        gill = tiny_gill("opt")
        with pytest.warns(UserWarning, match=f"without a graph: .*{reason}"):
            answers += decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
        # Asked once.
        answers += decode(gill, Context(gill.language_model), [prompt], settings, stop_ids=())
    assert not played
    assert len({tuple(answer.token_ids) for answer in answers}) == 1


def test_what_a_graph_knows_by_address_stays_there(monkeypatch, played):
    graphs = []

    def captured(work, device):
        result = work()

        def play():
            # A graph writes to the tensor that the capture gave.
            graphs.append(result.copy_(work()))
            return result

        return play

    monkeypatch.setattr(token_pass, "captured", captured)
    gill: MultimodalLanguageModel = tiny_gill("opt")
    prompts = prompts_of(gill, 3, 5)
    settings = DecodingSettings(max_tokens=5, max_images=1, min_tokens_before_image=2,
                                image_bias=1e4)  # fmt: skip
    context = Context(gill.language_model, 2)
    ours = decode(gill, context, prompts, settings, stop_ids=())
    assert graphs
    assert len(graphs) == len(played) + 2, "each of two was proved first"
    monkeypatch.setattr(token_pass, "DEVICES", ())
    theirs = decode(gill, Context(gill.language_model, 2), prompts, settings, stop_ids=())
    same(ours, theirs)
    assert all(isinstance(answer.pieces[1], ImagePiece) for answer in ours)
    assert ours[0].images[0].hidden.shape == (R, 32)


# --- keys and values in memory taken ahead -------------------------------------------------------


def test_keys_are_written_behind_one_another_and_memory_grows_by_blocks():
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, n, 4, generator=random) for n in (5, 1, 1, BLOCK, 2)]
    layer, addresses = KeyMemory(), []
    for part in parts:
        keys, values = layer.update(part, -part)
        addresses.append(keys.data_ptr())
    assert torch.equal(keys, torch.cat(parts, 2))
    assert torch.equal(values, -keys)
    assert layer.get_seq_length() == 9 + BLOCK
    # The first read takes what it needs; then one block holds until the next.
    assert addresses[0] != addresses[1] == addresses[2] != addresses[3] == addresses[4]
    layer.crop(-4 - BLOCK)
    keys, _ = layer.update(parts[1], parts[1])
    assert torch.equal(keys, torch.cat([parts[0], parts[1]], 2))


def test_memory_is_its_own_and_can_be_written_to_whatever_mode_made_it():
    first, twin = KeyMemory(), KeyMemory()
    states = torch.ones(1, 1, 2, 3)
    with torch.inference_mode():
        keys, values = first.update(states, states)
    twin.update(keys[:, :, :1], values[:, :, :1])
    twin.update(2 * states, 2 * states)
    first.update(3 * states, 3 * states)
    assert first.keys[0, 0, :, 0].tolist() == [1, 1, 3, 3]
    assert twin.keys[0, 0, :, 0].tolist() == [1, 2, 2]
    assert states.unique().tolist() == [1]
    assert copy.deepcopy(first).keys.shape == first.keys.shape
