"""Which frozen models are used, pinned: where they lie, their exact revision, widths, fingerprint.

Caches, checkpoints and indexes carry the fingerprints, so that numbers computed with one model
are never mixed with another's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, JsonValue

from gill_errors import InputError
from gill_records import Record

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]
Role = Literal["language_model", "visual_encoder", "image_generator"]


class BackboneError(InputError):
    """A frozen model that cannot be found, loaded or used; the message says what to do."""


class ChatSettings(Record):
    """How a language model's chat template is used."""

    system_prompt: str | None = Field(None, description="None: the template's own, if it has one")
    template_options: dict[str, JsonValue] = Field(
        {}, description="what the template takes besides messages, for example enable_thinking"
    )


class GgufOrigin(Record):
    """The GGUF file that a language model was converted from."""

    sha256: str = Field(description="of the file")
    architecture: str
    quantization: str = Field(description="of most of its weights, as llama.cpp names it")
    licence: str | None = None


class Backbone(Record):
    """One frozen model, pinned."""

    role: Role
    source: str = Field(
        description="what the parameters named: a directory, hub id or built-in tag"
    )
    path: str = Field(description="what the loader takes")
    revision: str | None = Field(description="the hub's commit; None for local files")
    fingerprint: str = Field(
        description="SHA-256 over the names and bytes of the model's files, or `gguf:` and that "
        "of the one it was converted from; `int8:` or `nf4:` before it for a quantised model, "
        "`chat:` for one that reads and answers in turns: their numbers are others"
    )
    dtype: Dtype = Field("float32", description="what the model computes in")
    quantization: Quantization = Field("none", description="how its linear weights are kept")
    widths: dict[str, int] = Field(description="sizes read from the model's own configuration")

    safety_checker: bool | None = Field(
        None,
        description="whether an image generator's own is used; None: it has none, or is none",
    )
    watermark: bool = Field(False, description="whether its pictures get an invisible one")
    gguf: GgufOrigin | None = Field(None, description="the file that it was converted from")
    chat: ChatSettings | None = Field(
        None, description="how a language model's turns are written; None: it continues texts"
    )

    @property
    def public_source(self) -> str | None:
        """Its hub id, open_clip tag or built-in name; None for a directory of this machine."""
        built_in = self.role == "visual_encoder" and not self.path.startswith("local-dir:")
        named = self.revision is not None or built_in or self.source == "miniature"
        named |= self.source.startswith("package:")
        return self.source if named else None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        import torch  # a manifest is compared with the params without it

        return getattr(torch, self.dtype)


class Backbones(Record):
    """The three frozen models of one run, as written to the manifest."""

    language_model: Backbone
    visual_encoder: Backbone
    image_generator: Backbone

    @property
    def fingerprints(self) -> dict[str, str]:
        """Role -> fingerprint, as checkpoints carry them."""
        return {role: getattr(self, role).fingerprint for role in type(self).model_fields}

    @property
    def widths(self) -> dict[str, int | None]:
        """d, e, L, D and D_pooled as the frozen models have them; D_pooled None: there is none."""
        generator = self.image_generator.widths
        return {
            "d": self.visual_encoder.widths["d"],
            "e": self.language_model.widths["e"],
            "L": generator["L"],
            "D": generator["text_width"],
            "D_pooled": generator.get("pooled_width"),
        }

    @classmethod
    def read(cls, path: str | Path) -> Backbones:
        """Read the manifest. Raises BackboneError when it is absent or not one."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise BackboneError(f"{path} is missing: run `stages prepare-backbones`") from None
        except ValueError as error:
            raise BackboneError(f"{path} is not a backbone manifest: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write the manifest as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
