"""Commands import-released and export-released: the published checkpoint layout, in and out."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from app.gill import CHECKPOINTS
from pipeline.backbones import Backbones
from pipeline.checkpoint import LAST, CheckpointRecord, load_heads, save_heads
from pipeline.decision import DecisionModel
from pipeline.language_model import load_language_model
from pipeline.upstream import (
    DECISION_FILE,
    export_decision,
    export_heads,
    import_decision,
    import_heads,
    released_arguments,
)
from stages.failures import StageError
from stages.params import Params
from stages.paths import ARTIFACTS


def import_released(directory: Path) -> None:
    """Released heads, and the classifier where it is there, as this project's own files.

    Raises UpstreamError naming missing, extra or misshapen tensors; StageError where the heads do
    not fit the frozen models of the manifest.
    """
    heads, arguments = import_heads(directory)
    backbones = Backbones.read(ARTIFACTS.backbones)
    widths = {
        "d": backbones.visual_encoder.widths["d"],
        "e": backbones.language_model.widths["e"],
        "L": backbones.image_generator.widths["L"],
        "D": backbones.image_generator.widths["text_width"],
    }
    wrong = [
        f"{name} is {getattr(heads.sizes, name)} in the heads, {width} in the frozen models"
        for name, width in widths.items()
        if getattr(heads.sizes, name) != width
    ]
    if wrong:
        raise StageError(f"{directory} was trained on other models: {'; '.join(wrong)}")
    record = CheckpointRecord(
        sizes=heads.sizes,
        backbones=backbones.fingerprints,
        parameters={"released": arguments.model_dump(mode="json")},
    )
    save_heads(ARTIFACTS.model / LAST, heads, record)
    print(f"{directory} -> {ARTIFACTS.model / LAST}")
    if (directory / DECISION_FILE).is_file():
        linear = import_decision(directory)
        DecisionModel.from_linear(linear.weight.detach(), linear.bias.detach()).save(
            ARTIFACTS.decision
        )
        print(f"{directory / DECISION_FILE} -> {ARTIFACTS.decision}")


def export_released(directory: Path, params: Params) -> None:
    """The trained heads in the released layout, and the classifier where it fits that layout."""
    backbones = Backbones.read(ARTIFACTS.backbones)
    heads, _ = load_heads(
        ARTIFACTS.model / CHECKPOINTS[params.training.checkpoint], backbones=backbones.fingerprints
    )
    model = load_language_model(backbones.language_model.path)
    arguments = released_arguments(
        heads.sizes,
        language_model=backbones.language_model.source,
        visual_encoder=backbones.visual_encoder.source,
        num_tokens=len(model.tokenizer),
    )
    export_heads(heads, arguments, directory)
    print(f"{ARTIFACTS.model} -> {directory}")
    if (ARTIFACTS.decision / "decision.json").is_file():
        decision = DecisionModel.load(ARTIFACTS.decision)
        if decision.img_tokens == "first" and not decision.use_similarity:
            weight, bias = decision.to_linear()
            linear = nn.Linear(weight.shape[1], 2)
            linear.load_state_dict({"weight": weight, "bias": bias})
            export_decision(linear, directory)
        else:
            print(
                "the classifier was not exported: the released layout holds a linear map of the "
                "first [IMG] state alone (decision: img_tokens first, use_similarity false)"
            )
