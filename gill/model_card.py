"""The model card of a trained GILL: what it is, what it belongs to, what made it, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_model_card(
    config: Mapping[str, Any], record: Mapping[str, Any], *, has_decision: bool
) -> str:
    """The text of README.md, from config.json and the record of the checkpoint."""
    frozen = config["backbones"]
    # A base model is a repository of the hub; built-in tags are not.
    base = [model["source"] for model in frozen.values() if model["revision"] is not None]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="gill",
            pipeline_tag="any-to-any",
            tags=["gill", "multimodal", "text-to-image", "image-retrieval", "image-captioning"],
            base_model=base or None,
        ),
        template_path=str(Path(__file__).with_suffix(".md")),
        config=config,
        record=record,
        parameters=json.dumps(record["parameters"], indent=1),
        local=[role for role, model in frozen.items() if model["source"] is None],
        has_decision=has_decision,
    )
    return f"{card}\n"
