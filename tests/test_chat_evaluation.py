"""The table `chat`: choice, words kept, what a picture does to the words after it, follow-ups."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from corpora.chat_requests import own_questions, phrasings, read_part
from evaluation import chat_answers, follow_ups
from evaluation.chat_answers import ANSWER_TOKENS, ChatAnswers
from evaluation.chat_turns import (
    _after_picture,
    asked_set,
    held_out_questions,
    held_out_turns,
    measure_turns,
)
from evaluation.follow_ups import measure_follow_ups
from evaluation.sets import EvaluationSet, Example, Picture
from evaluation.store import EvaluationStore
from miniature.drawing import render
from miniature.language import EVERYTHING, caption
from miniature.world import ATTRIBUTES, SCENES_OF
from pipeline.settings import GenerationSettings
from settings.evaluation import EvaluationParams
from settings.params import ParamsError, parse_params
from settings.replies import RepliesParams
from tests.chat_templates import chat_language_model, tokenizer_of
from tests.tiny_gill import tiny_gill

SECTION = EvaluationParams(chat_turns=4)
HELD_OUT = own_questions("held_out")


@pytest.fixture(scope="module")
def gill():
    return tiny_gill(chat_language_model("smollm2"))


@pytest.fixture
def never_draws(gill, monkeypatch):
    rows = gill.heads.image_embeddings
    monkeypatch.setattr(rows, "data", torch.zeros_like(rows))


@pytest.fixture
def store(tmp_path):
    return EvaluationStore({m: tmp_path / m for m in ("generator", "gill")})


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Five test scenes with complete captions and their pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes, examples = SCENES_OF["test"][:5], []
    for number, (scene, pixels) in enumerate(zip(scenes, render(scenes, 0), strict=True)):
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        words = caption(scene, random.Random(number), EVERYTHING)
        examples.append(Example(f"row {number}", (words,), words, str(path), scene))
    return EvaluationSet("captions", "One caption", examples, 50)


def values(results):
    return {(row.set, row.metric): (row.value, row.examples, row.of) for row in results}


def template_ids(*texts):
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return tokenizer_of("smollm2").apply_chat_template(
        said, tokenize=True, add_generation_prompt=True
    )["input_ids"]


def test_requests_and_questions_are_those_that_training_never_saw(bare):
    turns = held_out_turns(asked_set(bare), HELD_OUT, SECTION)
    assert [e.prompt for e in turns.requests] == [e.prompt for e in bare.examples[:2]]
    for example, way in zip(turns.requests, phrasings("held_out").asked, strict=False):
        assert example.context == (way.replace("{caption}", example.prompt.removesuffix(".")),)
    held_out = {one[-1].text for one in own_questions("held_out")}
    asked = [text for _, [line] in turns.questions for text in line.parts]
    assert len(set(asked)) == 2
    assert set(asked) <= held_out
    assert not set(asked) & {one[-1].text for one in own_questions("train")}
    assert held_out_turns(asked_set(bare), HELD_OUT, SECTION) == turns
    assert len(held_out_turns(asked_set(bare), HELD_OUT, EvaluationParams()).questions) == 100


@pytest.mark.usefixtures("never_draws")
def test_a_model_that_never_draws_keeps_all_words(gill, store, bare, monkeypatch):
    turns = held_out_turns(asked_set(bare), HELD_OUT, SECTION)
    results, records = measure_turns(ChatAnswers(gill, store), turns, SECTION)
    found = values(results)
    assert found["turns", "right_choice"] == (0.5, 4, 2 + len(own_questions("held_out")))
    assert found["requests", "right_choice"][0] == 0
    assert found["questions", "right_choice"][0] == 1
    assert found["own_words", "words_kept"][0] == 1
    assert found["own_words_alone", "words_kept"][0] == 1
    by_id = {(r.set, r.id): r for r in records}
    model = gill.language_model.model
    for id_, [line] in turns.questions:
        [text] = line.parts
        ids = torch.tensor([template_ids(text)])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=ANSWER_TOKENS
        )[0, ids.shape[1] :]
        expected = tokenizer_of("smollm2").decode(said)
        assert by_id["questions", id_].texts["language_model"] == expected
        after = by_id["after_picture", id_]
        assert [list(part) for part in after.context] == [["picture"], *[["text"]] * 3]
        assert after.context[-1] == {"text": text}
    # Killed and run again, what was answered is not answered again.
    for name in ("decode", "own_words"):
        monkeypatch.setattr(chat_answers, name, lambda *_: pytest.fail("answered twice"))
    folders = store._folders
    again = measure_turns(ChatAnswers(gill, EvaluationStore(folders)), turns, SECTION)
    assert again == (results, records)


def test_a_model_that_draws_at_once_loses_words_but_not_with_pictures_off(
    gill, store, bare, monkeypatch
):
    answers = ChatAnswers(gill, store)
    turns = held_out_turns(asked_set(bare), HELD_OUT, SECTION)
    [_, talk] = turns.questions[0]
    context, [prompt] = answers._read([talk])
    context.note(0, prompt)
    context.read()
    loud = torch.zeros_like(gill.heads.image_embeddings)
    loud[0] = 100 * context.last_hidden[0]  # where this question is answered, a picture comes
    monkeypatch.setattr(gill.heads.image_embeddings, "data", loud)
    results, records = measure_turns(answers, turns, SECTION)
    first = next(r for r in records if r.set == "questions")
    assert first.prompt == talk[0].parts[0]
    assert first.scores == {
        "gill.right_choice": 0.0, "gill.words_kept": 0.0, "gill.words_kept_alone": 1.0
    }  # fmt: skip
    assert first.texts["gill"] == ""
    found = values(results)
    assert found["own_words_alone", "words_kept"][0] == 1
    choices = [r.scores["gill.right_choice"] for r in records if r.set != "after_picture"]
    assert found["turns", "right_choice"][0] == np.mean(choices)


def test_the_first_word_after_a_picture_is_compared_with_that_after_its_caption(gill, store, bare):
    answers = ChatAnswers(gill, store)
    turns = held_out_turns(asked_set(bare), HELD_OUT, SECTION)
    results, records = measure_turns(answers, turns, SECTION)
    nats = []
    for record in (r for r in records if r.set == "after_picture"):
        picture, way, words, text = (next(iter(part.values())) for part in record.context)
        told = template_ids(f"{words} {way}", words, text)
        logits = gill.language_model.model(torch.tensor([told])).logits[0, -1]
        p = logits[: gill.language_model.num_rows].double().softmax(-1)
        example = next(e for e in turns.requests if e.real == picture)
        assert example.prompt == words
        [talk] = [t for t in _after_picture(turns, with_picture=True) if t[-1].parts == (text,)]
        q = answers.next_words([talk])[0].double()
        nats.append(float((p * (p.log() - q)).sum()))
        assert record.scores["gill.first_word_kl"] == pytest.approx(nats[-1], rel=1e-5)
    assert min(nats) > 0
    assert values(results)["after_picture", "first_word_kl"][0] == pytest.approx(np.mean(nats))


def test_follow_ups_change_one_attribute_and_are_judged_by_it(gill, store, bare, monkeypatch):
    asked = asked_set(bare)
    said = follow_ups.follow_ups(asked, 0)
    assert [one.attribute for one in said] == list(ATTRIBUTES)
    for one, example in zip(said, bare.examples, strict=True):
        changed = [
            name for name in ATTRIBUTES if getattr(one.scene, name) != getattr(example.scene, name)
        ]
        assert changed == [one.attribute]
        assert getattr(one.scene, one.attribute) in one.text

    def drawn(one, method):
        assert method == "generator"
        assert one.examples[1].prompt == f"{bare.examples[1].prompt} {said[1].text}"
        # What is asked for at first: nothing has changed.
        return [Path(example.real) for example in bare.examples]

    few = GenerationSettings(steps=1)
    results, records = measure_follow_ups(gill, asked, SECTION, few, store, drawn)
    found = {(row.method, row.metric): row.value for row in results}
    assert found["generator", "changed_attribute"] == 0
    assert found["generator", "others_kept"] == 1
    assert 0 <= found["gill", "changed_attribute"] <= 1
    assert len(records) == 5
    assert [list(part) for part in records[0].context] == [["text"], ["answer"], ["text"]]
    assert records[0].context[1]["answer"] != records[0].pictures["gill"]
    monkeypatch.setattr(follow_ups, "reply_together", lambda _: pytest.fail("drawn twice"))
    again = EvaluationStore(store._folders)
    assert measure_follow_ups(gill, asked, SECTION, few, again, drawn) == (results, records)


def test_a_follow_up_that_is_drawn_right_has_all(bare):
    said = follow_ups.follow_ups(asked_set(bare), 0)
    pixels = render([one.scene for one in said], 0)
    paths = [Path(e.real).with_name(f"changed-{n}.png") for n, e in enumerate(bare.examples)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path)
    scores = follow_ups._scores(said, paths)
    assert scores == {"changed_attribute": [1.0] * 5, "others_kept": [1.0] * 5}


def test_without_the_truth_there_are_no_follow_ups(bare):
    unknown = replace(bare, examples=[replace(e, scene=None) for e in bare.examples])
    nothing = SimpleNamespace()
    found = measure_follow_ups(nothing, unknown, SECTION, nothing, nothing, nothing)
    assert found == ([], [])


def test_a_users_own_questions_are_asked_where_some_are_held_out(tmp_path, bare, capsys):
    file = tmp_path / "talks.jsonl"
    talks = [
        [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", f"why {n}?")]
        for n in range(40)
    ]
    lines = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    file.write_text("\n".join(map(json.dumps, lines)))
    replies = RepliesParams(questions=str(file), held_out=0.5)
    held_out = held_out_questions(replies)
    assert 8 < len(held_out) < 32
    assert not set(held_out) & set(read_part(file, "train", 0.5))
    turns = held_out_turns(asked_set(bare), held_out, SECTION)
    [(_, talk), _] = turns.questions
    assert [line.role for line in talk] == ["system", "user", "assistant", "user"]
    [about, _] = _after_picture(turns, with_picture=True)
    assert about[:3] == talk[:3]
    assert [type(part) for part in about[3].parts] == [Picture, str]
    assert about[-1] == talk[-1]
    assert turns.of == len(held_out)
    assert held_out_questions(RepliesParams()) == HELD_OUT
    capsys.readouterr()
    assert held_out_questions(replies.model_copy(update={"held_out": 0.0})) == HELD_OUT
    assert "no question of" in capsys.readouterr().out


def test_the_table_is_of_chat_models_alone():
    assert "chat" not in parse_params({}, Path("p.yaml")).evaluation_tables
    assert "chat" in parse_params({"model": {"turns": "chat"}}, Path("p.yaml")).evaluation_tables
    own = {"captions": {"table": "a.tsv"}, "model": {"turns": "chat"}}
    assert parse_params(own, Path("p.yaml")).evaluation_tables[-2:] == ("chat", "latency")
    with pytest.raises(ParamsError, match=r"evaluation\.tables: chat is of a chat model"):
        parse_params({"evaluation": {"tables": ["chat"]}}, Path("p.yaml"))
