"""Weights as they come: half fetched, in another format, as a variant, of another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_language_models
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from doctor.models import outline_models
from doctor.weights import check_weights
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.image_generator import load_image_generator
from pipeline.frozen.language_model import load_language_model
from pipeline.frozen.pinning import files_to_fetch, fingerprint_backbone, resolve_backbone
from pipeline.frozen.text_conditioner import load_text_conditioner
from pipeline.frozen.weight_files import loaded_weights, variant_of, weights_in
from settings.params import Params
from stages import prepare_backbones

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    return tiny_models.stable_diffusion(tmp_path / "generator")


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    folder = tmp_path / "language_model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_language_models.CONFIGURATIONS["opt"]())
    model.save_pretrained(folder)
    tiny_language_models.tiny_tokenizer().save_pretrained(folder)
    return folder


def as_bin(file: Path, name: str) -> Path:
    """The same weights as a .bin, in the place of the safetensors."""
    torch.save(safetensors.torch.load_file(file), file.with_name(name))
    file.unlink()
    return file.with_name(name)


def in_shards(file: Path) -> Path:
    """The same weights in two shards; their index."""
    weights = safetensors.torch.load_file(file)
    names = sorted(weights)
    stem = file.name.removesuffix(".safetensors")
    where: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({n: weights[n] for n in part}, file.with_name(shard))
        where |= dict.fromkeys(part, shard)
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    file.unlink()
    return index


def test_whole_weights_pass_in_every_format(generator: Path, language_model: Path) -> None:
    check_weights("image_generator", generator)
    check_weights("language_model", language_model)
    as_bin(generator / "text_encoder/model.safetensors", "pytorch_model.bin")
    as_bin(generator / "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    in_shards(generator / "unet/diffusion_pytorch_model.safetensors")
    in_shards(language_model / "model.safetensors")
    check_weights("image_generator", generator)
    check_weights("language_model", language_model)
    assert weights_in("image_generator", generator)["unet"].format == "safetensors"
    assert len(weights_in("language_model", language_model)[""].files) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named_with_its_command(language_model: Path, name: str) -> None:
    (language_model / "model.safetensors").unlink()
    (language_model / name).write_text(POINTER)
    with pytest.raises(BackboneError, match=f"{name} is a git-lfs pointer.*`git lfs pull` in"):
        check_weights("language_model", language_model)


@pytest.mark.parametrize("format_", ["safetensors", "bin"])
@pytest.mark.parametrize("left", [0, 5, 0.5, 0.999])
def test_a_truncated_file_is_named(language_model: Path, format_: str, left: float) -> None:
    file = language_model / "model.safetensors"
    if format_ == "bin":
        file = as_bin(file, "pytorch_model.bin")
    data = file.read_bytes()
    file.write_bytes(data[: int(left if left > 1 else left * len(data))])
    with pytest.raises(BackboneError, match=f"{file.name} .* is truncated or no weights"):
        check_weights("language_model", language_model)


def test_an_index_that_names_an_absent_shard(language_model: Path, generator: Path) -> None:
    index = in_shards(language_model / "model.safetensors")
    (language_model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BackboneError, match="index.json names model-00002-of-00002.safetensors"):
        check_weights("language_model", language_model)
    index.unlink()
    with pytest.raises(BackboneError, match="index.json is missing"):
        check_weights("language_model", language_model)
    in_shards(generator / "unet/diffusion_pytorch_model.safetensors")
    (generator / "unet/diffusion_pytorch_model-00001-of-00002.safetensors").write_text(POINTER)
    (generator / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(BackboneError) as caught:
        check_weights("image_generator", generator)
    assert len(str(caught.value).splitlines()) == 2, "all of them at once"


def test_weights_of_another_configuration(language_model: Path, generator: Path) -> None:
    config = json.loads((language_model / "config.json").read_text())
    config["ffn_dim"] = 96
    (language_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"fc1.* is \[48, 32\].*says \[96, 32\].*two models"):
        check_weights("language_model", language_model)
    config = json.loads((generator / "vae/config.json").read_text())
    config["latent_channels"] = 8
    (generator / "vae/config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="generator/vae: .*: the files are of two models"):
        check_weights("image_generator", generator)
    shutil.rmtree(generator / "text_encoder")
    with pytest.raises(BackboneError, match="text_encoder/config.json is missing"):
        check_weights("image_generator", generator)


def test_an_open_clip_directory(tmp_path: Path) -> None:
    folder = tiny_models.visual_encoder(tmp_path / "encoder")
    check_weights("visual_encoder", folder)
    (folder / "open_clip_model.safetensors").write_text(POINTER)
    with pytest.raises(BackboneError, match="git lfs pull"):
        check_weights("visual_encoder", folder)


def as_variant(folder: Path) -> None:
    """Every weight file in 16 bits under the name of the variant, and no other."""
    for file in folder.rglob("*.safetensors"):
        half = {n: t.half() for n, t in safetensors.torch.load_file(file).items()}
        metadata = {"format": "pt"}
        name = file.name.replace(".safetensors", ".fp16.safetensors")
        safetensors.torch.save_file(half, file.with_name(name), metadata)
        file.unlink()


def test_a_variant_alone_is_loaded_as_one(language_model: Path, generator: Path) -> None:
    plain = load_language_model(language_model).input_rows.half()
    prompt = load_text_conditioner(str(generator)).encode(["a b"]).embedding
    as_variant(language_model)
    as_variant(generator)
    assert variant_of("language_model", language_model) == "fp16"
    check_weights("language_model", language_model)
    check_weights("image_generator", generator)
    assert load_language_model(language_model).input_rows.half().equal(plain)
    said = load_text_conditioner(str(generator)).encode(["a b"]).embedding
    torch.testing.assert_close(said, prompt, atol=5e-3, rtol=0)
    assert load_image_generator(str(generator)) is not None
    names = [f.relative_to(generator).as_posix() for f in generator.rglob("*") if f.is_file()]
    assert set(files_to_fetch("image_generator", names)) == set(names), "from the hub, too"


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.safetensors"])
def test_weights_that_are_loaded_are_fingerprinted(generator: Path, name: str) -> None:
    """Safetensors in one folder say nothing about the next."""
    encoder = generator / "text_encoder"
    if name.endswith(".bin"):
        as_bin(encoder / "model.safetensors", name)
    else:
        as_variant(encoder)
    before = fingerprint_backbone("image_generator", generator)
    flip_last_byte(encoder / name)
    assert fingerprint_backbone("image_generator", generator) != before


def test_weights_that_are_left_for_better_ones_are_not(generator: Path) -> None:
    before = fingerprint_backbone("image_generator", generator)
    (generator / "text_encoder/pytorch_model.bin").write_bytes(b"the same again")
    assert fingerprint_backbone("image_generator", generator) == before
    # A variant that is not asked for keeps nobody from loading the .bin.
    as_variant(generator / "vae")
    (generator / "vae/diffusion_pytorch_model.bin").write_bytes(b"plain")
    before = fingerprint_backbone("image_generator", generator)
    flip_last_byte(generator / "vae/diffusion_pytorch_model.bin")
    assert fingerprint_backbone("image_generator", generator) != before


def test_the_choice_is_the_loaders(generator: Path, language_model: Path) -> None:
    """A file that is not chosen can hold anything."""
    for file in (*generator.rglob("*.safetensors"), language_model / "model.safetensors"):
        stem = "pytorch_model" if file.name == "model.safetensors" else "diffusion_pytorch_model"
        file.with_name(f"{stem}.bin").write_text("anything")
        file.with_name(file.name.replace(".s", ".fp16.s")).write_text("anything")
    check_weights("image_generator", generator)
    check_weights("language_model", language_model)
    load_language_model(language_model)
    load_text_conditioner(str(generator))
    load_image_generator(str(generator))


def test_which_file_is_taken() -> None:
    def taken(role: Any, *names: str) -> tuple[str, ...]:
        return next(iter(loaded_weights(role, names).values())).files

    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert taken("language_model", "pytorch_model.bin", *shards) == shards
    assert taken("language_model", "model.safetensors", *shards) == ("model.safetensors",)
    assert taken("language_model", "pytorch_model.bin", "model.fp16.safetensors") == (
        "pytorch_model.bin",
    )
    assert taken("language_model", "x/model.bin", "pytorch_model.fp16.bin") == (
        "pytorch_model.fp16.bin",
    )
    encoder = ("model.safetensors", "open_clip_pytorch_model.bin", "other.safetensors")
    assert taken("visual_encoder", *encoder) == ("open_clip_pytorch_model.bin",)


# ---- configurations -------------------------------------------------------------------------


def edited(path: Path, **changes: Any) -> None:
    """Write keys of a JSON file; ... takes a key out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer/tokenizer_config.json", "model_max_length", ...),
        ("tokenizer/tokenizer_config.json", "model_max_length", None),
        ("tokenizer/tokenizer_config.json", "model_max_length", 1e30),
    ],
)
def test_a_tokenizer_that_states_no_length(
    generator: Path, file: str, key: str, value: object
) -> None:
    whole = resolve_backbone("image_generator", str(generator)).widths
    before = load_text_conditioner(str(generator)).encode(["a b"]).embedding
    edited(generator / file, **{key: value})
    assert resolve_backbone("image_generator", str(generator)).widths == whole
    check_weights("image_generator", generator)
    assert load_text_conditioner(str(generator)).encode(["a b"]).embedding.equal(before)


