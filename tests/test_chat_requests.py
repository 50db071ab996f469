"""What people say to a chat model: our own phrasings and questions, and a user's file."""

import json
import re
from pathlib import Path

import pytest

from corpora.chat_requests import (
    Said,
    asked_for,
    joined_with,
    own_questions,
    phrasings,
    read_part,
    read_questions,
)
from corpora.records import CorpusError


def test_there_are_enough_questions_and_none_is_held_out_that_is_trained():
    train, held_out = ([q[0].text for q in own_questions(p)] for p in ("train", "held_out"))
    assert len(set(train)) == len(train) >= 400
    assert len(set(held_out)) == len(held_out) >= 200
    assert not {t.lower() for t in train} & {t.lower() for t in held_out}
    # Words that requests are made of do not tell a question from a request.
    spoken = re.compile(r"\b(show|draw|paint|picture|photo|image|imagine|make|see|colou?r)", re.I)
    for questions in (train, held_out):
        assert sum(bool(spoken.search(text)) for text in questions) > len(questions) / 4


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_every_phrasing_has_its_places(part):
    own = phrasings(part)
    assert all(text.count("{caption}") == 1 for text in (*own.asked, *own.joined))
    assert all(text.count("{question}") == 1 for text in own.joined)
    assert not any("{" in text.replace("{caption}", "") for text in own.asked)
    other = phrasings("held_out" if part == "train" else "train")
    for kind in ("asked", "joined", "shown"):
        assert not set(getattr(own, kind)) & set(getattr(other, kind))


def test_the_bare_caption_is_a_phrasing():
    assert "{caption}." in phrasings("train").asked


def test_a_caption_is_asked_for_as_it_is_written():
    assert asked_for("Draw {caption}.", "a {ring} in the sea. ") == "Draw a {ring} in the sea."
    assert asked_for("{caption}", "no stop") == "no stop"


def test_a_question_and_a_request_are_one_turn():
    before = (Said("system", "s"), Said("user", "hello"), Said("assistant", "hi"))
    question = (*before, Said("user", "Why {caption}?"))
    joined = joined_with("{question} Then draw {caption}.", question, "a ring {question}.")
    assert joined == (*before, Said("user", "Why {caption}? Then draw a ring {question}."))


def test_a_file_of_messages_is_read(tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    talk = [("system", "Be brief."), ("user", "one"), ("assistant", "1"), ("user", "two")]
    lines = [
        {"messages": [{"role": r, "content": c} for r, c in talk]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_questions(file) == [
        tuple(Said(role, text) for role, text in talk),
        (Said("user", "x"),),
    ]


def test_a_share_of_a_file_is_held_out_whatever_else_it_has(tmp_path: Path):
    def written(numbers: range, name: str) -> Path:
        lines = [{"messages": [{"role": "user", "content": f"why {n}?"}]} for n in numbers]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
        return tmp_path / name

    few, many = written(range(100), "few.jsonl"), written(range(50, 1000), "many.jsonl")
    held_out = read_part(many, "held_out", 0.2)
    train = read_part(many, "train", 0.2)
    assert not set(held_out) & set(train)
    assert len(held_out) + len(train) == 950
    assert 150 < len(held_out) < 230
    common = {one for one in read_questions(few) if one in {*held_out, *train}}
    assert len(common) == 50
    assert set(read_part(few, "held_out", 0.2)) & common == set(held_out) & common
    # A larger share holds out the same and more.
    assert set(held_out) < set(read_part(many, "held_out", 0.3))
    assert read_part(many, "held_out", 0) == []
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"messages": [{"role": "user", "content": "why?"}]}))
    with pytest.raises(CorpusError, match="all of its 1 questions are held out"):
        read_part(alone, "train", 0.999999)


def test_a_question_may_hold_what_else_ends_lines(tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    one = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}]}
    file.write_text(json.dumps(one, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert read_questions(file) == [(Said("user", "a\u2028b\x85c"),)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no questions in it"),
        ("\n \n", "no questions in it"),
        ("{", "line 1: not JSON"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n[1]',
            "line 2: it has no list messages",
        ),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "line 1: a message is no text"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "line 1: a message is no text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: nobody asks anything"),
        ('{"messages": [{"role": "user", "content": " "}]}', "line 1: nobody asks anything"),
    ],
)
def test_a_file_without_questions_is_one_line(tmp_path: Path, text: str, message: str):
    file = tmp_path / "talks.jsonl"
    file.write_text(text)
    with pytest.raises(CorpusError, match=message) as error:
        read_questions(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(CorpusError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
