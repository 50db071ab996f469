"""Whether the weights of a frozen model are whole, and are those of its configuration.

Only headers are read, so that this costs seconds, before hours of work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from doctor.blueprints import (
    Found,
    generator_blueprint,
    language_model_blueprint,
    visual_encoder_blueprint,
)
from pipeline.frozen.backbones import BackboneError, Role
from pipeline.frozen.weight_files import read_shapes

_Shapes = Mapping[str, tuple[int, ...]]
# open_clip fits these to the size of its pictures while loading.
_RESIZED = ("positional_embedding", "pos_embed")


def check_weights(role: Role, folder: Path) -> None:
    """Refuse weight files that are pointers, truncated, absent, or of another configuration.

    Raises BackboneError, a line for each of them.
    """
    shapes = read_shapes(role, folder)
    problems = []
    for component, model in _outlines(role, folder).items():
        written = shapes.get(component, {})
        where = folder / component
        problems += [f"{where}: {line}" for line in _differences(written, model)]
        if component not in shapes:
            problems.append(f"{role} {folder}: no weights that its loader takes in {where}")
    if problems:
        raise BackboneError("\n".join(problems))


def _outlines(role: Role, folder: Path) -> dict[str, Any]:
    """Component -> its network on the meta device, by the configuration alone."""
    found = Found(str(folder), "local", folder, True)
    if role == "language_model":
        return {"": language_model_blueprint(found, torch.float32).build().model}
    if role == "visual_encoder":
        return {"": visual_encoder_blueprint(found, torch.float32)[0].model}
    parts = generator_blueprint(found, torch.float32)
    encoders = zip(("text_encoder", "text_encoder_2"), parts.text_encoders)
    return {"unet": parts.unet, "vae": parts.vae, **dict(encoders)}


def _differences(written: _Shapes, model: Any) -> list[str]:
    """Tensors of another shape than the model's; names that it does not know are not compared."""
    prefix = getattr(model, "base_model_prefix", "")
    lines = []
    for name, tensor in model.state_dict().items():
        stored = next((n for n in _names(name, prefix) if n in written), None)
        if stored is None or any(part in name for part in _RESIZED):
            continue
        if written[stored] != tuple(tensor.shape):
            lines.append(
                f"{stored} is {list(written[stored])} in the weights, its configuration says "
                f"{list(tensor.shape)}: the files are of two models"
            )
    return lines[:1] + ([f"and {len(lines) - 1} more"] if len(lines) > 1 else [])


def _names(name: str, prefix: str) -> list[str]:
    """What a tensor may be called in a file: with and without the prefix of the inner model."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
