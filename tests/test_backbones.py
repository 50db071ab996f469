"""Frozen models are pinned by content, and what does not fit is refused by name."""

import json

import pytest
import tiny_models

from pipeline.frozen.backbones import BackboneError, Backbones
from pipeline.frozen.pinning import check_widths, files_to_fetch, resolve_backbone, resolve_dtype


def test_fingerprint_follows_content_not_place(tmp_path):
    first = resolve_backbone("visual_encoder", str(tiny_models.visual_encoder(tmp_path / "a")))
    second = resolve_backbone("visual_encoder", str(tiny_models.visual_encoder(tmp_path / "b")))
    assert first.fingerprint == second.fingerprint
    assert first.path == f"local-dir:{tmp_path / 'a'}"
    assert first.widths == {"d": 32}
    weights = tmp_path / "b" / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    third = resolve_backbone("visual_encoder", str(tmp_path / "b"))
    assert third.fingerprint != first.fingerprint


def test_generator_widths_and_mixed_directories(tmp_path):
    good = resolve_backbone("image_generator", str(tiny_models.stable_diffusion(tmp_path / "g")))
    assert good.widths == {
        "L": 12,
        "text_width": 16,
        "cross_attention_width": 16,
        "picture_size": 16,
    }
    mixed = resolve_backbone(
        "image_generator", str(tiny_models.stable_diffusion(tmp_path / "m", cross=24))
    )
    model = Backbones.model_construct(
        language_model=good, visual_encoder=good, image_generator=mixed
    )
    with pytest.raises(BackboneError, match="width 16.*takes 24"):
        check_widths(model)


def test_sdxl_widths(tmp_path):
    found = resolve_backbone("image_generator", str(tiny_models.stable_diffusion_xl(tmp_path)))
    assert found.widths["text_width"] == 40
    assert found.widths["pooled_width"] == 20


def test_missing_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4, "vocab_size": 8}))
    with pytest.raises(BackboneError, match="no weights"):
        resolve_backbone("language_model", str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(BackboneError, match="config.json is missing"):
        resolve_backbone("language_model", str(tmp_path))


def test_no_download_without_permission():
    with pytest.raises(BackboneError, match="allow_download"):
        resolve_backbone("language_model", "nobody/no-such-model")


def test_manifest_round_trip(tmp_path):
    found = resolve_backbone("visual_encoder", str(tiny_models.visual_encoder(tmp_path / "v")))
    manifest = Backbones.model_construct(
        language_model=found, visual_encoder=found, image_generator=found
    )
    manifest.write(tmp_path / "backbones.json")
    assert Backbones.read(tmp_path / "backbones.json") == manifest
    with pytest.raises(BackboneError, match="prepare-backbones"):
        Backbones.read(tmp_path / "absent.json")


def test_a_quantised_model_has_a_fingerprint_of_its_own(tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "vocab_size": 8}))
    (folder / "model.safetensors").write_bytes(b"weights")
    whole = resolve_backbone("language_model", str(folder))
    small = resolve_backbone("language_model", str(folder), quantization="nf4")
    assert small.fingerprint == f"nf4:{whole.fingerprint}"
    assert (whole.quantization, small.quantization) == ("none", "nf4")


def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch):
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_dtype("float16", "cpu") == "float16"
    for has_it, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, h=has_it: h)
        assert resolve_dtype("auto", "cuda") == expected


def test_a_pipeline_without_unet_is_refused(tmp_path):
    folder = tiny_models.stable_diffusion(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"unet": [None, None], "_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"\(FluxPipeline\) has no unet: Stable Diffusion 1.x"):
        resolve_backbone("image_generator", str(folder))


# Of the repository of Stable Diffusion 1.5, 44 GB in all: what is not fetched stands below.
KEPT = """feature_extractor/preprocessor_config.json
model_index.json
safety_checker/config.json
safety_checker/model.safetensors
scheduler/scheduler_config.json
text_encoder/config.json
text_encoder/model.safetensors
tokenizer/merges.txt
tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json
tokenizer/vocab.json
unet/config.json
unet/diffusion_pytorch_model.safetensors
vae/config.json
vae/diffusion_pytorch_model.safetensors"""
LEFT = """.gitattributes
README.md
safety_checker/model.fp16.safetensors
safety_checker/pytorch_model.bin
text_encoder/model.fp16.safetensors
text_encoder/pytorch_model.bin
unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors
v1-5-pruned-emaonly.ckpt
v1-5-pruned-emaonly.safetensors
v1-5-pruned.safetensors
v1-inference.yaml
vae/diffusion_pytorch_model.fp16.bin"""


def test_of_a_generators_repository_only_what_is_read_is_fetched():
    names = sorted([*KEPT.split("\n"), *LEFT.split("\n")])
    assert sorted(files_to_fetch("image_generator", names)) == sorted(KEPT.split("\n"))


def test_of_a_language_models_repository_one_format_is_fetched():
    kept = ["config.json", "tokenizer.json", "merges.txt", "model-00001-of-00002.safetensors"]
    left = ["pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack", "LICENSE"]
    left += ["consolidated.safetensors", "original/consolidated.00.pth"]
    assert files_to_fetch("language_model", [*kept, *left]) == kept
    assert files_to_fetch("language_model", ["config.json", "pytorch_model.bin", "LICENSE"]) == [
        "config.json",
        "pytorch_model.bin",
    ]
