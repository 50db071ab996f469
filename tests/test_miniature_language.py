"""What is said about scenes, and what a text establishes."""

import itertools
import random
import re

import pytest

from corpora import prompts
from miniature.language import (
    CHANGEABLE,
    EVERYTHING,
    SUMMARY_ORDER,
    Round,
    caption,
    dialogue,
    dialogue_prompt,
    event,
    noun_phrase,
    opening_request,
    picture_caption,
    picture_words,
    question_prompt,
    request,
    stated,
    story,
    story_prompt,
    summary,
    words,
)
from miniature.texts import (
    document,
    first_document,
    illustrated_document,
    read,
)
from miniature.vocabulary import language_model_tokenizer
from miniature.world import ATTRIBUTES, SCENES, SPLIT_OF, VALUES, Scene, draw_scene

SCENE = Scene("desert", "red", "ring", "small", "left")


def test_a_complete_caption_names_place_and_side_before_the_object():
    said = {caption(SCENE, random.Random(seed), EVERYTHING) for seed in range(100)}
    assert said == {
        "in the desert on the left a small red ring.",
        "on the left in the desert a small red ring.",
        "in the desert on the left there is a small red ring.",
        "on the left in the desert there is a small red ring.",
    }


def test_an_event_tells_the_new_value():
    rng = random.Random(0)
    said = {event(SCENE, name, "it", rng) for name in CHANGEABLE for _ in range(20)}
    assert said == {
        "it goes to the desert.",
        "it moves to the desert.",
        "it turns red.",
        "it becomes red.",
        "it becomes small.",
        "it moves to the left.",
    }
    with pytest.raises(ValueError, match="shape"):
        event(SCENE, "shape", "it", rng)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_story_changes_one_attribute_at_a_time_and_says_which(split):
    rng = random.Random(1)
    for _ in range(30):
        moments = story(rng, split, num_changing=2)
        assert len(moments) == 5
        changed = [
            [name for name in ATTRIBUTES if getattr(a.scene, name) != getattr(b.scene, name)]
            for a, b in itertools.pairwise(moments)
        ]
        assert all(len(names) == 1 for names in changed)
        assert len({names[0] for names in changed}) == 2
        assert all(a != b for a, b in itertools.pairwise(changed))
        for (name,), moment in zip(changed, moments[1:]):
            assert getattr(moment.scene, name) in moment.caption
        assert SPLIT_OF[moments[-1].scene] == split
        if split == "train":
            assert {SPLIT_OF[moment.scene] for moment in moments} == {"train"}


def test_the_last_mention_in_a_story_is_what_its_last_picture_shows():
    rng = random.Random(2)
    for _ in range(50):
        moments = story(rng, "test", num_changing=4)
        text = story_prompt([moment.caption for moment in moments])
        spoken = text.replace(".", "").split()
        for name in stated(text):
            last = [word for word in spoken if word in VALUES[name]][-1]
            assert last == getattr(moments[-1].scene, name)


def test_ten_rounds_of_dialogue_establish_every_attribute_and_no_falsehood():
    rng = random.Random(3)
    for _ in range(50):
        scene = draw_scene(rng)
        rounds = dialogue(scene, rng)
        assert len(rounds) == 10
        assert stated(dialogue_prompt(rounds)) == set(ATTRIBUTES)
        for question, answer in rounds:
            named = set(answer.split()) & {v for values in VALUES.values() for v in values}
            assert named <= set(scene)
            if answer == "yes":
                assert set(question.removesuffix("?").split()) & set(scene)


def test_prompts_are_written_exactly_so():
    rounds = [Round("what color is it?", "red"), Round("is it big?", "no it is small")]
    expected = "Q: what color is it? A: red\nQ: is it big? A: no it is small"
    assert dialogue_prompt(rounds) == expected
    assert question_prompt("a ring.", "is it big?") == "a ring.\nQ: is it big? A:"
    assert question_prompt("", "is it big?") == "Q: is it big? A:"
    assert story_prompt(["a ring.", "it turns red."]) == "a ring. it turns red."
    # The same as what evaluation makes of the files.
    assert prompts.dialogue_prompt([tuple(each) for each in rounds]) == expected
    assert prompts.story_prompt(["a ring.", "it turns red."]) == "a ring. it turns red."


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a ring.", {"shape"}),
        ("in the sea a small ring. it turns red.", {"place", "size", "shape", "color"}),
        ("Q: is it red? A: yes", {"color"}),
        ("Q: is it red? A: no it is blue\nQ: is it a ring? A: yes", {"color", "shape"}),
        ("Q: which side is it on? A: in the middle", {"side"}),
        ("a cross.{ red sea}it becomes big.", {"shape", "color", "place", "size"}),
        ("Q: is it red?", {"color"}),  # not a whole round: words are words
        ("", set()),
    ],
)
def test_stated_finds_what_a_text_establishes(text, names):
    assert stated(text) == names


