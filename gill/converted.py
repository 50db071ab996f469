"""Language models of GGUF files, converted once, in the work folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from gill_files import hash_of
from pipeline.frozen.backbones import BackboneError, GgufOrigin
from pipeline.frozen.gguf_files import convert_gguf, find_gguf, read_origin
from workfolder import Entry, WorkFolder


def have_converted(source: str, work: WorkFolder) -> Path:
    """The folder of the model that `FILE.gguf` or `package:NAME` names, converted where it is not.

    Raises BackboneError where there is no such file, or it cannot be read.
    """
    file = find_gguf(source, work.workspace)
    origin = read_origin(file)
    entry = _entry(work, origin.sha256)
    model = entry.folder / "model"

    def convert() -> None:
        print(f"converting {file.name} ({origin.quantization}) once, into {model}")
        shutil.rmtree(model, ignore_errors=True)  # of a run that was killed while converting
        convert_gguf(file, origin, model)

    entry.make_once(["model"], convert)
    work.note_use("prepare-backbones", entry)
    return model


def converted_before(source: str, origin: GgufOrigin, work: WorkFolder) -> Path:
    """The folder of a model that was pinned, converted anew where it is not here.

    Raises BackboneError where neither it nor its very file is here.
    """
    entry = _entry(work, origin.sha256)
    if entry.finished is not None:
        return entry.folder / "model"
    here = hash_of(find_gguf(source, work.workspace))
    if here != origin.sha256:
        raise BackboneError(
            f"language_model {source}: the file here ({here[:12]}) is not the pinned one "
            f"({origin.sha256[:12]}): run `stages prepare-backbones` to use it"
        )
    return have_converted(source, work)


def _entry(work: WorkFolder, sha256: str) -> Entry:
    return work.entry("gguf", {"sha256": sha256})
