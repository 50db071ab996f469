"""The trained part in the hub's conventions: written, read, refused, sent (without a network)."""

import dataclasses
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from gill.hub import HubError
from gill.loading import Gill
from gill_errors import GillError
from miniature.backbones import SHIPPED
from pipeline.bridge.checkpoint import CheckpointRecord
from pipeline.frozen.backbones import Backbones
from pipeline.frozen.pinning import resolve_backbone
from pipeline.talking.answers import ReplySettings
from tests.tiny_gill import FEW, tiny_gill

ROLES = ("language_model", "visual_encoder", "image_generator")
HERE = {role: str(getattr(SHIPPED, role)) for role in ROLES}
PICTURE = ReplySettings(want="generate", generation=FEW, seed=4)


@pytest.fixture(scope="module")
def gill() -> Gill:
    untold = tiny_gill()
    backbones = Backbones(**{role: resolve_backbone(role, path) for role, path in HERE.items()})
    record = CheckpointRecord(
        sizes=untold.heads.sizes,
        backbones=backbones.fingerprints,
        parameters={"training": {"learning_rate": 0.001}},
        step=12,
        metrics={"validation/generation": 0.25},
    )
    return dataclasses.replace(
        untold, index=None, backbones=backbones, record=record, caption_prompt=""
    )


@pytest.fixture(scope="module")
def folder(gill, tmp_path_factory):
    return gill.save_pretrained(tmp_path_factory.mktemp("hub") / "my-gill")


def test_what_was_saved_answers_as_before(gill, folder):
    again = Gill.from_pretrained(folder, backbones=HERE, local_files_only=True, device="cpu")
    before, after = (one.reply(["a red ring."], PICTURE) for one in (gill, again))
    assert before.images[0].picture.tobytes() == after.images[0].picture.tobytes()
    assert (again.generation, again.caption_prompt) == (FEW, "")
    # And is saved as the same files.
    second = again.save_pretrained(folder.parent / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (second / name).read_bytes() == (folder / name).read_bytes()


def test_the_files_are_the_hub_s(gill, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gill"
    assert config["sizes"]["r"] == gill.heads.sizes.r
    # Nothing about this machine is published.
    assert {one["source"] for one in config["backbones"].values()} == {None}
    assert str(SHIPPED.language_model.parent) not in (folder / "README.md").read_text()
    heads = gill.heads.state_dict()
    assert load_file(folder / "model.safetensors").keys() == heads.keys()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "gill"
    text = card.text
    assert f"{sum(x.numel() for x in heads.values()):,} parameters" in text
    assert "validation/generation | 0.25" in text
    assert "12 optimiser steps" in text


def test_other_frozen_models_are_refused(folder, tmp_path):
    load = {"local_files_only": True, "device": "cpu"}
    with pytest.raises(HubError, match="language model was a local directory"):
        Gill.from_pretrained(folder, **load)
    other = tmp_path / "lm"
    other.mkdir()
    for file in SHIPPED.language_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(HubError, match="language model .* is another model"):
        Gill.from_pretrained(folder, backbones={**HERE, "language_model": str(other)}, **load)
    with pytest.raises(HubError, match="no such role: teacher"):
        Gill.from_pretrained(folder, backbones={**HERE, "teacher": "x"}, **load)


def test_folders_that_hold_no_trained_part_are_refused(folder, tmp_path):
    with pytest.raises(HubError, match=r"config.json is missing"):
        Gill.from_pretrained(tmp_path, backbones=HERE)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(HubError, match="model_type: Input should be 'gill'"):
        Gill.from_pretrained(tmp_path, backbones=HERE)
    with pytest.raises(HubError, match="nobody/nothing: not to be had"):
        Gill.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(GillError, match="nothing to save"):
        tiny_gill().save_pretrained(tmp_path / "x")


def test_pushing_creates_a_repository_and_sends_the_folder(gill, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, repo_id, *, private, exist_ok):
            sent.update(private=private, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
            sent.update(repo_id=repo_id, message=commit_message)
            sent["files"] = sorted(p.name for p in folder_path.iterdir())
            assert set(sent["files"]) <= set(allow_patterns)
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert gill.push_to_hub("my-gill", private=True) == "https://hub/commit/1"
    assert sent == {
        "private": True,
        "exist_ok": True,
        "repo_id": "me/my-gill",
        "message": "Trained part of a GILL",
        "files": ["README.md", "config.json", "model.safetensors"],
    }
