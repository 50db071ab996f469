"""What each table is generated from, on small sources, and what is kept between runs."""

from types import SimpleNamespace

import pytest
from PIL import Image

from corpora.prompts import dialogue_prompt
from corpora.records import CaptionedImage, Dialogue, Round, Story, StoryPicture
from evaluation import sets
from evaluation.progress import Meter
from evaluation.sets import Picture
from evaluation.sources import Source
from evaluation.store import EvaluationStore, key_for
from miniature.world import SCENES
from settings.evaluation import EvaluationParams

STORY = Story("7", tuple(StoryPicture(f"p{i}", f"{i}.png", f"caption {i} .") for i in range(1, 6)))
STORIES = Source([STORY], of=3, scenes={"7": SCENES[4]})


def test_table_1_reads_the_last_caption_all_and_all_with_pictures():
    one, five, pictures = sets.table_1(STORIES, None)
    assert [s.name for s in (one, five, pictures)] == ["story_1", "story_5", "story_5_pictures"]
    assert [(len(s.examples), s.of) for s in (one, five, pictures)] == [(1, 3)] * 3
    whole = "caption 1 . caption 2 . caption 3 . caption 4 . caption 5 ."
    assert one.examples[0].context == ("caption 5 .",)
    assert five.examples[0].context == (whole,)
    assert pictures.examples[0].context == (
        *("caption 1 .", Picture("1.png"), "caption 2 .", Picture("2.png")),
        *("caption 3 .", Picture("3.png"), "caption 4 .", Picture("4.png"), "caption 5 ."),
    )
    assert [s.examples[0].prompt for s in (one, five, pictures)] == ["caption 5 .", whole, whole]
    assert {s.examples[0].real for s in (one, five, pictures)} == {"5.png"}
    assert one.examples[0].scene == SCENES[4]


def test_figure_6_grows_backwards_from_the_last_caption():
    found = {one.name: one for one in sets.figure_6(STORIES, None)}
    assert list(found) == [
        *("story_1", "story_2", "story_3", "story_4", "story_5"),
        *("story_2_pictures", "story_3_pictures", "story_4_pictures", "story_5_pictures"),
    ]
    assert found["story_2"].examples[0].context == ("caption 4 . caption 5 .",)
    assert found["story_2_pictures"].examples[0].context == (
        *("caption 4 .", Picture("4.png"), "caption 5 ."),
    )
    assert found["story_2_pictures"].title == "Story, 2 captions and 1 picture"
    shared = {one.name for one in sets.table_1(STORIES, None)}
    assert shared <= set(found), "so that a run of both measures them once"


def test_dialogues_are_cut_after_n_rounds():
    rounds = tuple(Round(f"is it {i}?", "yes") for i in range(10))
    dialogues = [Dialogue(str(n), "a.png", "not read", rounds) for n in range(3)]
    source = Source(dialogues, 9, prompt=dialogue_prompt)
    found = sets.figure_8(source, 2)
    assert [one.name for one in found] == [f"dialogue_{n}" for n in range(1, 11)]
    assert [len(one.examples) for one in found] == [2] * 10
    assert found[1].examples[0].prompt == "Q: is it 0? A: yes\nQ: is it 1? A: yes"
    assert [one.name for one in sets.table_2(source, 2)] == [
        *("dialogue_1", "dialogue_5", "dialogue_10"),
    ]


def test_table_8_draws_captions_without_replacement_and_by_seed():
    images = [CaptionedImage(str(n), f"{n}.png", ("a", "b", "c")) for n in range(40)]
    source = Source(images, 40)
    few = EvaluationParams.model_validate({"coco_2014": {"limit": 30}, "seed": 5})
    one = sets.table_8(source, few)
    assert (len(one.examples), one.of) == (30, 120)
    assert len({e.id for e in one.examples}) == 30
    assert all(e.real == f"{e.id.partition(':')[0]}.png" for e in one.examples)
    assert sets.table_8(source, few) == one
    other = sets.table_8(source, few.model_copy(update={"seed": 6}))
    assert [e.id for e in other.examples] != [e.id for e in one.examples]
    everything = EvaluationParams.model_validate({"coco_2014": {"limit": None}})
    assert len(sets.table_8(source, everything).examples) == 120


