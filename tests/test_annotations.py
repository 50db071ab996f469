"""Answers survive, are read back per annotator, and leave as the released TSV format."""

import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from app.annotations import AnnotationError, Annotations, generated_side
from corpora.parti_prompts import PartiPrompt, VotedPrompt


def write_study(folder: Path, number: int = 10) -> Path:
    """Pairs whose retrieved pictures are blue and whose generated ones are red."""
    for index in range(number):
        for name, colour in (("ret", (0, 0, 200)), ("gen", (200, 0, 0))):
            Image.new("RGB", (8, 6), colour).save(folder / f"{name}{index}.png")
    pairs = [
        {
            "prompt": f'prompt "{index}" & <more>',
            "category": "Animals",
            "challenge": "Basic",
            "note": f"note {index}",
            "retrieved": f"ret{index}.png",
            "generated": f"gen{index}.png",
        }
        for index in range(number)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path)


def _choose(annotations: Annotations, name: str, pair: int, vote: str) -> None:
    """Answer both questions so that the given kind is meant, wherever this annotator sees it."""
    prompt = annotations.pairs[pair].prompt
    generated = generated_side(name, prompt)
    other = "B" if generated == "A" else "A"
    choice = {"gen": generated, "ret": other, "same": "same"}[vote]
    annotations.record(name, pair, "relevant", choice)  # type: ignore[arg-type]
    annotations.record(name, pair, "realistic", "same")


def test_votes_leave_in_the_released_format(study: Path) -> None:
    annotations = Annotations(study)
    _choose(annotations, "Ada", 1, "gen")
    _choose(annotations, "Bo", 1, "ret")
    _choose(annotations, "Bo", 0, "same")
    _choose(annotations, "Ada", 3, "ret")
    assert annotations.annotators() == ["Ada", "Bo"]

    def prompt(index: int) -> PartiPrompt:
        return PartiPrompt(f'prompt "{index}" & <more>', "Animals", "Basic", f"note {index}")

    assert annotations.export("relevant") == [
        VotedPrompt(prompt(0), ("same",)),
        VotedPrompt(prompt(1), ("gen", "ret")),
        VotedPrompt(prompt(3), ("ret",)),
    ]
    assert [row.votes for row in annotations.export("realistic")] == [
        ("same",),
        ("same", "same"),
        ("same",),
    ]


def test_the_last_answer_counts_and_the_earlier_ones_stay(study: Path) -> None:
    annotations = Annotations(study)
    for choice in ("A", "B", "same", "B"):
        annotations.record("Ada", 0, "relevant", choice)  # type: ignore[arg-type]
    assert annotations.answers("Ada", 0) == {"relevant": "B"}
    assert annotations.answers("Bo", 0) == {}
    with sqlite3.connect(study / "annotations.sqlite") as database:
        assert database.execute("SELECT COUNT(*) FROM answers").fetchone() == (4,)


def test_progress_resumes_at_the_first_open_question(study: Path) -> None:
    annotations = Annotations(study)
    assert annotations.progress("Ada").resume == 0
    for pair in (0, 1, 3):
        _choose(annotations, "Ada", pair, "gen")
    annotations.record("Ada", 2, "relevant", "A")
    state = annotations.progress("Ada")
    assert (state.done, state.total, state.resume) == (3, 10, 2)
    for pair in range(10):
        _choose(annotations, "Ada", pair, "gen")
    assert (annotations.progress("Ada").done, annotations.progress("Ada").resume) == (10, 9)
    assert annotations.progress("Bo").done == 0


def test_the_order_of_the_pictures_is_fixed_per_annotator_and_balanced(study: Path) -> None:
    annotations = Annotations(study)
    for pair in range(10):
        shown = {annotations.picture("Ada", pair, side).name for side in ("A", "B")}  # type: ignore
        assert shown == {f"ret{pair}.png", f"gen{pair}.png"}
    again = Annotations(study)
    assert [annotations.picture(" Ada ", pair, "A") for pair in range(10)] == [
        again.picture("Ada", pair, "A") for pair in range(10)
    ]
    sides = [[generated_side(name, f"prompt {i}") for i in range(1000)] for name in ("Ada", "Bo")]
    assert 450 < sides[0].count("A") < 550
    assert 450 < sum(a == b for a, b in zip(*sides)) < 550, "annotators are independent"


def test_answers_survive_a_killed_process(study: Path) -> None:
    """The writer dies without closing anything right after `record` returned."""
    program = (
        "import os, sys; from pathlib import Path; from app.annotations import Annotations\n"
        "annotations = Annotations(Path(sys.argv[1]))\n"
        "annotations.record('Ada', 4, 'relevant', 'same')\n"
        "os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, str(study)], cwd=root, check=False)
    assert done.returncode == -9
    assert Annotations(study).answers("Ada", 4) == {"relevant": "same"}


def test_many_annotators_at_once_lose_nothing(study: Path) -> None:
    annotations = Annotations(study)

    def work(name: str) -> None:
        for pair in range(10):
            _choose(annotations, name, pair, "gen")

    threads = [threading.Thread(target=work, args=(f"annotator {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row.votes for row in annotations.export("relevant")] == [("gen",) * 4] * 10


def test_answers_to_other_pairs_are_not_mixed_in(study: Path) -> None:
    Annotations(study).record("Ada", 0, "relevant", "A")
    write_study(study, number=9)
    with pytest.raises(AnnotationError, match="were given to other pairs"):
        Annotations(study)


def test_what_may_not_be_recorded(study: Path) -> None:
    annotations = Annotations(study)
    with pytest.raises(AnnotationError, match="no pair 10; the study has 10"):
        annotations.record("Ada", 10, "relevant", "A")
    with pytest.raises(AnnotationError, match="no pair -1"):
        annotations.record("Ada", -1, "relevant", "same")
    for name in ("", "  ", "a\tb", "x" * 41):
        with pytest.raises(AnnotationError, match="1 to 40 printable"):
            annotations.record(name, 0, "relevant", "A")
    assert annotations.annotators() == []


def test_every_bad_pair_is_named(study: Path) -> None:
    (study / "ret1.png").unlink()
    (study / "gen2.png").write_bytes(b"not a picture")
    pairs = json.loads((study / "pairs.json").read_text())
    pairs[3]["retrieved"] = "../outside.png"
    pairs[5]["prompt"] = pairs[4]["prompt"]
    (study / "pairs.json").write_text(json.dumps(pairs))
    with pytest.raises(AnnotationError) as caught:
        Annotations(study)
    for part in (
        "entry 1: retrieved picture",
        "entry 2: generated picture",
        "entry 3: retrieved picture",
        "entry 5: the prompt of entry 4 again",
    ):
        assert part in str(caught.value)
    pairs[0]["prompt"] = "two\nlines"
    (study / "pairs.json").write_text(json.dumps(pairs))
    with pytest.raises(AnnotationError, match="tab or a line break"):
        Annotations(study)
    (study / "pairs.json").unlink()
    with pytest.raises(AnnotationError, match=r"pairs\.json is missing"):
        Annotations(study)
