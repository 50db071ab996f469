"""A trained GILL as a pipeline of diffusers: interleaved text and pictures in, pictures out.

>>> pipe = DiffusionPipeline.from_pretrained(
...     GENERATOR, custom_pipeline="my-gill", gill="my-gill", trust_remote_code=True
... )
>>> pipe(["a red ring.", picture, "it turns blue."], generator=torch.Generator().manual_seed(7))

The pipeline is the frozen generator's own, but for what it reads: GILL's conditioning stands where
its text encoder's would. Schedulers, LoRAs, callbacks and offloading are therefore diffusers' own.
`my-gill` is a folder of `save_pretrained`, or its repository; `pipeline.py` in it names the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from gill.hub import find_folder, load_trained, resolve_backbones
from gill.loading import load_encoder
from gill_errors import GillError
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.devices import pick_device
from pipeline.frozen.language_model import load_language_model
from pipeline.frozen.provenance import Provenance, mark_generated
from pipeline.talking.answers import Part
from pipeline.talking.reading import parts_of, read_contexts

Context = Sequence[Part] | Part
"""One picture's text and pictures, in the order they are read."""


class _ReadsContexts:
    """What the pipelines below have in common; mixed in before a pipeline of diffusers."""

    def __init__(
        self, *args: Any, gill: str = "", gill_backbones: dict[str, str] | None = None, **parts: Any
    ) -> None:
        super().__init__(*args, **parts)
        self._gill, self._gill_backbones = str(gill), dict(gill_backbones or {})
        self._read: tuple[Any, ...] | None = None

    @torch.no_grad()
    def encode_contexts(self, contexts: Sequence[Context]) -> dict[str, torch.Tensor]:
        """`prompt_embeds` [B, L, D], and for XL `pooled_prompt_embeds`: for this pipeline's own
        call, or that of another one on the same generator (ControlNet, inpainting).

        The first call loads the language model and the visual encoder. Raises GillError where the
        trained part is not there or was trained with another generator.
        """
        _, model, encoder = self._load()
        hidden = read_contexts(model, encoder, [parts_of(context) for context in contexts])
        conditioning = model.conditioning(hidden)
        embeds = {"prompt_embeds": conditioning.embedding}
        if conditioning.pooled is not None:
            embeds["pooled_prompt_embeds"] = conditioning.pooled
        return embeds

    @torch.no_grad()
    def __call__(self, contexts: Any, **settings: Any) -> Any:
        """Pictures for one context, or for each of a list of lists.

        `settings` are those of diffusers' own call; steps and guidance are by default those that
        the trained part was saved with.
        """
        if "prompt" in settings or "prompt_embeds" in settings:
            raise GillError("give the text and pictures first: they stand where the prompt would")
        many = isinstance(contexts, list | tuple) and any(
            isinstance(one, list | tuple) for one in contexts
        )
        embeds = self.encode_contexts(contexts if many else [contexts])
        generation = self._load()[0].generation
        how = {"num_inference_steps": generation.steps, "guidance_scale": generation.guidance}
        how |= settings
        made = super().__call__(**embeds, **how)  # type: ignore[misc]
        pictures = made[0] if isinstance(made, tuple) else made.images
        given = how.get("generator")
        generators = given if isinstance(given, list) else [given] * len(pictures)
        for picture, generator in zip(pictures, generators):
            if isinstance(picture, Image.Image) and generator is not None:
                scheduler = type(self.scheduler).__name__  # type: ignore[attr-defined]
                steps, guidance = how["num_inference_steps"], how["guidance_scale"]
                seed = generator.initial_seed()
                mark_generated(picture, Provenance("gill", seed, steps, guidance, scheduler))
        return made

    def _load(self) -> tuple[Any, ...]:
        """Configuration of the trained part, the model, and the visual encoder."""
        if self._read is None:
            if not self._gill:
                raise GillError("give from_pretrained(..., gill=...): a folder or repository")
            config, heads, _ = load_trained(find_folder(self._gill, None, False))
            generator = self.config._name_or_path  # type: ignore[attr-defined]
            sources = {"image_generator": str(generator), **self._gill_backbones}
            backbones = resolve_backbones(config, sources, local_files_only=False)  # type: ignore[arg-type]
            device = pick_device("auto")
            frozen = backbones.language_model
            language_model = load_language_model(
                frozen.path,
                dtype=frozen.torch_dtype,
                device=device,
                quantization=frozen.quantization,
                chat=frozen.chat,
            )
            model = MultimodalLanguageModel(language_model, heads.to(device).eval())
            self._read = config, model, load_encoder(backbones, device)
        return self._read


def _with_signature_of(kind: type) -> inspect.Signature:
    """The constructor's, as diffusers reads it: the parts of the pipeline, and ours."""
    theirs = inspect.signature(vars(kind)["__init__"])
    ours = [
        inspect.Parameter("gill", inspect.Parameter.KEYWORD_ONLY, default="", annotation=str),
        inspect.Parameter(
            "gill_backbones", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=dict
        ),
    ]
    return theirs.replace(parameters=[*theirs.parameters.values(), *ours])


class GillPipeline(_ReadsContexts, StableDiffusionPipeline):
    """On Stable Diffusion 1.x and 2.x."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)

    __init__.__signature__ = _with_signature_of(StableDiffusionPipeline)  # type: ignore[attr-defined]


class GillXLPipeline(_ReadsContexts, StableDiffusionXLPipeline):
    """On Stable Diffusion XL."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)

    __init__.__signature__ = _with_signature_of(StableDiffusionXLPipeline)  # type: ignore[attr-defined]
