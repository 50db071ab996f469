"""Commands import-released and export-released: the published checkpoint layout, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from evaluation.variants import lay_over
from gill.artifacts import ARTIFACTS
from gill.frozen import read_backbones
from gill_files import written_whole
from pipeline.bridge.checkpoint import load_heads
from pipeline.bridge.upstream import export_decision, export_heads, import_heads, released_arguments
from pipeline.frozen.language_model import load_language_model
from pipeline.talking.decision import DecisionError, DecisionModel
from settings.params import Params, parse_params
from stages.trained_weights import read_weights


def import_released(directory: Path, params_file: Path) -> None:
    """Name a released checkpoint, and the sizes of its heads, in the params file.

    What is trained stays where it is: `training.weights` decides which heads are used.

    Raises UpstreamError naming missing, extra or misshapen tensors; StageError where the heads do
    not fit the frozen models of the manifest.
    """
    heads, _ = import_heads(directory)
    sizes = heads.sizes
    changes: dict[str, Any] = {
        "training": {"weights": str(directory)},
        "model": {name: getattr(sizes, name) for name in ("k", "r", "m", "p")}
        | {"mapper": sizes.mapper.model_dump()},
    }
    yaml = YAML()  # keeps the comments and the order of the person who wrote the file
    raw = yaml.load(params_file.read_text(encoding="utf-8"))
    params = parse_params(lay_over(raw, changes), params_file)
    if ARTIFACTS.backbones.is_file():
        read_weights(str(directory), params, read_backbones(ARTIFACTS))
    _set(raw, changes)
    with written_whole(params_file) as part:
        yaml.dump(raw, part)
    print(f"{params_file}: training.weights is {directory} now, and model has its sizes")
    print("`dvc repro` trains nothing, and goes on with index, decision, evaluation and report")


def _set(section: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(section.get(key), Mapping):
            _set(section[key], value)
        else:
            section[key] = value


def export_released(directory: Path, params: Params) -> None:
    """The trained heads in the released layout, and the classifier where it fits that layout."""
    backbones = read_backbones(ARTIFACTS)
    found = ARTIFACTS.heads(params.training.checkpoint)
    heads, _ = load_heads(found, backbones=backbones.fingerprints)
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
        try:
            export_decision(*DecisionModel.load(ARTIFACTS.decision).to_linear(), directory)
        except DecisionError as error:
            print(f"the classifier was not exported: {error}")
