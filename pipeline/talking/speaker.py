"""Everything that answering needs, loaded once: what `Gill` is made of, and conversations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from pipeline.bridge.heads import Heads
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.text_conditioner import Conditioning, TextConditioner
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import ConversationError, Part
from pipeline.talking.decision import DecisionModel
from pipeline.talking.retrieval import RetrievalIndex


@dataclass(eq=False)
class Speaker:
    """The frozen models, the trained heads, and what decides between them.

    `index` and `decision` may be absent: without an index every picture is generated, without a
    decision model `auto` generates. `generator` may be absent too; then pictures are retrieved.
    `conditioner` gives the generator's text side, which only negative prompts need; it is called
    when the first one comes and must keep what it loaded.
    """

    model: MultimodalLanguageModel
    encoder: VisualEncoder
    generator: ImageGenerator | None
    empty_prompt: Conditioning
    index: RetrievalIndex | None
    decision: DecisionModel | None
    open_picture: Callable[[str], Image.Image]
    conditioner: Callable[[], TextConditioner] | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    @property
    def language_model(self) -> LanguageModel:
        """The frozen language model."""
        return self.model.language_model

    @property
    def heads(self) -> Heads:
        """The trained parts."""
        return self.model.heads

    @torch.no_grad()
    def embed(
        self, parts: Sequence[Part], *, after_text: bool = False
    ) -> list[tuple[Int64[Tensor, " n"] | None, Float[Tensor, "n e"]]]:
        """Per part its ids (None for a picture) and its input vectors; k of them per picture.

        A text that follows a text is set off by one space, as captions of one story are in
        training; beside pictures none is added.

        Raises ConversationError for a part that is neither text nor picture.
        """
        model = self.language_model
        embedded: list[tuple[Tensor | None, Tensor]] = []
        for number, part in enumerate(parts, 1):
            if isinstance(part, str):
                spaced = f" {part}" if after_text and part and not part[0].isspace() else part
                ids = model.tokenizer(spaced, add_special_tokens=False)["input_ids"]
                tokens = torch.tensor(ids, dtype=torch.int64)
                embedded.append((tokens, model.embed(tokens)))
                after_text = not part[-1].isspace() if part else after_text
            elif isinstance(part, Image.Image):
                pooled = self.encoder.encode_pictures([part]).to(model.device, torch.float32)
                embedded.append((None, self.model.visual_prefix(pooled)[0]))
                after_text = False
            else:
                raise ConversationError(
                    f"part {number} of the turn is a {type(part).__name__}; give text (str) or a "
                    "picture (PIL.Image.Image)"
                )
        return embedded

    @torch.no_grad()
    def start(self) -> Float[Tensor, "n e"]:
        """What every text begins with; nothing for some language models."""
        model = self.language_model
        return model.embed(torch.tensor(model.start_ids, dtype=torch.int64))
