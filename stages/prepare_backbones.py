"""Stage prepare-backbones: find the frozen models and pin them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from doctor.model_files import check_files, naming
from doctor.weights import check_weights
from gill.artifacts import ARTIFACTS, INPUTS
from gill.converted import have_converted
from miniature import backbones as miniature_backbones
from pipeline.devices import pick_device, quieten_libraries
from pipeline.frozen.backbones import Backbone, Backbones, Quantization, Role
from pipeline.frozen.gguf_files import names_gguf
from pipeline.frozen.image_generator import declares_safety_checker
from pipeline.frozen.language_model import check_language_model
from pipeline.frozen.pinning import check_widths, resolve_backbone, resolve_dtype
from pipeline.frozen.quantization import require_quantization
from settings.params import MINIATURE, Params
from workfolder import WorkFolder, bring_from_repository, watch_files


def run(params: Params, *, retrain: bool = False) -> None:
    """Pin what `backbones` names in the manifest; `retrain` makes the miniature's anew first."""
    quieten_libraries()
    wanted = params.backbones
    sources: dict[Role, str] = {role: getattr(wanted, role) for role in get_args(Role)}
    bring_from_repository(sources.values())
    if retrain:
        folder = WorkFolder.open(params.run.work).root / "backbones"
        from miniature.recipe import train_backbones  # slow to import, and seldom needed

        trained = train_backbones(folder, report=print)
        sources = {
            role: str(getattr(trained, role)) if source == MINIATURE else source
            for role, source in sources.items()
        }
    if wanted.language_model_quantization != "none":
        require_quantization(wanted.language_model_quantization)
    device = pick_device(params.run.device).type
    found = {role: _pinned(role, source, params, device) for role, source in sources.items()}
    check_widths(Backbones(**found))
    for role, backbone in found.items():
        # Tests prove those that are built in, in plain turns.
        if sources[role] != MINIATURE or backbone.chat is not None:
            _check(role, backbone)
    # The manifest says what the params say, not where this machine keeps it.
    Backbones(**{role: b.model_copy(update={"path": b.source}) for role, b in found.items()}).write(
        ARTIFACTS.backbones
    )
    local = {role: Path(s) for role, s in sources.items() if Path(s).exists() and s != MINIATURE}
    for note in watch_files(INPUTS / "backbones", {str(r): p for r, p in local.items()}):
        print(note)
    for backbone in found.values():
        widths = ", ".join(f"{name} {value}" for name, value in backbone.widths.items())
        how = backbone.dtype if backbone.quantization == "none" else backbone.quantization
        if backbone.gguf is not None:
            widths += f"; from {backbone.gguf.quantization}"
        print(f"{backbone.role}: {backbone.source} ({widths}; {how}) {backbone.fingerprint[:12]}")


def _check(role: Role, backbone: Backbone) -> None:
    """Refuse what would fail in a later stage. Raises BackboneError."""
    with naming(role, backbone.source):
        if role == "language_model":
            check_language_model(backbone.path, backbone.chat)
        check_weights(role, Path(backbone.path.removeprefix("local-dir:")))


def _pinned(role: Role, source: str, params: Params, device: str) -> Backbone:
    wanted = params.backbones
    where = str(getattr(miniature_backbones.SHIPPED, role)) if source == MINIATURE else source
    quantization: Quantization = (
        wanted.language_model_quantization if role == "language_model" else "none"
    )
    with naming(role, source):
        if role == "language_model" and names_gguf(source):
            where = str(have_converted(source, WorkFolder.open(params.run.work)))
        if Path(where).is_dir():
            check_files(role, Path(where))
        pinned = resolve_backbone(
            role,
            where,
            revision=getattr(wanted, f"{role}_revision"),
            allow_download=wanted.allow_download,
            dtype=resolve_dtype(getattr(wanted, f"{role}_dtype"), device),
            quantization=quantization,
            chat=params.model.chat if role == "language_model" else None,
        )
    named = {"source": source}
    if role != "image_generator":
        return pinned.model_copy(update=named)
    # Asked only where it is wanted: where it is declared and absent, that is an error.
    checked = declares_safety_checker(pinned.path) if wanted.safety_checker else False
    guards = {"safety_checker": checked or None, "watermark": wanted.watermark}
    return pinned.model_copy(update=named | guards)
