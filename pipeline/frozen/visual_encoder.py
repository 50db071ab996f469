"""The frozen visual encoder v_phi: any open_clip model with a vision transformer or a timm trunk.

    picture (PIL, RGB) -> preprocess -> bytes [3, H, W] -> normalise -> pooled [d] -> projected [c]

GILL reads `pooled`: the pooled vector before CLIP's own projection (paper section 3.1; UPSTREAM of
the released code: `CLIPVisionModel.pooler_output`, d = 1024 for ViT-L/14). `projected` and
`encode_text` live in CLIP's joint space and serve CLIP similarity and CLIP retrieval only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from pipeline.devices import sent
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.plain_text import read_control_tokens_as_text

_LONGEST = 16


class VisualEncoder:
    """A frozen open_clip model whose vision tower gives the vector before its projection."""

    def __init__(self, model: nn.Module, preprocess: Compose, tokenizer: Any):
        self.model = model.eval().requires_grad_(False)
        *steps, to_tensor, to_numbers = preprocess.transforms
        if not (isinstance(to_tensor, ToTensor) and isinstance(to_numbers, Normalize)):
            raise BackboneError(
                f"the visual encoder's preprocessing ends in {to_tensor} and {to_numbers}, not in "
                "ToTensor and Normalize, as open_clip's own does"
            )
        self._transform = Compose(steps)
        self._mean, self._std = to_numbers.mean, to_numbers.std
        self._tokenizer = tokenizer
        visual = cast(Any, model).visual
        if isinstance(getattr(visual, "proj", None), nn.Parameter):
            # open_clip's transformer returns the pooled vector as it is when it has no projection;
            # the matrix is kept for CLIP similarity.
            self._projection: Tensor | None = visual.proj.detach()
            visual.proj = None
            self._trunk, self._head = visual, nn.Identity()
        elif hasattr(visual, "trunk") and hasattr(visual, "head"):
            self._projection, self._trunk, self._head = None, visual.trunk, visual.head
        else:
            raise BackboneError(
                f"visual encoder {type(visual).__name__} has no pooled vector apart from its "
                "projection; use a model with a vision transformer or a timm trunk"
            )
        size = visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        reference = next(model.parameters())
        self.dtype, self.device = reference.dtype, reference.device
        with torch.no_grad():
            # The width d as it comes out, whatever the configuration calls it.
            blank = torch.zeros(1, 3, *self.image_size, dtype=self.dtype, device=self.device)
            self.width = int(self.pooled(blank).shape[-1])

    def preprocess(self, picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
        """Resize and crop one RGB picture as the encoder was trained; on the CPU, as bytes: a
        quarter of what `normalise` makes of them.

        Of a picture longer than 16 times its shorter side the middle is seen: the transform scales
        the shorter side first, and would make gigabytes of a picture of 1,000,000 x 1 pixels.
        """
        seen = self._transform(_middle(picture, 2 * max(self.image_size)))
        return pil_to_tensor(seen).contiguous()

    def normalise(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels as the encoder was trained on them: float32, on the device that they are on.

        The steps of ToTensor and Normalize, one for one.
        """
        mean, std = (
            torch.tensor(numbers, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
            for numbers in (self._mean, self._std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std)

    @torch.no_grad()
    def pooled(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B d"]:
        """v_phi(x): the pooled vector before the projection, in the encoder's dtype."""
        vectors = self._trunk(pixels.to(self.device, self.dtype))
        # Some towers give (pooled, patch tokens).
        return vectors[0] if isinstance(vectors, tuple) else vectors

    @torch.no_grad()
    def project(self, pooled: Float[Tensor, "B d"]) -> Float[Tensor, "B c"]:
        """Unit vectors in CLIP's joint space from pooled vectors."""
        pooled = pooled.to(self.device, self.dtype)
        joint = self._head(pooled) if self._projection is None else pooled @ self._projection
        return F.normalize(joint.float(), dim=-1)

    def pooled_of(self, pixels: Sequence[UInt8[Tensor, "3 H W"]]) -> Float[Tensor, "B d"]:
        """`pooled` of pictures that were preprocessed one by one; they are normalised there."""
        return self.pooled(self.normalise(sent(torch.stack(list(pixels)), self.device)))

    def encode_pictures(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "B d"]:
        """Pooled vectors of pictures; the batch is the caller's choice."""
        return self.pooled_of([self.preprocess(picture) for picture in pictures])

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B c"]:
        """Unit text vectors in CLIP's joint space; text past the context length is cut."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        return F.normalize(cast(Any, self.model).encode_text(tokens).float(), dim=-1)


def load_visual_encoder(
    source: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> VisualEncoder:
    """Load an open_clip model.

    `source` is what open_clip takes: `local-dir:PATH` (open_clip_config.json with
    open_clip_model.safetensors), `hf-hub:ORG/NAME`, or `ARCHITECTURE` / `ARCHITECTURE:TAG` for
    built-in ones. OpenAI weights need the `-quickgelu` architecture: `ViT-L-14-quickgelu:openai`.

    Raises BackboneError when open_clip knows no such model or a file is missing.
    """
    name, tag = _name_and_tag(source)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=tag, precision="fp32", device=device
        )
        tokenizer = read_control_tokens_as_text(open_clip.get_tokenizer(name))
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise BackboneError(f"cannot load the visual encoder {source}: {error}") from error
    return VisualEncoder(
        cast(nn.Module, model).to(dtype),
        cast(Compose, preprocess),
        tokenizer,
    )


def untrained_visual_encoder(source: str) -> VisualEncoder:
    """The model that `source` names, as `load_visual_encoder` takes it, on torch's meta device.

    It has sizes and no numbers; nothing is downloaded. Of a directory only the configuration is
    read; the tag of a built-in model is ignored.

    Raises BackboneError when open_clip knows no such architecture or the configuration is missing.
    """
    name, _ = _name_and_tag(source)
    said = logging.getLogger()
    before, said.disabled = said.disabled, True  # open_clip warns that there are no weights
    try:
        with torch.device("meta"):
            model: Any = open_clip.create_model(name, load_weights=False, device="meta")
        preprocess = image_transform_v2(
            PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise BackboneError(f"open_clip cannot make {source}: {error}") from error
    finally:
        said.disabled = before
    return VisualEncoder(model, cast(Compose, preprocess), None)


def repository_of_tag(source: str) -> str:
    """The hub repository that holds the weights of a built-in `ARCHITECTURE:TAG`.

    Raises BackboneError when open_clip knows no such tag, or gets its weights from elsewhere.
    """
    name, tag = _name_and_tag(source)
    known = open_clip.get_pretrained_cfg(name, tag or "")
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise BackboneError(
            f"open_clip knows no weights {source}; "
            + (f"tags of {name}: {', '.join(tags)}" if tags else f"it knows no {name}")
        )
    repository, _, file = str(known.get("hf_hub") or "").rpartition("/")
    if not repository or file:
        raise BackboneError(
            f"{source}: its weights are no open_clip directory on the hub: save them as one "
            "(open_clip_config.json, open_clip_model.safetensors) and name the directory"
        )
    return repository


def _middle(picture: Image.Image, enough: int) -> Image.Image:
    """The picture itself, or the part in its middle that is `_LONGEST` times as long as wide.

    That part is made smaller, as long as its shorter side keeps `enough` pixels: no second large
    picture is in memory.
    """
    longest = _LONGEST * min(picture.size)
    if max(picture.size) <= longest:
        return picture
    left, top = ((side - min(side, longest)) // 2 for side in picture.size)
    width, height = (min(side, longest) for side in picture.size)
    factor = max(min(picture.size) // enough, 1)
    return picture.reduce(factor, (left, top, left + width, top + height))


def _name_and_tag(source: str) -> tuple[str, str | None]:
    """`ViT-L-14-quickgelu:openai` -> its two parts; directories and hub ids have no tag."""
    if source.startswith(("local-dir:", "hf-hub:")) or ":" not in source:
        return source, None
    name, tag = source.split(":", 1)
    if tag == "openai" and not name.endswith("-quickgelu"):
        raise BackboneError(
            f"{source}: OpenAI's weights were trained with QuickGELU; use {name}-quickgelu:openai"
        )
    return name, tag
