"""Everything that answering needs, loaded once: what `Gill` is made of, and conversations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from pipeline.bridge.heads import Heads
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.text_conditioner import TextConditioner
from pipeline.frozen.visual_encoder import VisualEncoder
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import IN_TURNS, ReplySettings, SeenPart
from pipeline.talking.decision import DecisionModel
from pipeline.talking.reading import Embedded, embed_contexts
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

    @property
    def reply_settings(self) -> ReplySettings:
        """How a turn is answered where nobody says otherwise."""
        return ReplySettings() if self.language_model.turns is None else IN_TURNS

    def embed(self, parts: Sequence[SeenPart], *, after_text: bool = False) -> list[Embedded]:
        """Parts as a language model reads them that continues texts; see `embed_contexts`."""
        return embed_contexts(self.model, self.encoder, [parts], after_text=after_text)[0]

    @torch.no_grad()
    def start(self) -> Float[Tensor, "n e"]:
        """What every text begins with; nothing for some language models."""
        model = self.language_model
        return model.embed(torch.tensor(model.start_ids, dtype=torch.int64))
