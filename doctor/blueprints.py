"""Frozen models without their weights: sizes and shapes, on torch's meta device, with no network.

A source (local directory, hub id, open_clip tag) becomes a model of the real class built from its
configuration, wherever that can be had: in the directory, in the hub's local cache, or in
`doctor.known_models`. From such models widths and parameters are counted, and memory is
predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPTextConfig
from transformers.pytorch_utils import Conv1D

from doctor.known_models import HUB_VISUAL_ENCODERS, known_generator, known_language_model
from pipeline.frozen.backbones import BackboneError, Quantization, Role
from pipeline.frozen.gguf_files import find_gguf, names_gguf, read_origin
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.pinning import MODEL_FILE
from pipeline.frozen.quantization import quantize
from pipeline.frozen.visual_encoder import VisualEncoder, untrained_visual_encoder
from pipeline.frozen.widths import read_json, read_widths

Place = Literal["local", "hub cache", "hub"]

# Model types whose tokenizers begin a text with one id; the others add none.
_WITH_START = ("opt", "llama", "mistral", "gemma", "gemma2", "phi3")


@dataclass(frozen=True)
class Found:
    """Where a frozen model's files are, or would come from."""

    source: str
    place: Place
    folder: Path | None
    """Of its configuration; None for what is known by name."""
    has_weights: bool
    gguf: Path | None = None
    """The file, where a language model lies in one."""


@dataclass(frozen=True)
class GeneratorBlueprint:
    """The parts of a latent-diffusion pipeline that compute."""

    unet: Any
    vae: Any
    text_encoders: list[Any]
    length: int
    """L, text positions."""
    text_width: int
    """D, the width of the text encoders' vectors side by side."""
    cross_attention_width: int
    pooled_width: int | None
    """D_pooled, for generators with two text encoders."""
    stored_bytes: int
    """Bytes of the published weights, in the dtype in which they are published."""

    @property
    def latent_size(self) -> int:
        """Width and height of the latents."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def picture_size(self) -> int:
        """Width and height of the pictures, in pixels."""
        return self.latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)


def find(role: Role, source: str, revision: str | None = None) -> Found:
    """Look for a model's files without asking the network.

    Raises BackboneError where `source` is a directory that lacks its configuration.
    """
    if role == "language_model" and names_gguf(source):
        return _find_gguf(source)
    folder = Path(source)
    if folder.is_dir():
        if not (folder / MODEL_FILE[role]).is_file():
            raise BackboneError(f"{role} {source}: {MODEL_FILE[role]} is missing in {folder}")
        return Found(source, "local", folder, _has_weights(folder))
    # ARCHITECTURE:TAG is no repository's name: nothing to look up.
    if role == "visual_encoder" and ":" in source:
        return Found(source, "hub", None, False)
    try:
        # A path, None, or a mark for "known not to exist": only a path will do.
        cached = try_to_load_from_cache(source, MODEL_FILE[role], revision=revision)
    except HFValidationError:
        raise BackboneError(f"{role} {source}: no such directory here, nor a hub id") from None
    if isinstance(cached, str):
        folder = Path(cached).parent
        return Found(source, "hub cache", folder, _has_weights(folder))
    return Found(source, "hub", None, False)


def _find_gguf(source: str) -> Found:
    try:
        file = find_gguf(source)
    except BackboneError:
        if known_language_model(source) is None:
            raise
        return Found(source, "local", None, False)
    read_origin(file)
    return Found(source, "local", None, True, file)


@dataclass(frozen=True)
class LanguageModelBlueprint:
    """A language model's configuration, and what it is to compute in."""

    config: Any
    dtype: torch.dtype
    quantization: Quantization
    parameters: int = 0
    stored_bytes: int = 0
    """Bytes of the published weights, in the dtype in which they are published."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def build(self, num_layers: int | None = None) -> LanguageModel:
        """A new model on the meta device, whole or with fewer layers."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if num_layers is not None:
            text.num_hidden_layers = num_layers
            if getattr(text, "layer_types", None):
                # Otherwise the configuration names more layers than there are, and is refused.
                text.layer_types = text.layer_types[:num_layers]
        with born(self.dtype):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        # int8 is our own layer and works on meta; bitsandbytes packs real numbers only.
        if self.quantization == "int8":
            quantize(model, "int8", "meta")
        elif self.quantization == "nf4":
            _outline_nf4(model)
        return LanguageModel(model, _Tokenizer(text.vocab_size, text.model_type in _WITH_START))


def language_model_blueprint(
    found: Found, dtype: torch.dtype, quantization: Quantization = "none"
) -> LanguageModelBlueprint:
    """The language model's configuration, proved to be one that can be built.

    Raises BackboneError: its configuration is unknown, or it cannot serve and why.
    """
    known = known_language_model(found.source) if found.folder is None else None
    try:
        if found.gguf is not None:
            config = AutoConfig.from_pretrained(found.gguf.parent, gguf_file=found.gguf.name)
        elif found.folder is not None:
            config = AutoConfig.from_pretrained(
                found.folder, local_files_only=True, trust_remote_code=False
            )
        elif known is not None:
            config = AutoConfig.for_model(known.model_type, **known.sizes)
        else:
            raise _unknown("language_model", found)
        config.name_or_path = found.source
        # Parameters are counted unquantised: quantised weights are buffers, and packed.
        plain = LanguageModelBlueprint(config, dtype, "none").build()
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(f"language_model {found.source}: {error}") from error
    stored = getattr(torch, "float16" if known is None else known.stored).itemsize
    parameters = count_parameters(plain.model)
    return LanguageModelBlueprint(config, dtype, quantization, parameters, stored * parameters)


