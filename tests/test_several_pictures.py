"""Answers of several pictures: what is read in their place, where they stand, how they end."""

import numpy as np
import pytest
import torch

from app.serving.job import Job
from app.serving.worker import Worker
from pipeline.talking.answers import (
    Ended,
    GeneratedImage,
    Reply,
    ReplySettings,
    RetrievedImage,
    Text,
)
from pipeline.talking.batch import reply_together
from pipeline.talking.context import Context
from pipeline.talking.conversation import Conversation
from pipeline.talking.decoding import DecodingSettings, decode
from pipeline.talking.sentences import ends_sentence, sentences_of
from tests.tiny_gill import K, R, tiny_gill

STANDING = {"nothing": 0, "picture": K, "image_tokens_and_picture": R + K}
TURN = "in the sea a red ring."


@pytest.fixture(scope="module")
def speaker():
    return tiny_gill()


def asked(want="generate", seed=0, **decoding):
    rest = {"words_between_images": True, "read_back": "nothing"} | decoding
    return ReplySettings(want=want, seed=seed, decoding=DecodingSettings(**rest))


def continued(speaker, read, max_tokens):
    """The slow way: a new context that reads everything."""
    settings = DecodingSettings(max_tokens=max_tokens, max_images=0)
    vectors = torch.cat([speaker.start(), *read])
    return decode(speaker.model, Context(speaker.language_model), [vectors], settings)[0].text


def stands(speaker, read_back, picture):
    parts = []
    if read_back == "image_tokens_and_picture":
        parts.append(speaker.heads.image_embeddings.detach())
    if read_back != "nothing":
        parts += [vectors for _, vectors in speaker.embed([picture])]
    return parts


@pytest.mark.parametrize("read_back", STANDING)
def test_an_answer_and_the_next_turn_go_on_from_what_stands_for_a_picture(speaker, read_back):
    conversation = Conversation(speaker)
    picture, text = conversation.reply([TURN], asked(max_tokens=7, read_back=read_back))
    history = [vectors for _, vectors in speaker.embed([TURN])]
    history += stands(speaker, read_back, picture.picture)
    assert text.text == continued(speaker, history, 6)
    model = speaker.language_model
    ids = model.tokenizer(text.text, add_special_tokens=False)["input_ids"]
    history.append(model.embed(torch.tensor(ids)))
    assert conversation.num_positions == sum(map(len, history))
    follow = conversation.reply([" it turns"], asked("text", max_tokens=5))
    history += [vectors for _, vectors in speaker.embed([" it turns"])]
    assert follow.text == continued(speaker, history, 5)


@pytest.mark.parametrize("read_back", STANDING)
def test_a_picture_that_ends_an_answer_is_remembered_as_any_other(speaker, read_back):
    conversation = Conversation(speaker)
    settings = asked(stop_after_images=True, read_back=read_back)
    [picture] = conversation.reply([TURN], settings)
    history = [vectors for _, vectors in speaker.embed([TURN])]
    history += stands(speaker, read_back, picture.picture)
    assert conversation.num_positions == sum(map(len, history))
    follow = conversation.reply(["it turns"], asked("text", max_tokens=5))
    after_text = read_back == "nothing"
    history += [vectors for _, vectors in speaker.embed(["it turns"], after_text=after_text)]
    assert follow.text == continued(speaker, history, 5)


def same(one: Reply, other: Reply) -> bool:
    return len(one) == len(other) and all(
        type(a) is type(b)
        and (
            a.text == b.text
            if isinstance(a, Text)
            # Sums of a batch round otherwise.
            else np.abs(np.asarray(a.picture, float) - np.asarray(b.picture, float)).max() <= 2
            and getattr(a, "seed", 0) == getattr(b, "seed", 0)
            and getattr(a, "row", 0) == getattr(b, "row", 0)
        )
        for a, b in zip(one, other)
    )


def test_a_batch_reads_back_as_each_alone(speaker):
    turns = [TURN, "there is a big blue square on the left.", "a cross. it turns green."]
    settings = [
        asked(max_tokens=14, max_images=2, read_back="picture", seed=3),
        asked("retrieve", max_tokens=22, max_images=3, read_back="image_tokens_and_picture"),
        asked(max_tokens=18, max_images=2, read_back="nothing", seed=9),
    ]
    alone = [Conversation(speaker).reply([t], s) for t, s in zip(turns, settings)]
    conversations = [Conversation(speaker) for _ in turns]
    together = reply_together(
        [c.prepare([t], s) for c, t, s in zip(conversations, turns, settings)]
    )
    assert all(map(same, alone, together))
    assert [len(reply.images) for reply in alone] == [2, 2, 2]
    # What they remember of it is what each alone remembers.
    follow = asked("text", max_tokens=4)
    for conversation, turn, one in zip(conversations, turns, settings):
        other = Conversation(speaker)
        other.reply([turn], one)
        assert conversation.reply("and it", follow) == other.reply("and it", follow)


@pytest.mark.parametrize("read_back", ["nothing", "picture"])
def test_every_picture_stands_behind_a_sentence_of_its_own(speaker, read_back):
    settings = asked(max_tokens=60, max_images=4, read_back=read_back, stop_after_images=True)
    reply = Conversation(speaker).reply([TURN], settings)
    assert reply.end == "max_images"
    kinds = [type(piece) for piece in reply]
    assert kinds == [GeneratedImage, *[Text, GeneratedImage] * 3]
    assert all(ends_sentence(piece.text) for piece in reply if isinstance(piece, Text))
    assert all(len(sentences_of(p.text)[0]) == 1 for p in reply if isinstance(p, Text))


