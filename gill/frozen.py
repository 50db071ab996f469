"""The frozen models of a run as they lie on this machine, compared with what was pinned."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from gill.artifacts import Artifacts
from gill.converted import converted_before
from miniature.backbones import SHIPPED
from pipeline.frozen.backbones import Backbone, BackboneError, Backbones
from pipeline.frozen.pinning import find_backbone, fingerprint_backbone
from settings.params import MINIATURE, read_unchecked
from workfolder import WorkFolder


def read_backbones(artifacts: Artifacts) -> Backbones:
    """The pinned models, each `path` where this machine has it.

    The manifest names what the params file named, so that it means the same everywhere: a built-in
    model, a directory (from the working directory, or beside the artifacts), or a hub id, which is
    looked up in the hub's cache on this machine. Weights are hashed when they are first seen here.

    Raises BackboneError where a model is missing, or other weights than the pinned ones lie there.
    """
    return locate_backbones(artifacts.backbones, artifacts.common.parent)


def locate_backbones(manifest: Path, beside: Path) -> Backbones:
    """The models of a manifest; relative directories may lie below `beside`."""
    pinned = Backbones.read(manifest)
    seen = _Seen(manifest.with_name("checked.json"))
    found = {}
    for role in Backbones.model_fields:
        backbone: Backbone = getattr(pinned, role)
        folder = folder_of(backbone, beside)
        seen.check(backbone, folder)
        prefix = "local-dir:" if role == "visual_encoder" else ""
        found[role] = backbone.model_copy(update={"path": f"{prefix}{folder}"})
    return Backbones(**found)


def folder_of(backbone: Backbone, beside: Path) -> Path:
    """The directory of a pinned model on this machine."""
    if backbone.source == MINIATURE:
        return getattr(SHIPPED, backbone.role)
    if backbone.gguf is not None:
        return converted_before(backbone.source, backbone.gguf, work_of(beside))
    for folder in (Path(backbone.source), beside / backbone.source):
        if folder.is_dir():
            return folder
    return find_backbone(backbone.role, backbone.source, revision=backbone.revision)[0]


def work_of(beside: Path) -> WorkFolder:
    """The work folder of the workspace whose params.yaml lies in `beside`, where there is one."""
    params = beside / "params.yaml"
    run = read_unchecked(params).get("run") if params.is_file() else None
    return WorkFolder.open((run or {}).get("work"), beside)


class _Seen:
    """Which directories were hashed before, by names, sizes and times of change of their files."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self._known = {}

    def check(self, backbone: Backbone, folder: Path) -> None:
        state = _state(backbone, folder)
        if self._known.get(state) == backbone.fingerprint:
            return
        here = fingerprint_backbone(backbone.role, folder, backbone.quantization, backbone.chat)
        if here != backbone.fingerprint:
            raise BackboneError(
                f"{backbone.role} {backbone.source}: the weights here ({here[:12]}) are not the "
                f"pinned ones ({backbone.fingerprint[:12]}): run `stages prepare-backbones` to use "
                "these, or put back those that the rest was made with"
            )
        self._known[state] = here
        with contextlib.suppress(OSError):  # a read-only folder: hashed again next time
            self._file.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")


def _state(backbone: Backbone, folder: Path) -> str:
    total = hashlib.sha256(f"{backbone.quantization} {folder.resolve()}\n".encode())
    if backbone.chat is not None:
        total.update(backbone.chat.model_dump_json().encode())
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        status = path.stat()
        total.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:32]