def visual_encoder_blueprint(found: Found, dtype: torch.dtype) -> tuple[VisualEncoder, int]:
    """The visual encoder on the meta device, and the bytes of its published weights (float32).

    Raises BackboneError as `language_model_blueprint`.
    """
    if found.folder is not None:
        source = f"local-dir:{found.folder}"
    elif ":" in found.source:
        source = found.source
    elif found.source in HUB_VISUAL_ENCODERS:
        source = HUB_VISUAL_ENCODERS[found.source]
    else:
        raise _unknown("visual_encoder", found)
    encoder = untrained_visual_encoder(source)
    encoder.model.to(dtype)
    encoder.dtype = dtype
    return encoder, 4 * count_parameters(encoder.model)


def generator_blueprint(found: Found, dtype: torch.dtype) -> GeneratorBlueprint:
    """The image generator's networks on the meta device.

    Raises BackboneError as `language_model_blueprint`, and for a directory that lacks a part.
    """
    stored = 4
    if found.folder is not None:
        length, unet, vae, encoders = _read_generator(found.folder, dtype)
    else:
        known = known_generator(found.source)
        if known is None:
            raise _unknown("image_generator", found)
        length, stored = known.length, getattr(torch, known.stored).itemsize
        # In this order: of XL's two encoders the second has the projection.
        kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        with born(dtype):
            unet = diffusers.UNet2DConditionModel(**known.unet)
            vae = diffusers.AutoencoderKL(**known.vae)
            encoders = [
                kind(CLIPTextConfig(**config)) for kind, config in zip(kinds, known.text_encoders)
            ]
    parts = [unet, vae, *encoders]
    for part in parts:
        part.eval().requires_grad_(False)
    return GeneratorBlueprint(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        length=length,
        text_width=sum(encoder.config.hidden_size for encoder in encoders),
        cross_attention_width=int(unet.config.cross_attention_dim),
        pooled_width=encoders[1].config.projection_dim if len(encoders) == 2 else None,
        stored_bytes=stored * sum(map(count_parameters, parts)),
    )


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _read_generator(folder: Path, dtype: torch.dtype) -> tuple[int, Any, Any, list[Any]]:
    """L, UNet, decoder and text encoders of a pipeline directory, from its configurations."""
    index = read_json(folder / "model_index.json")

    def make(name: str) -> Any:
        library, kind = index[name]
        config = read_json(folder / name / "config.json")
        with born(dtype):
            if library == "diffusers":
                return getattr(diffusers, kind).from_config(config)
            model_class = getattr(transformers, kind)
            return model_class(model_class.config_class(**config))

    length = read_widths("image_generator", folder)["L"]
    try:
        encoders = [make(n) for n in ("text_encoder", "text_encoder_2") if any(index.get(n) or ())]
        return length, make("unet"), make("vae"), encoders
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(f"image_generator {folder}: cannot be built: {error}") from error


@contextmanager
def born(dtype: torch.dtype, device: str = "meta") -> Iterator[None]:
    """Modules that are built inside have their weights on `device`, in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


def _has_weights(folder: Path) -> bool:
    return any(f.suffix in (".safetensors", ".bin") for f in folder.rglob("*"))


def _unknown(role: Role, found: Found) -> BackboneError:
    return BackboneError(
        f"{role} {found.source}: its sizes are unknown here: run `stages prepare-backbones` once "
        "with backbones.allow_download: true, or name a local directory"
    )


def _outline_nf4(model: Any) -> None:
    """Replace the layers that `quantize` would by ones of the same bytes."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head:
                setattr(parent, name, _NF4Outline(layer))


class _NF4Outline(nn.Module):
    """The bytes of a layer in bitsandbytes' nf4, doubly quantised, and of its product.

    4 bits a weight, 8 bits for the scale of each 64 weights, a float32 for each 256 scales. The
    product makes the whole weight in the dtype of its input, and once more in the backward pass.
    """

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        # Conv1D keeps its weight the other way round.
        self.shape = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
        size = layer.weight.numel()
        for name, count, dtype in (
            ("weight", -(-size // 2), torch.uint8),
            ("scales", -(-size // 64), torch.uint8),
            ("scales_of_scales", -(-size // (64 * 256)), torch.float32),
        ):
            self.register_buffer(name, torch.empty(count, dtype=dtype, device="meta"))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return _NF4Product.apply(x, self.shape, self.bias)


class _NF4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, bias: Tensor | None) -> Tensor:
        # Nothing else is kept for the backward pass: packed weights are unpacked once more.
        ctx.shape = shape
        # The whole weight in the dtype of `x` for a moment, as bitsandbytes unpacks it.
        return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None


class _Tokenizer:
    """What a language model asks of its tokenizer when only sizes matter."""

    eos_token_id = 2

    def __init__(self, size: int, with_start: bool) -> None:
        self._size, self._with_start = size, with_start

    def __len__(self) -> int:
        return self._size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2, 5] if add_special_tokens and self._with_start else [5]}
