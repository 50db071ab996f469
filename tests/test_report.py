"""The page: every kind of block, nothing from outside, never too large; and the tables on it."""

import base64
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.report import page as page_module
from evaluation.report import showcase
from evaluation.report.curves import Curves, Line, draw
from evaluation.report.differences import draw_differences
from evaluation.report.figures import Figure
from evaluation.report.grids import Grid, failures, talks, told
from evaluation.report.page import ReportError, render, write_page
from evaluation.report.tables import ABSENT, Table, absences, compared, numbers_of, paper_tables
from evaluation.results import Record, Result
from settings.params import read_params

PRESET = Path(__file__).parents[1] / "presets" / "miniature.yaml"


def _picture(path, side=32):
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def _content(**shown):
    captions = {"source": "a table", "kept": 9, "excluded": 1, "splits": {"train": 9},
                "fingerprint": "f" * 40, "reasons": {"too long": 1}}  # fmt: skip
    empty = ("tables", "beyond", "figures", "training_curves", "talks", "grids", "captioned",
             "questions", "failures", "told_stories")  # fmt: skip
    findings = {"cells": {"seeds": [0], "notes": []}, "rule": "R", "findings": []}
    rest = {"absences": {}, "backbones": {}, "versions": {"torch": "2"}, "python": "Python 3"}
    rest |= {"made": datetime(2026, 1, 2, tzinfo=UTC), "code": "c", "params_text": "a: <1>"}
    rest |= {"params": read_params(PRESET), "captions": captions, "excluded_file": "e.tsv"}
    return dict.fromkeys(empty, ()) | rest | {"findings": findings} | shown


def test_every_block_is_on_the_page_and_nothing_comes_from_outside(tmp_path):
    line = Line("ours", [1, 2], [0.5, 0.6], ([0.4, 0.5], [0.6, 0.7]))
    picture = _picture(tmp_path / "p.png")
    record = Record(
        "story_5", "7", "is it?", ({"text": "words"}, {"picture": picture}), picture,
        references=("yes", "no", "yes"), texts={"gill": "maybe"},
        pictures={"gill": picture, "retrieved": picture},
        scores={"gill.oracle_attributes": 0.8, "gill.clip_similarity": 0.5,
                "retrieved.similarity": 0.25},
    )  # fmt: skip
    cells = [["0.12"], [None], [ABSENT], ["x & y"], ["0.5 ± 0.1"]]
    html = render(
        _content(
            tables=[Table("T <1>", ["a"], cells, "noted `make x`")],
            beyond=[Table("Memory", ["", "shown"], [["GILL", "0.9 [0.8, 1.0]"]])],
            grids=[Grid("G", [record], names_sets=True)],
            figures=[Figure("F", [Curves("C", "x", "y", [line])], "bands")],
            questions=[record],
            talks=talks([record, replace(record, set="story_5_pictures")]),
            absences={"LPIPS": "no weights"},
        ),
        256,
    )
    for found in ("T &lt;1&gt;", "–", 'mark quiet">absent', "x &amp; y", "noted",
                  'bad">4 of 5, CLIP 0.50<', 'quiet">cosine 0.25<', "story, 5 captions:", "words",
                  "<b>maybe</b>", "yes; no<", "A story, told and shown",
                  "answered by GILL, retrieved",
                  "2026-01-02", "<code>make x</code>", "<pre>a: &lt;1&gt;",
                  "too long", "e.tsv", "no weights", "bands", "miniature world"):  # fmt: skip
        assert found in html, found
    assert re.search('class="number"[^>]*>0.5 ± 0.1<', html)
    assert re.search(r'class="number"[^>]*>0.9 \[0.8, 1.0\]<', html)
    assert '<a href="#beyond">Beyond the paper</a>' in html
    outside = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', html)
    assert all(found.startswith(("data:", "#")) for found in outside)
    assert "<script" not in html


def test_curves_differ_between_light_and_dark_and_are_the_same_each_time():
    curves = Curves("C", "rounds", "y", [Line("a", [1, 2], [0.1, 0.2], is_published=True)])
    light, dark = (base64.b64decode(draw(curves, dark=d).split(",")[1]).decode() for d in (0, 1))
    assert "#1d2330" in light
    assert "#e6e9ef" in dark
    assert "rounds" in light
    assert draw(curves, dark=False) == draw(curves, dark=False)


