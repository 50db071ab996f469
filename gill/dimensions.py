"""Whether what lies on disk fits together: checked by name before a stage does any work.

Three frozen models, two stores and the trained heads each carry widths. A cache made with Stable
Diffusion 1.x (D = 768) and a generator of 2.x (D = 1024) differ in nothing else that one could see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from cache import locate, open_store
from gill.artifacts import Artifacts
from gill_errors import GillError
from pipeline.frozen.backbones import Backbone, Backbones
from settings.params import Params

Part = Literal["features", "targets", "latents", "heads"]


class DimensionError(GillError):
    """Parts that belong to different models; one line for each disagreement, and what to do."""


def check_dimensions(
    artifacts: Artifacts, reads: tuple[Part, ...], params: Params | None = None
) -> None:
    """Refuse parts that do not fit the manifest of the frozen models.

    Args:
        reads: which parts are about to be read; one that does not exist is left to who reads it.
        params: the manifest must be what they ask for, and they say which heads are used.

    Raises DimensionError naming both sides of every disagreement, and BackboneError where there is
    no manifest.
    """
    backbones = Backbones.read(artifacts.backbones)
    found = [] if params is None else list(_unlike_params(backbones, params, artifacts.backbones))
    if "features" in reads:
        places = {"d": ("pooled", "visual")}
        found += _unlike_store(artifacts.features, places, backbones.visual_encoder, backbones)
    if "targets" in reads:
        places = {
            "L": ("embedding", "position"),
            "D": ("embedding", "channel"),
            "D_pooled": ("pooled", "pooled_channel"),
        }
        found += _unlike_store(artifacts.targets, places, backbones.image_generator, backbones)
    if "latents" in reads:
        found += _unlike_store(artifacts.latents, {}, backbones.image_generator, backbones)
    if "heads" in reads:
        checkpoint = "last" if params is None else params.training.checkpoint
        found += _unlike_heads(artifacts.heads(checkpoint), backbones)
    if found:
        raise DimensionError("\n".join(found))


_WHAT = {
    "d": ("d, the visual width,", "visual_encoder"),
    "e": ("e, the language model's width,", "language_model"),
    "L": ("L, the generator's text positions,", "image_generator"),
    "D": ("D, the generator's text width,", "image_generator"),
    "D_pooled": ("D_pooled, the width of the generator's pooled text vector,", "image_generator"),
}


def _unlike_params(backbones: Backbones, params: Params, manifest: Path) -> Iterator[str]:
    """The manifest is of other models than the params name: they were changed since."""
    asked = dict(params.backbones)
    pinned: dict[str, str] = {"language_model_quantization": backbones.language_model.quantization}
    for role, model in backbones:
        # Equal names, or paths of one directory, however either is spelt.
        alike = Path(asked[role]).resolve() == Path(model.source).resolve()
        pinned[role] = asked[role] if alike else model.source
        auto = asked[f"{role}_dtype"] == "auto"
        pinned[f"{role}_dtype"] = "auto" if auto else model.dtype
    if (asked_chat := params.model.chat) != backbones.language_model.chat:
        turns = "plain" if asked_chat is None else "chat"
        yield (
            f"model.turns is {turns}, but {manifest} pins "
            f"{'others' if backbones.language_model.chat and asked_chat else 'the other'}: "
            "run `stages prepare-backbones`"
        )
    for key, value in pinned.items():
        if asked[key] != value:
            yield (
                f"backbones.{key} is {asked[key]}, but {manifest} pins {value}: "
                "run `stages prepare-backbones`"
            )


def _unlike_store(
    where: Path, places: Mapping[str, tuple[str, str]], model: Backbone, backbones: Backbones
) -> Iterator[str]:
    """A store against the frozen model that should have made it: its (array, axis) by width."""
    if locate(where).is_local and not where.exists():
        return
    store, again = open_store(where), f"stages precompute-{where.stem} --rebuild"
    maker = store.provenance.get("model", "an unknown model")
    unlike = False
    for letter, (array, axis) in places.items():
        arrays = store.spec.arrays
        there = arrays[array].dims[axis] if array in arrays else None
        if there != backbones.widths[letter]:
            unlike = True
            yield (
                f"{_WHAT[letter][0]} is {there or 'absent'} in {where} (made with {maker}), but "
                f"{backbones.widths[letter] or 'absent'} for {model.source}: run `{again}`, or "
                f"name {maker} under backbones.{model.role}"
            )
    weights = store.provenance.get("weights")
    if not unlike and weights not in (None, model.fingerprint):
        yield (
            f"{where} was made with other weights ({maker}, {weights[:12]}) than "
            f"{model.source} has ({model.fingerprint[:12]}): run `{again}`"
        )


def _unlike_heads(path: Path, backbones: Backbones) -> Iterator[str]:
    """Trained heads against the frozen models around them."""
    if not path.exists():
        return
    from pipeline.bridge.checkpoint import read_record  # imports torch

    sizes = read_record(path).sizes.model_dump()
    for letter, own in backbones.widths.items():
        if sizes[letter] != own:
            what, role = _WHAT[letter]
            source = getattr(backbones, role).source
            yield (
                f"{what} is {sizes[letter] or 'absent'} in the trained heads {path}, but "
                f"{own or 'absent'} for {source}: run `stages train`, or name the model they were "
                f"trained with under backbones.{role} and run `stages prepare-backbones`"
            )
