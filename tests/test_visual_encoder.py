"""The visual encoder gives the vector before CLIP's projection."""

import pytest
import tiny_models
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipeline.backbones import BackboneError
from pipeline.visual_encoder import load_visual_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_visual_encoder(
        f"local-dir:{tiny_models.visual_encoder(tmp_path_factory.mktemp('v'))}"
    )


def _as_transformers(visual, *, heads: int, activation: str) -> CLIPVisionModel:
    """The same weights in transformers' CLIPVisionModel."""
    width = visual.conv1.weight.shape[0]
    layers = len(visual.transformer.resblocks)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=visual.transformer.resblocks[0].mlp.c_fc.out_features,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=visual.image_size[0],
            patch_size=visual.conv1.kernel_size[0],
            hidden_act=activation,
        )
    ).eval()
    source = visual.state_dict()
    target = {
        name.removeprefix("vision_model."): tensor for name, tensor in model.named_parameters()
    }

    def put(name, tensor):
        with torch.no_grad():
            target[name].copy_(tensor)

    put("embeddings.class_embedding", source["class_embedding"])
    put("embeddings.patch_embedding.weight", source["conv1.weight"])
    put("embeddings.position_embedding.weight", source["positional_embedding"])
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for part in ("weight", "bias"):
            put(f"{theirs}.{part}", source[f"{ours}.{part}"])
    for i in range(layers):
        a, b = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for part in ("weight", "bias"):
            qkv = source[f"{a}.attn.in_proj_{part}"].chunk(3)
            for name, tensor in zip("qkv", qkv):
                put(f"{b}.self_attn.{name}_proj.{part}", tensor)
            for ours, theirs in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                put(f"{b}.{theirs}.{part}", source[f"{a}.{ours}.{part}"])
    return model


def test_pooled_equals_transformers_pooler_output(encoder):
    reference = _as_transformers(encoder.model.visual, heads=2, activation="gelu")
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = reference(pixel_values=pixels).pooler_output
    assert encoder.width == 32
    torch.testing.assert_close(encoder.pooled(pixels), expected, atol=1e-5, rtol=0)


def test_projection_is_open_clips_own(encoder, tmp_path):
    import open_clip

    folder = tiny_models.visual_encoder(tmp_path)
    whole, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = Image.effect_noise((20, 30), 90).convert("RGB")
    with torch.no_grad():
        expected = whole.eval().encode_image(preprocess(picture)[None], normalize=True)
    torch.testing.assert_close(encoder.project(encoder.encode_pictures([picture])), expected)


def test_openai_weights_need_quickgelu():
    with pytest.raises(BackboneError, match="ViT-L-14-quickgelu:openai"):
        load_visual_encoder("ViT-L-14:openai")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(BackboneError, match="nowhere"):
        load_visual_encoder(f"local-dir:{tmp_path}/nowhere")
