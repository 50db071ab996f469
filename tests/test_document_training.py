"""Steps on documents: in parts, mixed with captions, on several processes, with bad numbers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.bridge.document_objective import document_losses
from pipeline.bridge.documents import Document, DocumentBatch, Drawn, Shown, Words
from pipeline.bridge.mixed_batch import MixedBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, training_losses
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.accumulation import backpropagate
from pipeline.training.distribution import processes, rank
from pipeline.training.stepping import NonFiniteStepError, Stepper
from pipeline.training.validation import guilty_rows
from tests.test_accumulation import PARTS, PRESETS, SIZES, build, example_batch, gradients
from tests.test_several_processes import ROOT

NO_DRAWS = PackingDraws.same(0, False)
STORIES: list[Document] = [
    (Words((4, 5, 6), "words"), Drawn(0), Shown(0), Words((7, 8), "words"), Drawn(1)),
    (Shown(2), Words((20, 21), "words")),
    (Words((30, 31), "image_token"), Drawn(3), Words((13,), "words"), Drawn(4)),
    (Words((9, 10), "words"),),
    (Words((33,)), Drawn(2)),
    (Drawn(1), Words((14, 15), "image_token")),
    (Shown(4), Shown(0), Drawn(2)),
    (Words((41, 42, 43), "image_token"),),
]


def documents(dtype: torch.dtype = torch.float64) -> DocumentBatch:
    """Pictures 1 and 3 are one row."""
    g = torch.Generator().manual_seed(5)
    numbers = {
        "pooled": torch.randn(5, SIZES["d"], generator=g, dtype=dtype),
        "targets": torch.randn(5, SIZES["L"], SIZES["D"], generator=g, dtype=dtype),
        "pooled_targets": torch.randn(5, SIZES["D_pooled"], generator=g, dtype=dtype),
    }
    numbers["pooled"][3] = numbers["pooled"][1]
    return DocumentBatch(tuple(STORIES), rows=torch.tensor([10, 11, 12, 11, 14]), **numbers)


def assert_equal(
    ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    overall = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        scale = torch.maximum(gradient.norm(), 1e-3 * overall)
        assert float((ours[name] - gradient).norm() / scale) < tolerance, name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_of_documents_give_the_step_of_all(preset: str, size: int) -> None:
    objective, batch = PRESETS[preset], documents()
    gill = build(objective, torch.float64)
    whole = document_losses(gill, batch, objective)
    whole.total.backward()
    expected = gradients(gill)
    losses = backpropagate(gill, MixedBatch(None, batch), objective, NO_DRAWS, size)
    assert_equal(gradients(gill), expected, 1e-11)
    for part in (*PARTS, "pooled"):
        value = float(getattr(whole, part).detach())
        assert float(getattr(losses, part)) == pytest.approx(value, rel=1e-11), part
        assert value


@pytest.mark.parametrize("size", [None, 2])
def test_a_mixed_step_weighs_each_corpus_by_its_share(size: int | None) -> None:
    objective, captions = PRESETS["paper"], example_batch(4, torch.float64)
    gill, draws = build(objective, torch.float64), PackingDraws.same(4, True)
    own = training_losses(gill, captions, objective, draws)
    others = document_losses(gill, documents(), objective)
    total = own.total * 4 / 12 + others.total * 8 / 12
    total.backward()
    expected = gradients(gill)
    mixed = MixedBatch(captions, documents())
    assert (len(mixed), mixed.num_tokens) == (12, captions.num_tokens + documents().num_tokens)
    losses = backpropagate(gill, mixed, objective, draws, size)
    assert_equal(gradients(gill), expected, 1e-11)
    assert float(losses.total) == pytest.approx(float(total.detach()), rel=1e-11)


def test_documents_with_nothing_to_learn_change_nothing() -> None:
    objective = PRESETS["paper"]
    gill = build(objective, torch.float64)
    batch = replace(documents(), documents=((Words((3, 4)),),))
    losses = backpropagate(gill, MixedBatch(None, batch), objective, NO_DRAWS)
    assert float(losses.total) == 0
    assert not any(float(g.norm()) for g in gradients(gill).values())


def test_rows_of_pictures_with_bad_numbers_are_named() -> None:
    objective = PRESETS["paper"]
    gill = build(objective, torch.float32)
    batch = documents(torch.float32)
    batch.targets[4, 0, 0] = float("nan")
    captions = example_batch(2, torch.float32)
    captions.pooled[1] = float("inf")
    mixed = MixedBatch(captions, batch)
    stepper = Stepper(gill, objective, TrainingSettings(batch_size=10))
    stepper.take(0, mixed, PackingDraws.same(2, False))
    with pytest.raises(NonFiniteStepError):
        stepper.settle()
    assert guilty_rows(gill, mixed, objective) == [1, 14]


def step(gill: MultimodalLanguageModel, batch: DocumentBatch) -> dict[str, float]:
    settings = TrainingSettings(batch_size=8, learning_rate=1e-2, clip_norm=1.0)
    stepper = Stepper(gill, Objective.paper(), settings)
    stepper.take(0, MixedBatch(None, batch), NO_DRAWS)
    return stepper.settle()


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """The second has fewer pictures to produce, and as many documents."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=True,
        capture_output=True,
    )  # fmt: skip
    gill = build(Objective.paper(), torch.float32)
    report = step(gill, documents(torch.float32))
    expected = gradients(gill)
    for number in range(2):
        theirs = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert theirs["report"] == pytest.approx(report, rel=1e-5)
        # Adam takes a rounding error for a gradient: what it is given is compared.
        assert_equal(theirs["gradients"], expected, 1e-4)


if __name__ == "__main__":
    with processes():
        gill = build(Objective.paper(), torch.float32)
        whole = documents(torch.float32)
        report = step(gill, whole.part(0, 4) if rank() == 0 else whole.part(4, 8))
        found = {"report": report, "gradients": gradients(gill)}
        torch.save(found, Path(sys.argv[1]) / f"{rank()}.pt")
