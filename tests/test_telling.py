"""Stories with pictures: where they stand, what their page holds, and how they are judged."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.story import passages_of, read_story, to_story_page
from evaluation.report.told import told_stories
from evaluation.results import Record
from evaluation.told_stories import Place, told_scores
from gill_errors import InputError
from miniature.drawing import render
from miniature.language import told_values
from miniature.world import Scene
from pipeline.talking.answers import (
    ConversationError,
    Ended,
    GeneratedImage,
    ImageTokens,
    Reply,
    RetrievedImage,
    Text,
)
from pipeline.talking.context import Context
from pipeline.talking.decoding import next_logits
from pipeline.talking.telling import (
    TellingSettings,
    evenly_spread,
    image_preferences,
    picture_places,
    tell,
)
from stages import gill_cli
from tests.tiny_gill import tiny_gill

STORY = "in the sea a red ring. it turns blue.\n\nit becomes big. it moves to the left. the end."
EVEN = TellingSettings(pictures=3, places="even")


@pytest.fixture(scope="module")
def gill():
    return tiny_gill()


def told(gill, text=STORY, settings=EVEN, **knobs) -> Reply:
    reply = Reply()
    for event in tell(gill, text, settings, gill.settings(**{"want": "generate"} | knobs)):
        reply.add(event)
    return reply


# --- telling ----------------------------------------------------------------------------------


def test_pictures_stand_behind_their_sentences_and_no_word_is_lost(gill):
    reply = told(gill, seed=7)
    assert [p.text if isinstance(p, Text) else "picture" for p in reply] == [
        "in the sea a red ring. it turns blue.",
        "picture",
        "\n\nit becomes big.",
        "picture",
        " it moves to the left. the end.",
        "picture",
    ]
    assert [image.seed for image in reply.images] == [7, 8, 9]
    again = told(gill, seed=7)
    for one, other in zip(reply.images, again.images, strict=True):
        assert one.picture.tobytes() == other.picture.tobytes()
    assert reply.end == "stop"


@pytest.mark.parametrize("read_back", ["nothing", "picture", "image_tokens_and_picture"])
def test_each_picture_is_made_from_all_that_was_told_and_shown_before_it(gill, read_back):
    reply = told(gill, read_back=read_back, seed=3)
    turn = ["in the sea a red ring. it turns blue."]
    for number, image in enumerate(reply.images):
        if number:
            turn += [ImageTokens()] * read_back.startswith("image_tokens")
            turn += [reply.images[number - 1].picture] * read_back.endswith("picture")
            turn.append(("", "it becomes big.", "it moves to the left. the end.")[number])
        settings = gill.settings(want="generate", seed=3 + number)
        alone = gill.conversation().reply(turn, settings).images[0].picture
        difference = np.asarray(alone, float) - np.asarray(image.picture, float)
        assert np.abs(difference).max() <= 2


def test_a_story_repeats_no_retrieved_picture(gill):
    settings = TellingSettings(pictures=5, places="even")
    reply = told(gill, settings=settings, want="retrieve")
    assert all(isinstance(image, RetrievedImage) for image in reply.images)
    assert sorted(image.row for image in reply.images) == [0, 1, 2, 3, 4]


def test_places_are_the_model_s_or_even(gill, monkeypatch):
    def says(*preferences):
        values = [torch.tensor([9.0, one]) for one in preferences]
        monkeypatch.setattr("pipeline.talking.telling.image_preferences", lambda *of: values)

    says(1.0, -1.0, 1.0, 1.0, 1.0)
    sentences = list("abcde")
    assert picture_places(gill, sentences, TellingSettings(pictures=9)) == [0, 2, 3, 4]
    assert picture_places(gill, sentences, TellingSettings(pictures=2)) == [2, 4]
    assert picture_places(gill, sentences, EVEN) == [1, 2, 4]
    says(-1.0, -1.0)
    assert picture_places(gill, ["a", "b"], TellingSettings(pictures=2)) == []


def test_evenly_spread_places():
    assert evenly_spread(range(5), 3) == [1, 2, 4]
    assert evenly_spread(range(12), 4) == [2, 5, 8, 11]
    assert evenly_spread([3, 8], 4) == [3, 8]
    assert evenly_spread([], 4) == []
    for number in range(1, 9):
        places = evenly_spread(range(8), number)
        assert len(set(places)) == number
        assert places[-1] == 7


def test_preferences_are_those_of_one_uncached_pass(gill):
    sentences = ["in the sea a red ring.", "it turns blue.", "it becomes big."]
    parts = [gill.start(), gill.embed([" ".join(sentences)])[0][1]]
    context = Context(gill.language_model)
    context.note(0, torch.cat(parts))
    logits = next_logits(gill.model, context.read()[0])[len(parts[0]) :]
    expected = logits[:, -1] - logits[:, :-1].max(dim=1).values
    torch.testing.assert_close(
        torch.cat(image_preferences(gill, sentences)), expected, atol=1e-4, rtol=1e-4
    )


def test_a_text_beyond_the_model_s_positions_is_read_on_with_its_last_sentences(gill):
    sentences = [f"it turns {color}." for color in ("red", "blue", "green", "white")] * 40
    preferences = image_preferences(gill, sentences)
    assert len(preferences) == 160
    reply = told(gill, " ".join(sentences), TellingSettings(pictures=2, places="even"))
    assert len(reply.images) == 2
    assert reply.text.split() == " ".join(sentences).split()
    with pytest.raises(ConversationError, match=r"sentence 2 takes \d+ positions"):
        told(gill, "a ring. " + "ring " * 300)


def test_the_model_goes_on_and_pictures_come_between_its_sentences(gill):
    settings = TellingSettings(pictures=3, added_sentences=3, places="even")
    reply = told(gill, "in the sea a red ring.", settings)
    assert reply.text.startswith("in the sea a red ring. ")
    kinds = [type(piece) for piece in reply]
    assert kinds[:5] == [Text, GeneratedImage, Text, GeneratedImage, Text]
    assert len(reply.images) == 3
    assert all(p.text.strip().endswith(".") for p in reply if isinstance(p, Text))
    assert [image.seed for image in reply.images] == [0, 1, 2]


def test_a_story_that_is_left_ends(gill):
    events = tell(gill, STORY, EVEN, gill.settings(want="generate"))
    next(event for event in events if not isinstance(event, Text))
    events.close()
    assert not isinstance(next(events, None), Ended)


@pytest.mark.parametrize(
    ("text", "knobs", "message"),
    [("", {}, "no words"), (" \n\n ", {}, "no words"), ("a.", {"want": "text"}, "has pictures")],
)
def test_what_is_no_story_is_refused(gill, text, knobs, message):
    with pytest.raises(ConversationError, match=message):
        told(gill, text, **knobs)


# --- the page and the command -----------------------------------------------------------------


def pieces():
    picture = Image.new("RGB", (64, 64), "red")
    return [
        Text('a <b>ring</b> & "sea".\n\nit turns.'),
        GeneratedImage(picture, 4, 8, 2.5),
        Text(" and then."),
        RetrievedImage(picture, 3, 0.5, "/home/x/y.png", "a <i>ring</i>"),
        Text("the end"),
    ]


def test_a_page_needs_nothing_else_and_escapes_what_it_shows():
    passages = passages_of(pieces())
    assert [one.paragraphs for one in passages] == [
        ['a <b>ring</b> & "sea".', "it turns."], ["and then."], ["the end"]]  # fmt: skip
    page = to_story_page(pieces(), "<Title>")
    addresses = re.findall(r"""(?:src|href|srcset|url)\s*[=(]\s*["']?([^"')\s]{0,30})""", page)
    assert len(addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;Title&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "/home/x" not in page, "where a candidate lies is nobody's business"
    assert page.index("it turns.</p>") < page.index("data:image") < page.index("and then.</p>")


@pytest.fixture
def run(gill, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gill_cli, "_load", lambda artifacts: gill)

    def invoke(*arguments: str, code: int = 0, typed: bytes | None = None) -> str:
        result = CliRunner().invoke(gill_cli.app, ["tell", *arguments], input=typed)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result.output

    return invoke


def test_tell_writes_a_page_and_prints_the_story(run):
    Path("s.txt").write_text(STORY, encoding="utf-8")
    choices = ("--places", "even", "--pictures", "2", "--want", "generate", "--steps", "1")
    output = run("s.txt", *choices)
    assert output.startswith("in the sea a red ring. it turns blue. [picture 1]\n\nit becomes big.")
    assert output.endswith("2 pictures: story.html\n")
    page = Path("story.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2
    described = json.loads(run("-", *choices, "--json", "--seed", "5", typed=STORY.encode()))
    assert described["page"] == "story-2.html"
    kinds = [one["kind"] for one in described["story"]]
    assert kinds == ["text", "generated", "text", "generated"]
    assert [one["seed"] for one in described["story"] if "seed" in one] == [5, 6]
    run("in the sea a ring", *choices, "--out", "x.html")
    assert Path("x.html").is_file()


def test_one_sentence_is_a_beginning_and_several_are_a_story(run):
    choices = ("--want", "generate", "--places", "even", "--steps", "1", "--json")
    beginning = json.loads(run("in the sea a red ring.", *choices, "--pictures", "2"))["story"]
    assert len(beginning) > 3, "the model went on"
    story = json.loads(run("a red ring. it turns.", *choices, "--pictures", "2"))["story"]
    assert [one.get("text", "") for one in story] == ["a red ring.", "", "it turns.", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the story has no words"),
        (["none.txt"], "none.txt cannot be read: No such file or directory"),
        (["empty.txt"], "empty.txt is empty"),
        (["bytes.txt"], "bytes.txt is no UTF-8 text: .* at byte 1"),
        (["long.txt"], "long.txt has more than 1000000 bytes"),
        (["a ring.", "--out", "there.html"], "there.html exists: choose another name"),
        (["a ring.", "--out", "page.pdf"], "page.pdf: name a file that ends in .html"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(run, monkeypatch, arguments, message):
    monkeypatch.setattr(gill_cli, "_load", lambda artifacts: pytest.fail("loaded"))
    Path("empty.txt").write_text(" \n")
    Path("bytes.txt").write_bytes(b"a\xff\xfe")
    Path("long.txt").write_text("a" * 1_000_001)
    Path("there.html").touch()
    said = run(*arguments, code=1)
    assert re.search(message, said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", ["0", "65"])
def test_numbers_of_pictures_have_bounds(run, number):
    result = CliRunner().invoke(gill_cli.app, ["tell", "a ring.", "--pictures", number])
    assert result.exit_code == 2
    assert "--pictures" in result.output


def test_words_and_files_are_read_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("part.md").write_text("it turns.", encoding="utf-8")
    assert read_story(["a ring.", "part.md"]) == "a ring.\n\nit turns."
    with pytest.raises(InputError, match="cannot be read"):
        read_story(["missing.md"])


# --- judging ----------------------------------------------------------------------------------

MOMENTS = [
    Scene("sea", "red", "ring", "small", "left"),
    Scene("sea", "blue", "ring", "small", "left"),
    Scene("sea", "blue", "ring", "small", "right"),
]
WORDS = ["a red ring.", "it turns blue.", "it moves to the right."]


def places():
    return [
        Place(
            "s", n, (WORDS[n],), " ".join(WORDS[: n + 1]), "", MOMENTS[n],
            (*MOMENTS[:n], *MOMENTS[n + 1 :]),
        )
        for n in range(3)
    ]  # fmt: skip


def drawn(folder, scenes):
    paths = []
    for number, pixels in enumerate(render(scenes, 3)):
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_pictures_of_the_told_scenes_have_all_points(tmp_path):
    scores = told_scores(places(), drawn(tmp_path, MOMENTS))
    assert scores == {
        "stated_attributes": [1, 1, 1],
        "right_sentence": [1, 1, 1],
        # Behind the second sentence place, size and side are not stated, behind the third no more
        # than place and size.
        "kept_attributes": [1, 1],
    }


def test_pictures_at_the_wrong_sentence_are_found_out(tmp_path):
    shifted = [MOMENTS[1], MOMENTS[0], MOMENTS[1]]
    scores = told_scores(places(), drawn(tmp_path, shifted))
    assert scores["stated_attributes"] == [0.5, 0.5, 2 / 3]
    assert scores["right_sentence"] == [0, 0, 0]
    other = [MOMENTS[0], MOMENTS[1]._replace(place="night", side="middle"), MOMENTS[2]]
    scores = told_scores(places(), drawn(tmp_path, other))
    assert scores["right_sentence"] == [1, 1, 1], "what is not stated is not judged by it"
    assert scores["kept_attributes"] == [1 / 3, 1 / 2]


def test_told_values_are_the_last_ones_said():
    assert told_values("in the sea a red ring. it turns blue. it moves to the desert.") == {
        "place": "desert", "color": "blue", "shape": "ring"}  # fmt: skip


def test_the_report_shows_stories_in_all_ways_in_their_order():
    records = [
        Record(set_, f"7:{n}", f"words {n}", (), pictures={"gill": f"{set_}{n}.png"})
        for set_ in ("told_pictures", "told")
        for n in (1, 0)
    ]
    [story] = told_stories(records, 3)
    assert [way.name for way in story] == ["words read back", "own pictures read back"]
    assert story[0].pictures == [("words 0", "told0.png"), ("words 1", "told1.png")]
