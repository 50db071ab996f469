"""Stage prepare-backbones: find the frozen models and pin them."""

from __future__ import annotations

from typing import get_args

from miniature import backbones as miniature_backbones
from pipeline.backbones import (
    Backbones,
    Quantization,
    Role,
    check_widths,
    resolve_backbone,
    resolve_dtype,
)
from pipeline.devices import pick_device
from pipeline.language_model import check_language_model
from pipeline.quantization import require_quantization
from stages.params import Params
from stages.paths import ARTIFACTS


def run(params: Params, *, retrain: bool) -> None:
    """Unpack (or retrain) the miniature models where they are asked for; write the manifest."""
    wanted = params.backbones
    sources = {role: getattr(wanted, role) for role in get_args(Role)}
    if "miniature" in sources.values():
        folder = ARTIFACTS.backbones.parent / "miniature"
        if retrain:
            miniature_backbones.train(folder)
        else:
            miniature_backbones.unpack(folder)
        sources = {
            role: str(folder / role) if source == "miniature" else source
            for role, source in sources.items()
        }
    if wanted.language_model_quantization != "none":
        require_quantization(wanted.language_model_quantization)
    device = pick_device(params.run.device).type
    found = {
        role: resolve_backbone(
            role,
            source,
            revision=getattr(wanted, f"{role}_revision"),
            allow_download=wanted.allow_download,
            dtype=resolve_dtype(getattr(wanted, f"{role}_dtype"), device),
            quantization=_quantization(role, params),
        )
        for role, source in sources.items()
    }
    manifest = Backbones(**found)
    check_widths(manifest)
    if wanted.language_model != "miniature":  # tests prove that one
        check_language_model(manifest.language_model.path)
    manifest.write(ARTIFACTS.backbones)
    for backbone in found.values():
        widths = ", ".join(f"{name} {value}" for name, value in backbone.widths.items())
        how = backbone.dtype if backbone.quantization == "none" else backbone.quantization
        print(f"{backbone.role}: {backbone.source} ({widths}; {how}) {backbone.fingerprint[:12]}")


def _quantization(role: Role, params: Params) -> Quantization:
    return params.backbones.language_model_quantization if role == "language_model" else "none"
