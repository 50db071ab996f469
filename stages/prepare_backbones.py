"""Stage prepare-backbones: find the frozen models and pin them."""

from __future__ import annotations

from typing import get_args

from miniature import backbones as miniature_backbones
from pipeline.backbones import Backbones, Role, check_widths, resolve_backbone
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
    found = {
        role: resolve_backbone(
            role,
            source,
            revision=getattr(wanted, f"{role}_revision"),
            allow_download=wanted.allow_download,
            dtype=getattr(wanted, f"{role}_dtype"),
        )
        for role, source in sources.items()
    }
    manifest = Backbones(**found)
    check_widths(manifest)
    manifest.write(ARTIFACTS.backbones)
    for backbone in found.values():
        widths = ", ".join(f"{name} {value}" for name, value in backbone.widths.items())
        print(f"{backbone.role}: {backbone.source} ({widths}) {backbone.fingerprint[:12]}")