def test_summaries_leave_blanks_where_asked():
    assert summary(SCENE, ("color", "shape"), ("shape",)) == " picture: color red shape."
    assert summary(SCENE, SUMMARY_ORDER, SUMMARY_ORDER) == (
        " picture: shape color size side place."
    )


def test_a_pictures_words_are_all_its_values_in_some_order():
    said = {picture_words(SCENE, random.Random(seed)) for seed in range(200)}
    assert len(said) > 60
    for text in said:
        assert text.startswith("{ ")
        assert text.endswith("}")
        assert sorted(text[2:-1].split(" ")) == sorted(SCENE)


def test_a_text_with_pictures_is_read_as_gill_reads_one():
    tokenizer = language_model_tokenizer()
    ids, of_picture = read(tokenizer, "a ring.{ red sea}it turns blue.")
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["</s>", "a", "Ġring", ".", "Ġred", "Ġsea", "it", "Ġturns", "Ġblue", "."]
    )
    assert of_picture == [False] * 4 + [True] * 2 + [False] * 4
    # As in captioning (Eq. 1), where the picture stands before the start.
    ids, of_picture = read(tokenizer, "{ red sea}</s>a ring.")
    assert tokenizer.convert_ids_to_tokens(ids) == ["Ġred", "Ġsea", "</s>", "a", "Ġring", "."]
    assert of_picture == [True] * 2 + [False] * 4
    rng = random.Random(6)
    for text in (document(rng) for _ in range(50)):
        assert read(tokenizer, text).ids == tokenizer(text)["input_ids"]


def test_illustrated_texts_show_before_captions_between_them_and_before_questions():
    rng = random.Random(7)
    texts = [illustrated_document(rng) for _ in range(400)]
    assert 0.4 < sum("{" in text for text in texts) / len(texts) < 0.75
    for beginning in ("}</s>", "}Q: ", "}\nQ: "):
        assert any(beginning in text for text in texts)
    for text in texts:
        # The words of a picture before a summary are never contradicted by it.
        body, _, told = text.rpartition(" picture: ")
        spoken = re.sub(r"[^a-z ]", " ", re.sub(r"is it [a-z ]*\?", "", body)).split()
        values = dict(itertools.pairwise(told.strip(".").split()))
        for name in (name for name in ATTRIBUTES if values.get(name) in VALUES[name]):
            assert [word for word in spoken if word in VALUES[name]][-1:] in ([values[name]], [])


def test_every_word_ever_said_is_in_the_list_of_words():
    rng = random.Random(4)
    texts = [document(rng) for _ in range(300)] + [first_document(rng) for _ in range(50)]
    texts += [illustrated_document(rng) for _ in range(300)]
    for scene in SCENES[::10]:
        texts += [picture_caption(scene, rng), opening_request(scene, rng)]
        texts += [request(scene, name, rng) for name in CHANGEABLE]
        texts.append(noun_phrase(scene, rng, "the", 1, 1))
    said = {word for text in texts for word in re.split(r"[ \n{}]|</s>", text)}
    assert {word.strip(".:?") for word in said} - {""} <= set(words())


def test_no_training_text_shows_a_held_out_scene():
    rng = random.Random(5)
    texts = [document(rng) for _ in range(2000)] + [illustrated_document(rng) for _ in range(2000)]
    complete = [text for text in texts if " picture: " in text]
    summaries = [text.split(" picture: ")[1].strip(".").split() for text in complete]
    seen = set()
    for parts in summaries:
        values = {name: v for name, v in itertools.pairwise(parts) if name in VALUES}
        if all(values.get(name) in VALUES[name] for name in ATTRIBUTES):
            seen.add(Scene(**values))
    assert len(seen) > 50
    pictures = [shown.split() for text in texts for shown in re.findall("{(.*?)}", text)]
    name_of = {value: name for name, values in VALUES.items() for value in values}
    shown = {Scene(**{name_of[word]: word for word in words}) for words in pictures}
    assert len(shown) > 300
    assert {SPLIT_OF[scene] for scene in seen | shown} == {"train"}
