"""What a result follows from besides its own settings: heads, index, classifier, frozen models."""

from __future__ import annotations

from typing import Any

from gill.artifacts import Artifacts
from gill.world import have_world
from pipeline.frozen.backbones import Backbone, Backbones
from settings.params import Params
from stages.required import required
from workfolder import WorkFolder, content_of, file_md5


def models_in_use(work: WorkFolder, params: Params, artifacts: Artifacts) -> dict[str, Any]:
    """Fingerprints of the trained heads, the index, the frozen models and the caption table.

    The index may be None: variants that retrieve nothing have none.

    The miniature world is drawn where it is not here, as in a clone that pulled the rest.

    Raises StageError naming what is missing and the stage that makes it.
    """
    heads = required(artifacts.heads(params.training.checkpoint), "train")
    required(artifacts.captions, "prepare-captions")
    world = None
    if params.is_miniature:
        have_world(work, artifacts.miniature, params.captions.miniature.model_dump())
        world = file_md5(artifacts.miniature / "drawn.json")
    return {
        "world": world,
        "heads": file_md5(heads),
        "index": content_of(artifacts.index) if artifacts.index.is_dir() else None,
        "captions": file_md5(artifacts.captions),
        "backbones": frozen_in_use(artifacts),
    }


def frozen_in_use(artifacts: Artifacts) -> dict[str, str]:
    """Role -> fingerprint and number type of a frozen model.

    Raises BackboneError where they are not pinned yet.
    """
    pinned: list[Backbone] = [found for _, found in Backbones.read(artifacts.backbones)]
    return {found.role: f"{found.fingerprint} {found.dtype}" for found in pinned}