def test_settings_of_a_table_are_the_papers_unless_params_say_otherwise():
    from pipeline.settings import GenerationSettings

    base = GenerationSettings(steps=12, guidance=2.5, batch_size=7)
    plain = EvaluationParams()
    assert plain.settings_for("table_1", base) == base
    eight = plain.settings_for("table_8", base)
    assert (eight.steps, eight.guidance, eight.scheduler, eight.batch_size) == (250, 3, "ddim", 7)
    some = EvaluationParams.model_validate({"generation": {"table_8": {"steps": 9}}})
    assert some.settings_for("table_8", base) == eight.model_copy(update={"steps": 9})


def test_the_miniature_leaves_out_ablations_and_250_steps():
    plain = EvaluationParams().chosen(miniature=True)
    assert not {"table_3", "table_4", "table_8"} & set(plain)
    short = EvaluationParams.model_validate({"generation": {"table_8": {"steps": 9}}})
    assert set(short.chosen(miniature=True)) - set(plain) == {"table_8"}
    named = EvaluationParams.model_validate({"tables": ["table_8", "table_3", "table_8"]})
    assert named.chosen(miniature=True) == ("table_8", "table_3")


def test_the_store_keeps_what_each_method_made(tmp_path):
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    folders = {"generator": tmp_path / "g", "gill": tmp_path / "h"}
    store = EvaluationStore(folders)
    assert (store.picture("gill", "00ff"), store.text("k")) == (None, None)
    path = store.save_picture("gill", "story_1", 7, "00ff", picture)
    assert path == tmp_path / "h/story_1/00007-00ff.png"
    assert store.picture("gill", "00ff") == path
    assert store.picture("generator", "00ff") is None
    baseline = store.save_picture("generator", "story_1", 7, "00ff", picture)
    store.save_texts({"k": "two\nlines é"})
    with (tmp_path / "h/texts.jsonl").open("a") as stream:
        stream.write('{"key": "half", "te')

    again = EvaluationStore(folders)
    assert (again.picture("gill", "00ff"), again.picture("gill", "11ff")) == (path, None)
    assert again.picture("generator", "00ff") == baseline
    assert Image.open(path).getpixel((0, 0)) == (1, 2, 3)
    assert (again.text("k"), again.text("half")) == ("two\nlines é", None)
    again.save_texts({"half": "whole"})
    whole = EvaluationStore({"gill": tmp_path / "h"})
    assert (whole.text("k"), whole.text("half")) == ("two\nlines é", "whole")


def test_other_models_find_nothing_in_the_store_and_remove_nothing(tmp_path):
    store = EvaluationStore({"gill": tmp_path / "h"})
    path = store.save_picture("gill", "story_1", 7, "00ff", Image.new("RGB", (3, 2)))
    store.save_texts({"k": "text"})
    other = EvaluationStore({"gill": tmp_path / "other", "generator": tmp_path / "g"})
    assert (other.picture("gill", "00ff"), other.text("k")) == (None, None)
    other.save_picture("gill", "story_1", 7, "00ff", Image.new("RGB", (3, 2)))
    same = EvaluationStore({"gill": tmp_path / "h"})
    assert (same.picture("gill", "00ff"), same.text("k")) == (path, "text")
    assert not list(tmp_path.rglob("*.part"))


def test_keys_tell_every_part_apart():
    keys = {key_for(*parts) for parts in (("a", 1), ("a", 2), ("a",), (["a"], 1), ("é", 1))}
    assert len(keys) == 5
    assert all(len(key) == 16 for key in keys)


def test_a_meter_says_rate_and_time_left(monkeypatch):
    now, said = SimpleNamespace(value=100.0), []
    monkeypatch.setattr("evaluation.progress.time.monotonic", lambda: now.value)
    meter = Meter("drawing", 600, "pictures")
    monkeypatch.setattr(meter, "show", said.append)
    now.value += 2.0
    meter.add(4)
    now.value += 98.0
    meter.add(596)
    assert said == [
        "4 of 600 pictures, 2.0 per second, 4 min 58 s left",
        "600 of 600 pictures, 6.0 per second, 0 s left",
    ]


def test_missing_test_rows_say_what_to_do(tmp_path):
    table = SimpleNamespace(
        path="captions.parquet", rows_of_split=lambda _: [], pictures=lambda _: []
    )
    with pytest.raises(Exception, match=r"no row in the split `test`.*captions\.test_fraction"):
        sets.caption_set(SimpleNamespace(table=table), 3)