def test_seeds_count_on_and_make_the_same_pictures_again(speaker):
    settings = asked(max_tokens=60, max_images=3, read_back="picture", seed=5)
    first, again = (Conversation(speaker).reply([TURN], settings) for _ in range(2))
    assert [image.seed for image in first.images] == [5, 6, 7]
    for one, other in zip(first.images, again.images):
        assert one.picture.tobytes() == other.picture.tobytes()
    # What was shown decides what comes next: with words alone it is another picture.
    words = Conversation(speaker).reply([TURN], asked(max_tokens=60, max_images=3, seed=5))
    assert words.images[0].picture.tobytes() == first.images[0].picture.tobytes()
    assert words.images[1].picture.tobytes() != first.images[1].picture.tobytes()


def test_no_candidate_is_shown_twice_in_one_answer(speaker):
    settings = asked("retrieve", max_tokens=200, max_images=9, read_back="picture")
    reply = Conversation(speaker).reply([TURN], settings)
    rows = [image.row for image in reply.images if isinstance(image, RetrievedImage)]
    assert len(rows) == len(set(rows)) >= 3


def test_an_answer_in_mid_sentence_goes_on_to_its_end_within_its_limit(speaker):
    def words(**limits):
        return Conversation(speaker).reply(["in the sea"], asked("text", **limits))

    whole = words(max_tokens=40, max_sentences=1)
    tokens = whole.answer_tokens
    assert whole.end == "max_sentences"
    assert ends_sentence(whole.text)
    cut = words(max_tokens=2)
    assert (cut.end, cut.answer_tokens) == ("max_tokens", 2)
    assert not ends_sentence(cut.text)
    finished = words(max_tokens=2, finish_sentence=40)
    assert (finished.text, finished.end) == (whole.text, "max_tokens")
    assert words(max_tokens=2, finish_sentence=1).answer_tokens == 3 < tokens


def test_sentences_are_counted_and_the_last_one_may_have_its_picture(speaker):
    one = asked("text", max_tokens=80, max_sentences=3)
    reply = Conversation(speaker).reply([TURN], one)
    assert len(sentences_of(reply.text)[0]) == 3
    two = asked(max_tokens=80, max_sentences=2, max_images=9)
    reply = Conversation(speaker).reply([TURN], two)
    assert [type(p) for p in reply] == [GeneratedImage, *[Text, GeneratedImage] * 2]
    assert reply.end == "max_sentences"


def test_the_service_s_worker_goes_on_behind_pictures_that_are_read_back(speaker):
    settings = asked(max_tokens=30, max_images=3, read_back="picture")
    expected = [Conversation(speaker).reply([turn], settings) for turn in (TURN, "a cross.")]
    worker = Worker()
    heard = [Reply(), Reply()]
    import threading

    done = [threading.Event(), threading.Event()]

    def listener(number):
        def hear(event):
            heard[number].add(event)
            if isinstance(event, Ended):
                done[number].set()

        return hear

    try:
        for number, turn in enumerate((TURN, "a cross.")):
            conversation = Conversation(speaker)
            worker.submit(Job(conversation, lambda turn=turn: [turn], settings, listener(number)))
        assert all(one.wait(60) for one in done)
    finally:
        worker.close()
    assert all(map(same, heard, expected))


def test_positions_are_dropped_from_one_row_and_the_others_stay(speaker):
    embed = speaker.language_model.embed
    ids = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([11, 12])]
    context = Context(speaker.language_model, 2)
    for row, one in enumerate(ids):
        context.note(row, embed(one[: 3 - row]))
    context.read()
    before = context.last_hidden[0].clone()
    context.note(0, embed(ids[0][3:]))
    context.note(1, embed(torch.tensor([13])))
    context.read()
    context.drop(0, 2, before)
    assert context.lengths == [3, 3]
    for row, told in ((0, [5, 6, 7, 20]), (1, [11, 12, 13, 21])):
        context.note(row, embed(torch.tensor(told[-1:])))
    hidden = context.read()[:, -1]
    for row, told in ((0, [5, 6, 7, 20]), (1, [11, 12, 13, 21])):
        alone = Context(speaker.language_model)
        alone.note(0, embed(torch.tensor(told)))
        torch.testing.assert_close(hidden[row], alone.read()[0, -1], atol=1e-5, rtol=1e-5)


def test_reading_back_needs_the_pictures(speaker):
    settings = DecodingSettings(read_back="picture")
    with pytest.raises(ValueError, match="read_back: to read pictures back takes `shown`"):
        decode(speaker.model, Context(speaker.language_model), [speaker.start()], settings)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("it rained. we went out .", [["it rained.", "we went out ."]]),
        ('he said "stop!" and went. ok?', [['he said "stop!"', "and went.", "ok?"]]),
        ("Dr. Lee met J. Smith at 3.5 miles. End", [["Dr. Lee met J. Smith at 3.5 miles.", "End"]]),
        ("one.\ntwo.\n\n three", [["one.", "two."], ["three"]]),
        ("what ?! yes...", [["what ?!", "yes..."]]),
        (" \n\n ", []),
    ],
)
def test_sentences_of_a_text(text, sentences):
    assert sentences_of(text) == sentences
