"""Whether the weights of a frozen model are whole, and are those of its configuration.

Only headers are read, so that this costs seconds, before hours of work.
"""

from __future__ import annotations

import re
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
from doctor.model_files import check_generator_parts
from pipeline.frozen.backbones import BackboneError, Role
from pipeline.frozen.weight_files import read_shapes

_LAYER = re.compile(r"\.\d+\.")
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
    scale = parts.vae.config.scaling_factor
    if not isinstance(scale, (int, float)):
        raise BackboneError(f"{folder}/vae/config.json: scaling_factor is {scale!r}, no number")
    check_generator_parts(folder)
    encoders = zip(("text_encoder", "text_encoder_2"), parts.text_encoders)
    return {"unet": parts.unet, "vae": parts.vae, **dict(encoders)}


def _differences(written: _Shapes, model: Any) -> list[str]:
    """Tensors of another shape than the model's, layers that only one of the two has.

    Other names are not compared: loaders know old ones, and how to join what lies apart.
    """
    prefix = getattr(model, "base_model_prefix", "")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {
        name: found
        for name in shapes
        if (found := next((n for n in _names(name, prefix) if n in written), None))
    }
    if not stored:
        return [f"none of the {len(written)} tensors in the weights is one of its configuration's"]
    lines = [
        f"{found} is {list(written[found])} in the weights, its configuration says "
        f"{list(shapes[name])}: the files are of two models"
        for name, found in stored.items()
        if written[found] != shapes[name] and not any(part in name for part in _RESIZED)
    ]
    unknown = _expected(set(written) - set(stored.values()), model, "unexpected")
    layers = {_LAYER.sub(".#.", name) for name in stored.values()}
    lines += [
        f"{name} is in the weights, its configuration describes fewer layers"
        for name in sorted(unknown)
        if _LAYER.sub(".#.", name) in layers
    ]
    lines += [
        f"{name} is missing in the weights: its configuration describes more"
        for name in sorted(_expected(set(shapes) - set(stored), model, "missing"))
        if not unknown or _LAYER.sub(".#.", name) in {_LAYER.sub(".#.", each) for each in stored}
    ]
    return lines[:1] + ([f"and {len(lines) - 1} more"] if len(lines) > 1 else [])


def _expected(names: set[str], model: Any, kind: str) -> set[str]:
    """Names without those that the model's class says may be missing, or unexpected."""
    patterns = [*(getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ())]
    if kind == "missing":
        patterns += getattr(model, "_tied_weights_keys", None) or ()
    return {name for name in names if not any(re.search(pattern, name) for pattern in patterns)}


def _names(name: str, prefix: str) -> list[str]:
    """What a tensor may be called in a file: with and without the prefix of the inner model."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
