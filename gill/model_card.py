"""The model card of a trained GILL: what it is, what it belongs to, what made it, how to use it.

Its metadata are those of the hub's card schema, and its numbers also stand there as `model-index`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData


@dataclass(frozen=True)
class CardNumber:
    """A number of the run's evaluation, as the card shows it."""

    set: str
    """What it was measured on: the name that results.json has for it."""
    title: str
    """The same for people."""
    metric: str
    value: float
    baseline: float | None
    """The same of the generator with its own text encoder, where that was measured."""
    examples: int


def write_model_card(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    has_decision: bool,
    numbers: Sequence[CardNumber] = (),
    licence: str | None = None,
) -> str:
    """The text of README.md, from config.json and the record of the checkpoint.

    `licence` is that of the trained part, an identifier of the hub; none: the card says so.
    """
    frozen = config["backbones"]
    # A base model is a repository of the hub; built-in models and tags are not.
    base = [
        model["source"]
        for model in frozen.values()
        if model["revision"] is not None and "/" in model["source"]
    ]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="gill",
            license=licence,
            pipeline_tag="any-to-any",
            tags=["gill", "multimodal", "text-to-image", "image-retrieval", "image-captioning"],
            base_model=base or None,
            model_name="GILL" if numbers else None,
            eval_results=[_eval_result(number) for number in numbers] or None,
        ),
        template_path=str(Path(__file__).with_suffix(".md")),
        config=config,
        record=record,
        parameters=json.dumps(record["parameters"], indent=1),
        local=[role for role, model in frozen.items() if model["source"] is None],
        has_decision=has_decision,
        numbers=numbers,
        licence=licence,
    )
    return f"{card}\n"


def licence_of(source: str, folder: Path) -> str | None:
    """The licence of a frozen model: by the card in its folder, else by the table beside this
    module; None where neither knows it."""
    card = folder / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        if len(parts) == 3 and not parts[0].strip():
            try:
                metadata = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                metadata = None
            if isinstance(metadata, dict) and isinstance(metadata.get("license"), str):
                return metadata["license"]
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return next((name for pattern, name in table.items() if fnmatchcase(source, pattern)), None)


def _eval_result(number: CardNumber) -> EvalResult:
    return EvalResult(
        task_type="any-to-any",
        dataset_type=number.set,
        dataset_name=number.title,
        metric_type=number.metric,
        metric_value=round(number.value, 4),
    )
