"""Frozen models are pinned by content, and what does not fit is refused by name."""

import json

import pytest
import tiny_models

from pipeline.backbones import BackboneError, Backbones, check_widths, resolve_backbone


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