def test_pictures_become_smaller_until_the_page_is_small_enough(tmp_path, monkeypatch):
    picture = _picture(tmp_path / "p.png", 256)
    content = _content(grids=[Grid("G", [Record("s", "1", "", (), picture)] * 3)])
    monkeypatch.setattr(page_module, "page_content", lambda *of: content)
    sizes = [len(render(content, side).encode()) for side in (256, 96, 64)]
    assert sizes[0] > sizes[1] > sizes[2]
    report = tmp_path / "r/index.html"
    monkeypatch.setattr(page_module, "LARGEST_PAGE", sizes[1])
    write_page(content["params"], report, None, None)
    assert report.stat().st_size == sizes[1]
    monkeypatch.setattr(page_module, "LARGEST_PAGE", 1000)
    with pytest.raises(ReportError, match="examples_shown"):
        write_page(content["params"], report, None, None)


def _result(metric, value, method="gill", set_="story_5", absent=None, table="table_1"):
    return Result(
        table,
        set_,
        "Story, 5 captions",
        method,
        metric,
        value,
        0.01,
        0.1,
        0.9,
        50,
        60,
        None,
        absent,
    )


def test_ours_stand_beside_the_printed_numbers():
    results = [
        _result("clip_similarity", 0.777),
        _result("oracle_attributes", 0.5),
        _result("lpips", None, absent="no weights are named"),
    ]
    table = compared("T", "table_1", numbers_of("table_1", results, {}), "")
    assert list(table.columns[:4]) == ["", "who", "examples", "right attributes"]
    rows = {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    ours = rows["Story, 5 captions", "GILL"]
    assert ours["CLIP similarity"] == "0.777 ± 0.010"
    assert ours["examples"] == "50 of 60"
    assert ours["LPIPS (lower is better)"] == ABSENT
    printed = next(row for row in table.rows if row[:2] == ["Story, 5 captions", "GLIDE"])
    assert "0.591" in printed
    gill = next(row for row in table.rows if row[:2] == ["Story, 5 captions", "GILL"])
    assert {"0.612", "0.696"} <= set(map(str, gill))
    assert "One seed" in table.note
    assert absences(results) == {"LPIPS (lower is better)": "no weights are named"}


def test_numbers_over_seeds_take_the_place_of_one_run():
    row = {
        "variant": "gill", "table": "table_1", "set": "story_5", "title": "S", "method": "gill",
        "metric": "clip_similarity", "mean": 0.7, "deviation": 0.02, "values": [0.68, 0.72],
        "low": 0.6, "high": 0.8, "examples": 50, "of": 50, "absent": None,
    }  # fmt: skip
    [one] = numbers_of("table_1", [_result("clip_similarity", 0.5)], {"numbers": [row]})
    assert (one.value, one.spread, one.seeds) == (0.7, 0.02, 2)
    [alone] = numbers_of(
        "table_1", [_result("clip_similarity", 0.5)], {"numbers": [row | {"values": [0.7]}]}
    )
    assert (alone.value, alone.seeds) == (0.5, 1)


def test_tables_that_were_not_measured_show_the_paper_and_say_so():
    tables = {table.title[:7]: table for table in paper_tables([], {})}
    assert "not measured" in tables["Table 8"].note
    assert any("12.2" in map(str, row) for row in tables["Table 8"].rows)
    assert list(tables) == [*(f"Table {n}" for n in (1, 2, 3, 4)), "Section",
                            *(f"Table {n}" for n in (5, 6, 7, 8))]  # fmt: skip
    assert all("make ablations" in tables[name].note for name in ("Table 3", "Table 4", "Section"))
    assert any("15.93" in map(str, row) for row in tables["Table 4"].rows)


def _number(variant, set_, metric, mean, method="gill"):
    return {
        "variant": variant, "variant_title": variant, "table": "table_1", "set": set_, "title": "",
        "method": method, "metric": metric, "mean": mean, "deviation": None, "values": [mean],
        "low": None, "high": None, "examples": 5, "of": 5, "absent": None,
    }  # fmt: skip


def test_ablations_fill_tables_3_and_4():
    numbers = [
        _number("gill", "captions", "oracle_attributes", 0.99),
        _number("linear", "captions", "oracle_attributes", 0.91),
        _number("r1", "captions", "oracle_attributes", 0.81),
        _number("gill", "captions", "oracle_attributes", 1.0, method="generator"),
    ]
    tables = {table.title[:7]: table for table in paper_tables([], {"numbers": numbers})}
    third, fourth = tables["Table 3"], tables["Table 4"]
    assert third.columns[1] == "one caption: right attributes"
    values = {row[0]: row[1] for row in third.rows}
    assert values == {
        "generator alone": "1.000", "linear": "0.910", "3-layer MLP": None,
        "transformer encoder": None, "GILLMapper": "0.990",
    }  # fmt: skip
    assert {row[0]: row[1] for row in fourth.rows}["r = 1"] == "0.810"
    assert {row[0]: row[-2] for row in fourth.rows}["r = 8"] == "15.31"


@pytest.mark.parametrize(
    ("seeds", "verdict", "words"),
    [([0], None, "A first look: one seed"), ([0, 1], "reversed", "2 seeds")],
)
def test_a_finding_is_a_chart_a_verdict_and_the_numbers_that_decide(seeds, verdict, words):
    by = {"first": 0.7, "second": 0.5, "difference": 0.2, "low": 0.1, "high": 0.3,
          "verdict": verdict}  # fmt: skip
    part = {"title": "stories", "claim": "greater", "paper": "CLIP 0.6 / 0.5", "beside": False,
            "metrics": ["oracle_attributes", "clip_similarity"],
            "by": {"oracle_attributes": by}}  # fmt: skip
    beside = {**part, "title": "rounds", "beside": True}
    finding = {"number": 1, "statement": "S", "source": "Table 1", "parts": [beside, part],
               "verdicts": {"oracle_attributes": verdict, "clip_similarity": None}}  # fmt: skip
    unmeasured = {
        **finding,
        "number": 2,
        "statement": "nobody knows",
        "parts": [{**part, "by": {}}, beside],
    }
    cells = {"seeds": seeds, "notes": ["a note"]}
    findings = {"cells": cells, "rule": "by `rule`", "findings": [finding, unmeasured]}
    html = render(_content(findings=findings), 64)
    for shown in (words, "a note", "by <code>rule</code>", "in this run: nobody knows."):
        assert shown in html
    tone = "bad" if verdict else "quiet"
    mark = f'<span class="mark {tone}">{verdict or "a first look"}</span>'
    decided = re.findall("<tr><td.*</tr>", html)[1]
    values = re.findall("<td[^>]*>(.*?)</td>", decided)
    assert values == [
        "stories", "right attributes", "better", "0.700", "0.500",
        "+0.200 [+0.100, +0.300]", mark, "CLIP 0.6 / 0.5",
    ]  # fmt: skip
    chart = base64.b64decode(draw_differences(finding, dark=False).split(",")[1]).decode()
    assert chart.index("stories") < chart.index("rounds (beside)")
    assert "difference of right attributes" in chart


def test_sections_without_anything_to_say_are_not_on_the_page():
    params = read_params(PRESET)
    params = params.model_copy(
        update={"captions": params.captions.model_copy(update={"table": "my.tsv"})}
    )
    tables = [Table("Mine", ["a"], [["1"]]), Table("Theirs", ["a"], [], is_measured=False)]
    html = render(_content(params=params, tables=tables), 64)
    assert "Trained on my.tsv" in html
    assert "Not measured in this run: Theirs." in html
    sections = re.findall('<h2 id="([a-z]+)">', html)
    assert sections == ["pictures", "tables", "figures", "run", "real"]
    assert re.findall('href="#([a-z]+)"', html) == sections
    assert "miniature" not in html.partition('<h2 id="real">')[0].partition("All params")[0]


def test_a_text_is_shown_with_the_picture_that_follows_it():
    context = ({"text": " a "}, {"picture": "1.png"}, {"picture": "2.png"}, {"text": "b"})
    record = Record("story_5_pictures", "7", "", context, "3.png")
    assert told(record) == [("a", "1.png"), ("", "2.png"), ("b", None)]


def test_the_readmes_pictures_show_what_was_told_and_what_was_made(tmp_path):
    picture = _picture(tmp_path / "p.png", 64)
    context = ({"text": "a ring."}, {"picture": picture}, {"text": "it " + "turns " * 90})
    record = Record("story_5_pictures", "7", "", context, picture,
                    pictures={"gill": picture, "retrieved": picture})  # fmt: skip
    examples = showcase.draw_examples([Grid("Stories", [record])])
    # Twice its size with hard edges: the answer's pixels stand on the right as they are.
    pixels = np.asarray(Image.open(picture).resize((128, 128), Image.Resampling.NEAREST))
    right = np.asarray(examples)[:, -20 - 128 : -20]
    assert any((right[y : y + 128] == pixels).all() for y in range(len(right) - 128))

    frames = showcase.draw_chat(talks([record]))
    assert [time for _, time in frames] == [1100, 1100, 3000]  # two messages, then the answer
    assert {frame.size for frame, _ in frames} == {(420, 560)}
    assert frames[1][0].tobytes() != frames[2][0].tobytes()


def test_a_picture_that_was_an_answer_stands_in_an_answer(tmp_path):
    first, second = (_picture(tmp_path / f"{n}.png", 64 + n) for n in range(2))
    context = ({"text": "a ring."}, {"answer": first}, {"text": "now blue."})
    record = Record("follow_ups", "7", "", context, first, pictures={"gill": second})
    [talk] = talks([record])
    said = [(one.told, one.pictures) for one in talk.exchanges]
    assert said == [
        ([("a ring.", None)], [("generated", first)]),
        ([("now blue.", None)], [("generated", second)]),
    ]
    times = [time for _, time in showcase.draw_chat([talk])]
    assert times == [1100, 3000, 1100, 3000]
    html = render(_content(talks=[talk]), 64)
    bubbles = re.findall(r'<div class="(bubble(?: answer)?)">', html)
    assert bubbles == ["bubble", "bubble answer"] * 2


def test_failures_are_the_worst_pictures_by_each_judge_and_the_worst_found():
    def record(number, right, similar, cosine):
        scores = {"gill.oracle_attributes": right, "gill.clip_similarity": similar,
                  "retrieved.similarity": cosine}  # fmt: skip
        return Record("captions", number, "", (), "real", pictures={"gill": "p"}, scores=scores)

    records = [record("a", 0.8, 0.9, 0.1), record("b", 0.2, 0.95, 0.7), record("c", 0.8, 0.1, 0.9)]
    worst = [[r.id for r in block.records] for block in failures(records)]
    assert worst == [["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert "retrieved" in failures(records)[-1].title


def test_the_ceiling_of_a_set_stands_beside_its_score():
    result = replace(_result("oracle_attributes", 0.7), ceiling=0.82)
    numbers = numbers_of("table_1", [result], {})
    table = compared("T", "no table", numbers, "")
    assert list(table.columns) == ["", "who", "examples", "right attributes", "ceiling"]
    assert table.rows[0][3:] == ["0.700 ± 0.010", "0.820"]


def test_other_presets_have_a_column_each_and_rows_of_their_own():
    theirs = [
        _number("gill", "story_5", "oracle_attributes", 0.6),
        _number("gill", "turns", "right_choice", 0.97) | {"table": "chat", "title": "All turns"},
        _number("gill", "turns", "f1_gen", 0.5) | {"table": "chat"},
    ]
    presets = {"smollm2": {"numbers": theirs}, "untouched": {"numbers": []}}
    tables = paper_tables([_result("oracle_attributes", 0.8)], {}, presets)
    stories = next(table for table in tables if table.title.startswith("Table 1"))
    assert list(stories.columns[3:5]) == ["right attributes", "smollm2"]
    row = next(row for row in stories.rows if row[1] == "GILL" and row[3] is not None)
    assert row[3:5] == ["0.800 ± 0.010", "0.600"]
    assert "smollm2: under presets/smollm2.yaml, seeds: 1." in stories.note
    assert "untouched" not in stories.note
    chat = next(table for table in tables if table.title.startswith("A chat model"))
    assert list(chat.columns) == ["", "who", "examples", "right choice", "smollm2"]
    assert chat.rows == [["All turns", "GILL", "5", None, "0.970"]]
