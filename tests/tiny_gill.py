"""A Gill on the shipped tiny backbones, with untrained heads and five pictures to retrieve."""

import functools

import pyarrow as pa
import torch
from PIL import Image

from gill.loading import Gill
from miniature.backbones import SHIPPED
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.image_generator import load_image_generator
from pipeline.frozen.language_model import LanguageModel, load_language_model
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.frozen.visual_encoder import load_visual_encoder
from pipeline.settings import GenerationSettings, IndexSettings, MapperSizes
from pipeline.talking.retrieval import build_index

R, K = 3, 2
COLORS = ["red", "blue", "green", "white", "black"]
FEW = GenerationSettings(steps=3, guidance=2.5, batch_size=4)


def tiny_gill(
    language_model: LanguageModel | None = None,
    *,
    generator: str = str(SHIPPED.image_generator),
) -> Gill:
    """Everything that answering needs, by default the built-in models; pictures take 3 steps."""
    language_model = language_model or load_language_model(SHIPPED.language_model)
    encoder = load_visual_encoder(f"local-dir:{SHIPPED.visual_encoder}")
    conditioner = load_text_conditioner(generator)
    torch.manual_seed(0)
    sizes = HeadSizes(
        d=encoder.width,
        e=language_model.width,
        k=K,
        r=R,
        L=conditioner.length,
        D=conditioner.width,
        D_pooled=conditioner.pooled_width,
        m=16,
        p=8,
        mapper=MapperSizes(encoder_layers=1, decoder_layers=1),
    )
    model = MultimodalLanguageModel(language_model, Heads(sizes).eval())
    keys = model.image_key(torch.randn(5, encoder.width)).detach()
    table = pa.table({"row": range(5), "image": [f"{c}.png" for c in COLORS], "caption": COLORS})
    return Gill(
        model=model,
        encoder=encoder,
        generator=load_image_generator(generator),
        empty_prompt=conditioner.unconditional(),
        index=build_index(
            [(torch.arange(5), keys)], IndexSettings(), heads="h", features="f", candidates=table
        ),
        decision=None,
        open_picture=lambda name: Image.new("RGB", (8, 8), name.removesuffix(".png")),
        conditioner=functools.cache(lambda: conditioner),
        generation=FEW,
    )
