"""Conversations on the shipped tiny backbones with untrained heads, against uncached reading."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gill_errors import GillError
from pipeline.talking.answers import (
    ConversationError,
    Ended,
    GeneratedImage,
    PictureProgress,
    Reply,
    ReplySettings,
    RetrievedImage,
    Started,
    Text,
)
from pipeline.talking.batch import reply_together, stream_together
from pipeline.talking.context import Context
from pipeline.talking.conversation import Conversation
from pipeline.talking.decision import DecisionModel
from pipeline.talking.decoding import DecodingSettings, decode
from pipeline.talking.likelihood import log_likelihoods
from pipeline.talking.prefixes import Prefixes
from pipeline.talking.speaker import Speaker
from tests.tiny_gill import COLORS, FEW, K, R, tiny_gill


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return tiny_gill()


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def words(max_tokens: int, **others) -> ReplySettings:
    return ReplySettings(want="text", decoding=DecodingSettings(max_tokens=max_tokens, **others))


def said(speaker: Speaker, text: str) -> torch.Tensor:
    """Vectors of an answer: it begins with its own space."""
    model = speaker.language_model
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return model.embed(torch.tensor(ids, dtype=torch.int64))


def answer_alone(speaker: Speaker, read: list[torch.Tensor], max_tokens: int) -> str:
    """The slow way: a new context that reads everything."""
    context = Context(speaker.language_model)
    vectors = torch.cat([speaker.start(), *read])
    settings = DecodingSettings(max_tokens=max_tokens, max_images=0)
    return decode(speaker.model, context, [vectors], settings)[0].text


def generated(reply: Reply) -> GeneratedImage:
    [image] = reply.images
    assert isinstance(image, GeneratedImage)
    return image


# --- one conversation ------------------------------------------------------------------------


def test_turns_are_read_once_and_remembered(speaker, picture):
    conversation, history = Conversation(speaker), []
    turns = (["in the sea", "a red ring."], [picture, "it moves to the desert."], ["it"])
    for number, turn in enumerate(turns):
        reply = conversation.reply(turn, words(6))
        own = [vectors for _, vectors in speaker.embed(turn, after_text=number > 0)]
        history += own
        assert reply.text == answer_alone(speaker, history, 6)
        history.append(said(speaker, reply.text))
        start = len(speaker.start()) if number == 0 else 0
        assert reply.prompt_tokens == sum(map(len, own)) + start
    assert conversation.num_turns == 3
    assert conversation.num_positions == sum(map(len, history))


def test_of_an_answer_the_words_are_remembered_and_the_pictures_are_not(speaker):
    forced = DecodingSettings(max_tokens=5, min_tokens_before_image=2, max_images=1)
    conversation = Conversation(speaker)
    settings = ReplySettings(want="generate", decoding=forced)
    reply = conversation.reply(["in the sea a red ring"], settings)
    assert [type(piece) for piece in reply] == [Text, GeneratedImage, Text]
    follow = conversation.reply([" it turns"], words(6))
    history = [vectors for _, vectors in speaker.embed(["in the sea a red ring"])]
    history += [said(speaker, reply.text), said(speaker, " it turns")]
    assert follow.text == answer_alone(speaker, history, 6)
    assert conversation.num_positions == sum(map(len, history)) + len(said(speaker, follow.text))


def test_the_oldest_turns_are_forgotten_whole_and_the_rest_is_read_again_once(speaker):
    conversation = Conversation(speaker)
    limit = speaker.language_model.max_positions - len(speaker.start())
    exchanges: list[torch.Tensor] = []
    went = []
    for i in range(24):
        turn = (
            f"it turns {COLORS[i % 3]} and moves to the sea. a big ring is in the {COLORS[i % 2]}"
        )
        [(_, own)] = speaker.embed([turn], after_text=i > 0)
        reply = conversation.reply([turn], words(8))
        if reply.forgotten_turns:
            went.append(i)
            # Whole turns go, until at most half of what turn and answer leave is taken ...
            half = (limit - len(own) - 8) // 2
            lengths = [len(x) for x in exchanges]
            assert sum(lengths) + len(own) + 8 > limit
            kept = exchanges[reply.forgotten_turns :]
            assert (
                sum(map(len, kept))
                <= half
                < sum(map(len, kept)) + lengths[reply.forgotten_turns - 1]
            )
            # ... and it is as if they had never been.
            assert reply.prompt_tokens == len(speaker.start()) + sum(map(len, kept)) + len(own)
            assert reply.text == answer_alone(speaker, [*kept, own], 8)
            exchanges = kept
        else:
            assert reply.prompt_tokens == len(own) + len(speaker.start()) * (i == 0)
        exchanges.append(torch.cat([own, said(speaker, reply.text)]))
        assert conversation.num_turns == len(exchanges)
    assert len(went) >= 2


def test_streamed_events_come_in_order_with_the_picture_s_steps(speaker):
    settings = ReplySettings(
        want="generate",
        decoding=DecodingSettings(max_tokens=4, min_tokens_before_image=1, max_images=2),
    )
    events = list(Conversation(speaker).stream(["a red ring"], settings))
    kinds = [type(event) for event in events]
    assert kinds[0] is Started
    assert kinds[-1] is Ended
    steps = [event for event in events if isinstance(event, PictureProgress)]
    # Both pictures share a batch.
    assert steps == [PictureProgress(s, 3) for s in (1, 1, 2, 2, 3, 3)]
    order = [kind for kind in kinds[1:-1] if kind is not PictureProgress]
    assert order == [Text, GeneratedImage, GeneratedImage, Text]
    assert events[-1] == Ended("max_tokens", 1 + R + R + 1)
    first, second = (e for e in events if isinstance(e, GeneratedImage))
    assert (first.seed, second.seed) == (0, 1)


def test_texts_are_set_off_by_one_space_and_pictures_by_none(speaker, picture):
    turn = ["a red", "ring", picture, "it", "\nturns"]
    tokens = speaker.language_model.tokenizer
    for after_text, expected in ((False, "a red ring"), (True, " a red ring")):
        [(first, _), (none, vectors), (last, _)] = speaker.embed(turn, after_text=after_text)
        assert first.tolist() == tokens(expected, add_special_tokens=False)["input_ids"]
        assert last.tolist() == tokens("it\nturns", add_special_tokens=False)["input_ids"]
        assert none is None
        assert len(vectors) == K


def test_a_broken_off_turn_was_never_said(speaker):
    conversation = Conversation(speaker)
    before = conversation.reply(["in the sea a red ring."], words(6))
    answering = conversation.stream(["it turns blue."], words(6))
    next(answering), next(answering)
    with pytest.raises(ConversationError, match="still answering"):
        conversation.reply(["and"], words(6))
    answering.close()
    after = conversation.reply(["it moves to the"], words(6))
    undisturbed = Conversation(speaker)
    assert undisturbed.reply(["in the sea a red ring."], words(6)) == before
    assert undisturbed.reply(["it moves to the"], words(6)) == after


def test_closing_a_stream_stops_the_picture_at_its_next_step(speaker):
    many = FEW.model_copy(update={"steps": 200})
    settings = ReplySettings(want="generate", generation=many)
    of_other_tests = set(threading.enumerate())
    answering = Conversation(speaker).stream(["a red ring."], settings)
    seen = next(event for event in answering if isinstance(event, PictureProgress))
    answering.close()
    assert seen.step < 20
    left = set(threading.enumerate()) - of_other_tests
    assert not [t for t in left if t.name.startswith("pictures")]


# --- batches ---------------------------------------------------------------------------------


def test_a_batch_of_conversations_of_any_age_and_settings_answers_as_each_alone(speaker, picture):
    asked = [
        (["in the sea a red ring."], ["it turns blue."], words(7)),
        ([picture, "what is it?"], [" and"], ReplySettings(want="generate", seed=5)),
        ([], ["a big green cross"], words(9, temperature=1.0)),
        (["a ring"], ["on the left."], ReplySettings(want="retrieve")),
        ([], ["white"], ReplySettings(
            want="generate", seed=2, candidates=3, negative_prompt="a red ring",
            decoding=DecodingSettings(max_tokens=3, temperature=0.8, min_tokens_before_image=2),
        )),
    ]  # fmt: skip
    alone, together = [], []
    for replies in (alone, together):
        turns = []
        for first, second, settings in asked:
            conversation = Conversation(speaker)
            if first:
                conversation.reply(first, words(3))
            turns.append(conversation.prepare(second, settings))
        if replies is alone:
            replies += [reply_together([turn])[0] for turn in turns]
        else:
            replies += reply_together(turns)
        # What each remembers is its own, and it goes on from there.
        replies += [turn.conversation.reply(["it"], words(5)) for turn in turns]
    for one, other in zip(alone, together, strict=True):
        assert [type(piece) for piece in one] == [type(piece) for piece in other]
        assert (one.text, one.end, one.answer_tokens) == (
            other.text, other.end, other.answer_tokens)  # fmt: skip
        for mine, theirs in zip(one.images, other.images):
            left, right = (torch.tensor(list(x.picture.tobytes())) for x in (mine, theirs))
            assert (left - right).abs().max() <= 2
            assert getattr(mine, "seed", None) == getattr(theirs, "seed", None)
            assert getattr(mine, "row", None) == getattr(theirs, "row", None)


def test_a_cancelled_row_ends_and_the_others_do_not_notice(speaker):
    left = threading.Event()
    leaving, staying = Conversation(speaker), Conversation(speaker)
    one_by_one = FEW.model_copy(update={"batch_size": 1})
    settings = ReplySettings(want="generate", generation=one_by_one)
    turns = [
        staying.prepare(["a red ring"], settings),
        leaving.prepare(["a red ring"], settings, cancelled=left.is_set),
    ]
    replies = [Reply(), Reply()]
    for index, event in stream_together(turns):
        replies[index].add(event)
        if isinstance(event, PictureProgress):
            assert index == 0
            left.set()
    assert [reply.end for reply in replies] == ["max_images", "cancelled"]
    assert [len(reply.images) for reply in replies] == [1, 0]
    [gone] = reply_together([leaving.prepare(["and"], words(5), cancelled=left.is_set)])
    assert (list(gone), gone.end) == ([], "cancelled")
    assert (staying.num_turns, leaving.num_turns) == (1, 0)


def test_a_batch_refuses_what_cannot_run_together(speaker):
    conversation = Conversation(speaker)
    turn = conversation.prepare(["a"], words(2))
    with pytest.raises(ConversationError, match="two turns"):
        reply_together([turn, conversation.prepare(["b"], words(2))])
    stranger = Conversation(dataclasses.replace(speaker))
    with pytest.raises(ConversationError, match="share one speaker"):
        reply_together([turn, stranger.prepare(["b"], words(2))])
    assert reply_together([]) == []


# --- pictures --------------------------------------------------------------------------------


def test_generated_pictures_follow_seed_and_knobs(speaker):
    def make(**changes) -> GeneratedImage:
        settings = ReplySettings(want="generate", **changes)
        return generated(Conversation(speaker).reply(["a red ring."], settings))

    one = make(seed=3)
    assert (one.seed, one.steps, one.guidance, one.score) == (3, 3, 2.5, None)
    assert one.picture.tobytes() == make(seed=3).picture.tobytes()
    others = [
        make(seed=4),
        make(seed=3, negative_prompt="a red ring."),
        make(seed=3, generation=FEW.model_copy(update={"guidance": 6.0})),
        make(seed=3, generation=FEW.model_copy(update={"steps": 4})),
        make(seed=3, generation=FEW.model_copy(update={"scheduler": "euler"})),
    ]
    assert len({o.picture.tobytes() for o in (one, *others)}) == 6
    assert others[1].negative_prompt == "a red ring."


def test_of_several_candidates_the_closest_to_the_query_is_shown(speaker):
    conversation = Conversation(speaker)
    settings = ReplySettings(want="generate", seed=10, candidates=6)
    chosen = generated(conversation.reply(["a red ring."], settings))
    assert conversation.num_generated == 6
    gill, scores = speaker.model, []
    [(ids, _)] = speaker.embed(["a red ring."])
    hidden = gill.image_hidden([[torch.tensor(gill.language_model.start_ids), ids]])
    for seed in range(10, 16):
        single = ReplySettings(want="generate", seed=seed)
        made = generated(Conversation(speaker).reply(["a red ring."], single))
        key = gill.image_key(speaker.encoder.encode_pictures([made.picture]))
        scores.append(float((key @ gill.text_query(hidden).T).detach()))
    assert chosen.seed == 10 + max(range(6), key=scores.__getitem__)
    assert chosen.score == pytest.approx(max(scores), abs=2e-3)


def test_retrieved_pictures_are_the_nearest_not_shown_yet_until_all_were(speaker):
    conversation, settings = Conversation(speaker), ReplySettings(want="retrieve")
    gill = speaker.model
    [(ids, _)] = speaker.embed(["a red ring."])
    hidden = gill.image_hidden([[torch.tensor(gill.language_model.start_ids), ids]])
    hits = speaker.index.search(gill.text_query(hidden).detach(), 5)[0]
    [first] = conversation.reply(["a red ring."], settings).images
    assert isinstance(first, RetrievedImage)
    assert (first.row, first.caption) == (hits[0].row, hits[0].caption)
    assert first.score == pytest.approx(hits[0].score, abs=1e-5)
    assert first.picture.getpixel((0, 0)) == Image.new("RGB", (1, 1), first.caption).getpixel(
        (0, 0)
    )
    for _ in range(4):
        conversation.reply(["and"], settings)
    assert sorted(conversation.shown) == [0, 1, 2, 3, 4]
    with pytest.raises(ConversationError, match="all 5 candidate pictures were shown"):
        conversation.reply(["and"], settings)


@pytest.mark.parametrize(("logit", "kind"), [(9.0, GeneratedImage), (-9.0, RetrievedImage)])
def test_auto_follows_the_decision_model(speaker, logit, kind):
    e = speaker.language_model.width
    model = DecisionModel(
        torch.zeros(2, e), torch.tensor([logit, 0.0]), torch.zeros(e), torch.ones(e),
        use_similarity=False,
    )  # fmt: skip
    certain = DecodingSettings(image_bias=1e4, max_tokens=1)
    decided = dataclasses.replace(speaker, decision=model)
    [image] = Conversation(decided).reply(["a"], ReplySettings(decoding=certain)).images
    assert type(image) is kind
    assert image.generate_probability == pytest.approx(torch.sigmoid(torch.tensor(logit)).item())


def test_what_cannot_be_had_is_refused_before_anything_is_read(speaker, picture):
    bare = dataclasses.replace(speaker, index=None, generator=None, conditioner=None)
    for change, text in [
        ({"want": "retrieve"}, "no candidate index"),
        ({"want": "generate"}, "no image generator"),
        ({"want": "auto"}, "want text"),
        ({"want": "text", "negative_prompt": "x"}, "negative prompt"),
    ]:
        with pytest.raises(ConversationError, match=text):
            Conversation(bare).prepare(["a"], ReplySettings(**change))
    conversation = Conversation(speaker)
    for turn, text in [
        ([], "turn is empty"),
        ([""], "turn is empty"),
        (["ring " * 300], "shorten the turn"),
        ([picture] * 200, "shorten the turn"),
    ]:
        with pytest.raises(ConversationError, match=text):
            conversation.prepare(turn)
    none = ReplySettings(want="generate", decoding=DecodingSettings(max_images=0))
    with pytest.raises(ConversationError, match="max_images is 0"):
        conversation.prepare(["a"], none)
    assert conversation.num_turns == 0


# --- stopping --------------------------------------------------------------------------------


def test_answers_stop_at_a_line_break_and_after_their_last_picture(speaker):
    prompt = ["Q: what is this? A: a ring\nQ: what color is it? A:"]
    free = Conversation(speaker).reply(prompt, words(20))
    assert "\n" in free.text.strip()
    stopped = Conversation(speaker).reply(prompt, words(20, stop_at_newline=True))
    assert stopped.text == free.text.split("\n")[0]
    assert stopped.end == "stop"
    default = ReplySettings(want="generate")
    reply = Conversation(speaker).reply(["a red ring."], default)
    assert [type(piece) for piece in reply] == [GeneratedImage]
    assert (reply.end, reply.answer_tokens) == ("max_images", R)


# --- likelihood ------------------------------------------------------------------------------


def test_of_a_stop_text_nothing_is_remembered(speaker):
    settings = words(max_tokens=12)
    whole = Conversation(speaker).reply(["in the sea"], settings).text
    at = len(whole) // 2
    stopped, told = Conversation(speaker), Conversation(speaker)
    reply = stopped.reply(["in the sea"], words(max_tokens=12, stop=(whole[at : at + 5],)))
    assert (reply.text, reply.end) == (whole[: whole.index(whole[at : at + 5])], "stop")
    assert stopped.num_positions == stopped._context.lengths[0] - len(speaker.start())
    told.reply([f"in the sea{reply.text}"], words(max_tokens=1))
    assert stopped.num_positions <= told.num_positions


def test_what_was_said_elsewhere_is_recalled_as_if_it_had_been_said_here(speaker, picture):
    exchanges = [["in the sea", picture, "a red ring.", " it is small"], ["it turns", " blue"]]
    recalled = Conversation(speaker)
    for exchange in exchanges:
        recalled.recall(exchange)
    whole = [part for exchange in exchanges for part in exchange]
    reply = recalled.reply(["it"], words(6))
    assert reply.text == Conversation(speaker).reply([*whole, "it"], words(6)).text
    assert recalled.num_turns == 3


def test_of_a_growing_history_the_same_beginning_is_recalled_for_many_turns(speaker):
    history, beginnings, whole = [], [], speaker.language_model.max_positions
    for i in range(40):
        history.append([f"it turns {COLORS[i % 3]} and moves to the sea number {i}."])
        conversation = Conversation(speaker)
        for exchange in history:
            conversation.recall(exchange)
        assert conversation.num_positions <= whole * 3 // 4
        assert conversation.num_turns + conversation.num_forgotten == len(history)
        beginnings.append(conversation.num_forgotten)
        assert conversation.reply(["it"], words(4)).end in ("max_tokens", "stop")
    assert beginnings == sorted(beginnings)
    assert beginnings[-1] > 20
    assert len(set(beginnings)) <= 8, "it goes in large pieces, not turn by turn"


def test_known_prefixes_are_not_read_again_and_change_no_answer(speaker, picture):
    prefixes, history = Prefixes(10**9), []
    last = 0
    for number in range(5):
        known, anew = Conversation(speaker, prefixes), Conversation(speaker)
        turn = [picture, "in the sea"] if number == 0 else [f"and then {number}"]
        for exchange in history:
            known.recall(exchange)
            anew.recall(exchange)
        [(_, started), *events] = list(stream_together([known.prepare(turn, words(8))]))
        reply = anew.reply(turn, words(8))
        assert "".join(e.text for _, e in events if isinstance(e, Text)) == reply.text
        assert started.prompt_tokens == reply.prompt_tokens
        if number:
            # All but this turn, and the words of the last answer, of which the last was not read.
            unread = started.prompt_tokens - started.cached_tokens
            assert started.cached_tokens >= last - 8
            assert 0 < unread <= started.prompt_tokens - last + 8
        last = started.prompt_tokens + 8
        history.append([*turn, reply.text])


def test_prefixes_are_forgotten_where_they_take_too_much_memory(speaker):
    contexts = []
    for text in ("in the sea", "a red ring", "a red ring turns blue"):
        inputs = torch.cat([speaker.start(), *(vectors for _, vectors in speaker.embed([text]))])
        context = Context(speaker.language_model)
        context.note(0, inputs)
        context.read()
        contexts.append((inputs, context))
    (sea, one), (ring, two), (longer, three) = contexts
    prefixes = Prefixes(one.num_bytes + three.num_bytes)
    for inputs, context in contexts:
        prefixes.keep(inputs, context)
    assert prefixes.longest(sea).num_read == len(sea)
    assert prefixes.longest(ring).num_read == len(ring), "the longer one has read it"
    prefixes.longest(sea)
    prefixes.keep(torch.zeros_like(ring), two)  # no room: what was not used for longest goes
    assert prefixes.longest(longer) is None or prefixes.longest(longer).num_read == 1
    assert prefixes.longest(sea).num_read == len(sea)


def test_a_turn_is_a_text_a_picture_or_a_list_of_them(speaker, picture, tmp_path):
    assert (
        speaker.reply("a red ring", max_tokens=3, want="text").text
        == speaker.reply(["a red ring"], max_tokens=3, want="text").text
    )
    assert speaker.reply(picture, want="text").prompt_tokens == K + len(speaker.start())
    seen = speaker.encoder.encode_pictures([picture])[0]
    assert (
        Conversation(speaker).reply([seen, "a"], words(4)).text
        == Conversation(speaker).reply([picture, "a"], words(4)).text
    )
    picture.save(tmp_path / "photo.png")
    closed = Image.open(tmp_path / "photo.png")
    closed.close()
    for shown in ([closed], closed, ["a red ring"], [Image.new("RGB", (0, 4))]):
        with pytest.raises(ConversationError):
            speaker.caption(shown)
    assert len(speaker.retrieve("a red ring", 10**6)) == len(COLORS)
    for turn, hint in [
        (Path("photo.png"), "turn is a PosixPath.*PIL.Image.open"),
        ([Path("photo.png")], "part 1 of the turn is a PosixPath"),
        (np.zeros((4, 4, 3), np.uint8), "ndarray.*fromarray"),
        (["a", np.zeros(3)], "part 2 of the turn is a ndarray"),
        ({"a": 1}, "a dict"),
        (b"a red ring", "a bytes"),
        (None, "NoneType"),
        ([Image.new("RGB", (0, 0))], "picture of 0 x 0 pixels"),
        ([closed], "a picture that cannot be read: Operation on closed image"),
    ]:
        for ask in (speaker.reply, speaker.retrieve):
            with pytest.raises(ConversationError, match=hint):
                ask(turn)


def test_log_likelihoods_are_those_of_one_uncached_pass(speaker, picture):
    given = ["Q: what color", picture, "is it? A:"]
    sequences = [["red"], ["blue", picture, "it is green"], ["no it is in the desert"]] * 2
    found = log_likelihoods(speaker, sequences, given, batch_size=4)
    model = speaker.language_model
    before = torch.cat([speaker.start(), *(v for _, v in speaker.embed(given))])
    for sequence, one in zip(sequences, found):
        parts = speaker.embed(sequence, after_text=True)
        inputs = torch.cat([before, *(v for _, v in parts)])
        logits = model.model(inputs_embeds=inputs[None]).logits[0, :, : model.num_rows]
        odds, total, count, at = logits.log_softmax(-1), 0.0, 0, len(before)
        for ids, vectors in parts:
            for offset, token in enumerate([] if ids is None else ids.tolist()):
                total += float(odds[at + offset - 1, token])
                count += 1
            at += len(vectors)
        assert one.num_tokens == count
        assert one.total == pytest.approx(total, abs=1e-3)
        assert one.mean == pytest.approx(total / count, abs=1e-3)


def test_impossible_likelihoods_are_refused(speaker, picture):
    with pytest.raises(ConversationError, match="sequence 1 has no word"):
        log_likelihoods(speaker, [[picture]])
    with pytest.raises(ConversationError, match="sequence 2 takes"):
        log_likelihoods(speaker, [["a"], ["ring " * 300]])
    [plain] = log_likelihoods(speaker, [["a red ring"]])
    assert plain.num_tokens == len(speaker.embed(["a red ring"])[0][1])


def test_arguments_that_cannot_be_meant_are_refused_by_name(speaker):
    picture = Image.new("RGB", (8, 8))
    refused = [
        (lambda: speaker.retrieve("a red ring", n="3"), "n is '3'"),
        (lambda: speaker.retrieve("a red ring", n=float("nan")), "n is nan"),
        (lambda: speaker.retrieve("a red ring", n=True), "n is True"),
        (lambda: speaker.retrieve("a red ring", exclude=3), "exclude is 3"),
        (lambda: speaker.retrieve("a red ring", exclude=[2**70]), "exclude is"),
        (lambda: speaker.reply("a \ud800 ring"), "part 1 of the turn is not Unicode"),
        (lambda: speaker.reply("a ring", negative_prompt="\ud800"), "negative_prompt is not"),
        (lambda: speaker.reply("a ring", {"seed": 1}), "no ReplySettings"),
        (lambda: speaker.reply([torch.zeros(3, 2)]), r"vector is \[3, 2\]"),
        (lambda: speaker.caption(picture, max_tokens=0), "max_tokens is 0"),
        (lambda: speaker.log_likelihoods("a ring"), "sequences are 'a ring'"),
        (lambda: speaker.log_likelihoods([["a ring"]], given=3), "the turn is a int"),
    ]
    for call, message in refused:
        with pytest.raises(GillError, match=message):
            call()
    assert len(speaker.retrieve("a red ring", n=np.int64(2), exclude=(0,))) == 2
