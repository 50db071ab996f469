"""Contextual retrieval on a model that can be followed by hand."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from corpora.records import Story, StoryPicture
from evaluation import retrieval
from evaluation.sources import Source
from settings.evaluation import EvaluationParams

# One colour per picture; a text names the colour that it means.
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "pink": (255, 0, 128)}


def _vector(color: tuple[int, int, int]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(color, dtype=torch.float32), dim=0)


class Encoder:
    """Pooled vector: the mean colour; text: the colour of its last word."""

    def encode_pictures(self, pictures):
        return torch.stack([torch.tensor(p.getpixel((0, 0))) for p in pictures]).float()

    def project(self, pooled):
        return torch.nn.functional.normalize(pooled, dim=-1)

    def encode_text(self, texts):
        return torch.stack([_vector(COLORS[text.split()[-1]]) for text in texts])


@pytest.fixture
def stories(tmp_path):
    """Two stories; the second one's last caption names a colour that it has shown already."""
    for name, color in COLORS.items():
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{name}.png")
    told = {
        "1": [("red", "red"), ("red", "red"), ("red", "red"), ("red", "red"), ("green", "green")],
        "2": [("blue", "blue")] * 3 + [("red", "red"), ("pink", "red")],
    }
    return Source(
        [
            Story(
                id_,
                tuple(
                    StoryPicture(f"{id_}{i}", str(tmp_path / f"{picture}.png"), f"it is {caption}")
                    for i, (picture, caption) in enumerate(parts)
                ),
            )
            for id_, parts in told.items()
        ],
        of=2,
    )


@pytest.fixture
def gill(monkeypatch):
    """[IMG1] means the colour of the first picture shown, or of the last word."""

    def read_contexts(_model, encoder, contexts):
        first = [next((p for p in c if not isinstance(p, str)), c[-1]) for c in contexts]
        vectors = [
            encoder.encode_text([one])[0]
            if isinstance(one, str)
            else encoder.project(encoder.encode_pictures([one]))[0]
            for one in first
        ]
        return torch.stack(vectors)[:, None]

    monkeypatch.setattr(retrieval, "read_contexts", read_contexts)
    encoder = Encoder()
    model = SimpleNamespace(image_key=encoder.project, text_query=lambda hidden: hidden[:, 0])
    return SimpleNamespace(encoder=encoder, model=model)


def test_pictures_that_a_story_has_shown_are_no_candidates_of_it(gill, stories):
    results = retrieval.table_5(gill, stories, EvaluationParams())
    found = {(r.set, r.method, r.metric): r.value for r in results}
    # Of 4 candidates story 1 may not take red, nor story 2 blue and red: with red left out, "red"
    # is nearest to pink, which is right.
    assert found["story_1", "clip", "recall_at_1"] == 1.0
    assert found["story_1", "gill", "recall_at_1"] == 1.0
    # Asked by its first picture, story 1 means red: pink is nearer than green.
    assert found["story_5_pictures", "gill", "recall_at_1"] == 0.5
    assert found["story_5_pictures", "clip", "recall_at_1"] == 1.0
    assert ("story_1", "clip_captions", "recall_at_1") not in found
    assert ("story_1", "clip", "recall_at_5") not in found, "there are four candidates"


def test_a_limit_shortens_the_stories_and_not_the_candidates(gill, stories):
    section = EvaluationParams.model_validate({"vist": {"limit": 1}})
    results = retrieval.table_5(gill, stories, section)
    assert {(r.examples, r.of) for r in results} == {(1, 2)}
    found = {(r.set, r.method, r.metric): r.value for r in results}
    # Pink is in the second story alone, and still in the way.
    assert found["story_5_pictures", "gill", "recall_at_1"] == 0.0


def test_ties_count_against_the_truth():
    same = torch.ones(2, 12)
    found = retrieval.recalls(same, torch.tensor([0, 3]))
    assert found == {"recall_at_1": [0, 0], "recall_at_5": [0, 0], "recall_at_10": [0, 0]}