@pytest.mark.parametrize(
    ("file", "key"),
    [("unet/config.json", "sample_size"), ("text_encoder/config.json", "hidden_size")],
)
def test_a_key_without_default_is_named_with_its_file(generator: Path, file: str, key: str) -> None:
    edited(generator / file, **{key: None})
    with pytest.raises(BackboneError, match=f"{file}: .*{key}") as caught:
        resolve_backbone("image_generator", str(generator))
    assert "\n" not in str(caught.value)


def test_keys_with_defaults_have_those_of_their_class(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    for config, widths in (
        ({"model_type": "opt"}, {"e": 768, "vocabulary": 50272}),
        ({"model_type": "gpt2", "n_embd": 12}, {"e": 12, "vocabulary": 50257}),
        ({"model_type": "opt", "word_embed_proj_dim": None, "hidden_size": 24}, None),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        found = resolve_backbone("language_model", str(folder)).widths
        assert found == (widths or {"e": 24, "vocabulary": 50272})
    for text in ("[]", "{", '{"hidden_size": 4, "vocab_size": null}', '{"hidden_size": "x"}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(BackboneError, match="config.json"):
            resolve_backbone("language_model", str(folder))


# ---- where it is said -----------------------------------------------------------------------


def test_the_doctor_and_the_stage_say_it_before_anything_is_computed(
    language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = Params.model_validate({"backbones": {"language_model": str(language_model)}})
    assert outline_models(params, None).problems == []
    prepare_backbones.run(params, retrain=False)
    (tmp_path / "artifacts/backbones/backbones.json").unlink()
    (language_model / "model.safetensors").write_text(POINTER)
    [problem] = outline_models(params, None).problems
    assert "is a git-lfs pointer" in problem
    with pytest.raises(BackboneError, match="is a git-lfs pointer"):
        prepare_backbones.run(params, retrain=False)
    assert not (tmp_path / "artifacts/backbones/backbones.json").exists()
