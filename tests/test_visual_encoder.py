"""The visual encoder gives the vector before CLIP's projection."""

import json
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from open_clip import image_transform
from PIL import Image
from torchvision.transforms import Compose
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from corpora.pictures import open_picture
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.pinning import resolve_backbone
from pipeline.frozen.visual_encoder import (
    VisualEncoder,
    load_visual_encoder,
    repository_of_tag,
    untrained_visual_encoder,
)


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


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_activation_is_the_configurations(tmp_path, quick_gelu):
    """OpenAI's weights want QuickGELU: the other activation is another model."""
    folder = tiny_models.visual_encoder(tmp_path, quick_gelu=quick_gelu)
    encoder = load_visual_encoder(f"local-dir:{folder}")
    pixels = 3 * torch.randn(2, 3, 16, 16)
    found = {}
    for activation in ("quick_gelu", "gelu"):
        reference = _as_transformers(encoder.model.visual, heads=2, activation=activation)
        with torch.no_grad():
            error = encoder.pooled(pixels) - reference(pixel_values=pixels).pooler_output
        found[activation] = float(error.abs().max())
    right, wrong = ("quick_gelu", "gelu") if quick_gelu else ("gelu", "quick_gelu")
    assert found[right] <= 1e-5 < 1e-3 < found[wrong]


def test_the_papers_encoder_gives_1024_numbers_as_transformers_does(tmp_path):
    """ViT-L-14-quickgelu as open_clip configures it, less 22 of its 24 layers of equal shape."""
    import open_clip

    whole = untrained_visual_encoder("ViT-L-14-quickgelu:openai")
    assert (whole.width, whole.image_size) == (1024, (224, 224))
    assert len(whole.model.visual.transformer.resblocks) == 24
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"]["layers"] = 2
    config["text_cfg"] |= {"width": 8, "heads": 2, "layers": 1}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    encoder = VisualEncoder(model, image_transform(224, is_train=False), None)
    reference = _as_transformers(model.visual, heads=16, activation="quick_gelu")
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = reference(pixel_values=pixels).pooler_output
    assert expected.shape == (1, 1024)
    torch.testing.assert_close(encoder.pooled(pixels), expected, atol=1e-5, rtol=0)


def test_siglips_pooled_vector_is_its_attention_pools_output(tmp_path):
    encoder = load_visual_encoder(f"local-dir:{tiny_models.siglip(tmp_path)}")
    trunk = encoder.model.visual.trunk
    reference = _siglip_as_transformers(trunk)
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = reference(pixel_values=pixels).pooler_output
        whole = encoder.model.encode_image(pixels, normalize=True)
    assert encoder.width == 24
    torch.testing.assert_close(encoder.pooled(pixels), expected, atol=1e-5, rtol=0)
    # SigLIP has no projection: its joint space is the pooled vector, normalised.
    torch.testing.assert_close(encoder.project(encoder.pooled(pixels)), whole)
    assert resolve_backbone("visual_encoder", str(tmp_path)).widths == {"d": 24}
    assert untrained_visual_encoder("ViT-B-16-SigLIP:webli").width == 768


def _siglip_as_transformers(trunk) -> SiglipVisionModel:
    """The same weights in transformers' SiglipVisionModel."""
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=trunk.embed_dim,
            intermediate_size=4 * trunk.embed_dim,
            num_hidden_layers=len(trunk.blocks),
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    ).eval()
    source = trunk.state_dict()
    put = {
        "embeddings.patch_embedding.weight": source["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": source["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": source["pos_embed"][0],
        "head.probe": source["attn_pool.latent"],
        "head.attention.in_proj_weight": torch.cat(
            [source["attn_pool.q.weight"], source["attn_pool.kv.weight"]]
        ),
        "head.attention.in_proj_bias": torch.cat(
            [source["attn_pool.q.bias"], source["attn_pool.kv.bias"]]
        ),
    }
    for part in ("weight", "bias"):
        put[f"post_layernorm.{part}"] = source[f"norm.{part}"]
        put[f"head.attention.out_proj.{part}"] = source[f"attn_pool.proj.{part}"]
        put[f"head.layernorm.{part}"] = source[f"attn_pool.norm.{part}"]
        for layer in ("fc1", "fc2"):
            put[f"head.mlp.{layer}.{part}"] = source[f"attn_pool.mlp.{layer}.{part}"]
        for i in range(len(trunk.blocks)):
            a, b = f"blocks.{i}", f"encoder.layers.{i}"
            for name, tensor in zip("qkv", source[f"{a}.attn.qkv.{part}"].chunk(3)):
                put[f"{b}.self_attn.{name}_proj.{part}"] = tensor
            put[f"{b}.self_attn.out_proj.{part}"] = source[f"{a}.attn.proj.{part}"]
            put[f"{b}.mlp.fc1.{part}"] = source[f"{a}.mlp.fc1.{part}"]
            put[f"{b}.mlp.fc2.{part}"] = source[f"{a}.mlp.fc2.{part}"]
            put[f"{b}.layer_norm1.{part}"] = source[f"{a}.norm1.{part}"]
            put[f"{b}.layer_norm2.{part}"] = source[f"{a}.norm2.{part}"]
    own = {name.removeprefix("vision_model."): p for name, p in model.named_parameters()}
    assert own.keys() == put.keys()
    with torch.no_grad():
        for name, tensor in put.items():
            own[name].copy_(tensor)
    return model


def test_a_tag_is_a_repository_of_the_hub_and_is_not_fetched_unasked():
    assert (
        repository_of_tag("ViT-L-14-quickgelu:openai") == "timm/vit_large_patch14_clip_224.openai"
    )
    assert repository_of_tag("ViT-B-16-SigLIP:webli") == "timm/ViT-B-16-SigLIP"
    with pytest.raises(BackboneError, match="allow_download: true"):
        resolve_backbone("visual_encoder", "ViT-L-14-quickgelu:openai")
    with pytest.raises(BackboneError, match="knows no weights ViT-L-14:nobody; tags of ViT-L-14: "):
        repository_of_tag("ViT-L-14:nobody")


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


def test_photographs_are_seen_through_open_clip_s_own_transform(encoder, shared_data):
    photographs = [
        open_picture(path)
        for pattern in ("coco_mini_train/**/*.jpg", "robust_images/exif*/*.jpg")
        for path in sorted(shared_data.glob(pattern))[:25]
    ]
    assert len(photographs) > 20
    transform = image_transform(encoder.image_size, is_train=False)
    for photograph in photographs:
        pixels = encoder.normalise(encoder.preprocess(photograph)[None])[0]
        assert torch.equal(pixels, transform(photograph))


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000), (32_000, 1000), (1000, 32_000)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_no_shape_of_a_picture_takes_much_memory(size, mode):
    """The transform alone makes 900 MB of 1,000,000 x 1 pixels for an encoder of 224."""
    transform = Compose(image_transform(224, is_train=False, resize_mode=mode).transforms[:-2])
    encoder = VisualEncoder.__new__(VisualEncoder)
    encoder._transform, encoder.image_size = transform, (224, 224)
    picture = Image.new("RGB", size, "red")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _peak_bytes()
    pixels = encoder.preprocess(picture)
    # Half as wide and high, the longest part of 32,000 x 1000 is 16 MB; the rest is the transform.
    assert _peak_bytes() - before < 32e6
    red = torch.tensor([255, 0, 0]).view(3, 1, 1)
    assert (pixels.int() - red).abs().max() < 5


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1000
