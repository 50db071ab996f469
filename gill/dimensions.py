"""Whether what lies on disk fits together: checked by name before a stage does any work.

Three frozen models, two stores and the trained heads each carry widths. A cache made with Stable
Diffusion 1.x (D = 768) and a generator of 2.x (D = 1024) differ in nothing else that one could see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cache import open_store
from gill.artifacts import Artifacts
from gill_errors import GillError
from pipeline.frozen.backbones import Backbone, Backbones, Role

Part = Literal["features", "targets", "heads"]


class DimensionError(GillError):
    """Parts that belong to different models; one line for each disagreement, and what to do."""


def check_dimensions(
    artifacts: Artifacts,
    reads: tuple[Part, ...],
    wanted: Mapping[str, Any] | None = None,
    checkpoint: str = "last.safetensors",
) -> None:
    """Refuse parts that do not fit the manifest of the frozen models.

    Args:
        reads: which parts are about to be read; one that does not exist is left to who reads it.
        wanted: the params section `backbones`: the manifest must be what it asks for.
        checkpoint: the trained heads, below `artifacts.model`.

    Raises DimensionError naming both sides of every disagreement, and BackboneError where there is
    no manifest.
    """
    backbones = Backbones.read(artifacts.backbones)
    found = list(_unlike_params(backbones, wanted or {}, artifacts.backbones))
    if "features" in reads:
        again = "stages precompute-features --rebuild"
        visual = backbones.visual_encoder
        found += _unlike_store(artifacts.features, "pooled", {"d": "visual"}, visual, again)
    if "targets" in reads:
        again = "stages precompute-targets --rebuild"
        places = {"L": "position", "D": "channel"}
        generator = backbones.image_generator
        found += _unlike_store(artifacts.targets, "embedding", places, generator, again)
    if "heads" in reads:
        found += _unlike_heads(artifacts.model / checkpoint, backbones)
    if found:
        raise DimensionError("\n".join(found))


_WHAT = {
    "d": ("d, the visual width,", "visual_encoder"),
    "e": ("e, the language model's width,", "language_model"),
    "L": ("L, the generator's text positions,", "image_generator"),
    "D": ("D, the generator's text width,", "image_generator"),
    "D_pooled": ("D_pooled, the width of the generator's pooled text vector,", "image_generator"),
}


def _unlike_params(
    backbones: Backbones, wanted: Mapping[str, Any], manifest: Path
) -> Iterator[str]:
    """The manifest is of other models than the params name: they were changed since."""
    for role in Backbones.model_fields if wanted else ():
        pinned: Backbone = getattr(backbones, role)
        if not _same(wanted[role], pinned.source):
            yield (
                f"backbones.{role} is {wanted[role]}, but {manifest} pins {pinned.source}: "
                "run `stages prepare-backbones`"
            )
        dtype = wanted[f"{role}_dtype"]
        if dtype not in ("auto", pinned.dtype):
            yield (
                f"backbones.{role}_dtype is {dtype}, but {manifest} pins {pinned.dtype}: "
                "run `stages prepare-backbones`"
            )
    kind = wanted.get("language_model_quantization", "none") if wanted else None
    if kind not in (None, backbones.language_model.quantization):
        yield (
            f"backbones.language_model_quantization is {kind}, but {manifest} pins "
            f"{backbones.language_model.quantization}: run `stages prepare-backbones`"
        )


def _same(one: str, other: str) -> bool:
    """Equal names, or paths of one directory, however either is spelt."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def _unlike_store(
    where: Path, array: str, places: Mapping[str, str], model: Backbone, again: str
) -> Iterator[str]:
    """A store against the frozen model that should have made it."""
    if not where.exists():
        return
    store = open_store(where)
    said = store.provenance
    maker = said.get("model", "an unknown model")
    here = {"D": "text_width"}
    unlike = False
    for letter, dimension in places.items():
        there = dict(store.spec.arrays[array].dims)[dimension]
        own = model.widths[here.get(letter, letter)]
        if there != own:
            unlike = True
            yield (
                f"{_WHAT[letter][0]} is {there} in {where} (made with {maker}), but {own} for "
                f"{model.source}: run `{again}`, or name {maker} under backbones.{model.role}"
            )
    if array == "embedding":
        dims = dict(store.spec.arrays["pooled"].dims) if "pooled" in store.spec.arrays else {}
        kept, needed = dims.get("pooled_channel"), model.widths.get("pooled_width")
        if kept != needed:
            unlike = True
            yield (
                f"{_WHAT['D_pooled'][0]} is {kept or 'absent'} in {where} (made with {maker}), "
                f"but {needed or 'absent'} for {model.source}: run `{again}`"
            )
    if not unlike and said.get("weights") not in (None, model.fingerprint):
        yield (
            f"{where} was made with other weights ({maker}, {str(said['weights'])[:12]}) than "
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
                f"{own or 'absent'} for {source}: run `stages train`, or name the {_plain(role)} "
                "they were trained with under "
                f"backbones.{role} and run `stages prepare-backbones`"
            )


def _plain(role: str | Role) -> str:
    return role.replace("_", " ")
