"""A grid of pictures of held-out captions while training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from gill.loading import load_encoder, load_generator
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.backbones import Backbones
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.settings import GenerationSettings
from pipeline.talking.generation import generate_pictures
from pipeline.talking.reading import read_contexts
from stages.picture_grid import picture_grid

_COLUMNS = 4


class ValidationPictures:
    """Draws the same captions from the same seeds whenever it is asked; changes no weight, and no
    random number that training uses."""

    def __init__(
        self,
        model: MultimodalLanguageModel,
        backbones: Backbones,
        captions: Sequence[str],
        settings: GenerationSettings,
    ) -> None:
        self._model, self._captions, self._settings = model, list(captions), settings
        device = model.language_model.device
        self._encoder = load_encoder(backbones, device)
        self._generator = load_generator(backbones, device)
        generator = backbones.image_generator
        conditioner = load_text_conditioner(
            generator.path, dtype=generator.torch_dtype, device=device
        )
        self._empty = conditioner.unconditional()

    @torch.no_grad()
    def draw(self) -> Image.Image:
        """One picture of four columns."""
        heads = self._model.heads
        training = heads.training
        heads.eval()
        try:
            with torch.random.fork_rng():
                hidden = read_contexts(self._model, self._encoder, [[c] for c in self._captions])
                made = generate_pictures(
                    self._generator,
                    self._model.conditioning(hidden),
                    self._empty,
                    self._settings,
                    seed=0,
                )
        finally:
            heads.train(training)
        return picture_grid(made, _COLUMNS)
