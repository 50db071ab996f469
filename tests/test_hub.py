"""The trained part in the hub's conventions: written, read, refused, sent (without a network)."""

import dataclasses
import json

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from gill.hub import HubError, pull
from gill.loading import Gill
from gill.model_card import CardNumber, licence_of
from gill_errors import GillError, InputError
from miniature.backbones import SHIPPED
from pipeline.bridge.checkpoint import CheckpointRecord
from pipeline.frozen.backbones import Backbones
from pipeline.frozen.pinning import resolve_backbone
from pipeline.talking.answers import ReplySettings
from tests.hub_stand_in import COMMIT, TOKEN, HubStandIn
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    with HubStandIn() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("{")[2]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.address}/{{{template}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


NUMBER = CardNumber("vqa", "Questions about pictures", "vqa_accuracy", 0.91, None, 200)


def test_a_pushed_trained_part_is_pulled_and_loaded(gill, hub, tmp_path):
    address = gill.push_to_hub("my-gill", private=True, numbers=[NUMBER], licence="apache-2.0")
    assert address == f"{hub.address}/me/my-gill/commit/{COMMIT}"
    names = ["README.md", "config.json", "model.safetensors", "pipeline.py"]
    assert sorted(hub.repositories["me/my-gill"]) == names
    # Its card went through the hub's own check, as every push's does.
    assert "POST /api/validate-yaml" in hub.asked
    card = ModelCard(hub.repositories["me/my-gill"]["README.md"].decode())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == (
        *("vqa_accuracy", 0.91),
        "vqa",
    )
    assert "| Questions about pictures | vqa_accuracy | 0.91 |  | 200 |" in card.text
    assert "Licence of the trained part: apache-2.0." in card.text

    config, folder = pull("me/my-gill", tmp_path / "pulled", None)
    assert config.step == 12
    assert sorted(path.name for path in folder.glob("*.*") if path.is_file()) == names
    pull("me/my-gill", tmp_path / "pulled", None)  # once more: brought up to date
    again = Gill.from_pretrained("me/my-gill", backbones=HERE, device="cpu")
    before, after = (one.reply(["a red ring."], PICTURE) for one in (gill, again))
    assert before.images[0].picture.tobytes() == after.images[0].picture.tobytes()


def test_a_run_on_built_in_models_is_loaded_anywhere(gill, folder):
    """By their name alone: nobody has to say where they lie."""
    built_in = {
        role: getattr(gill.backbones, role).model_copy(update={"source": "miniature"})
        for role in ROLES
    }
    named = dataclasses.replace(gill, backbones=Backbones(**built_in))
    saved = named.save_pretrained(folder.parent / "named")
    assert "| language model | miniature | apache-2.0 |" in (saved / "README.md").read_text()
    again = Gill.load(saved, device="cpu")  # as `gill ask --artifacts` does
    assert again.backbones.language_model.source == "miniature"
    assert again.backbones.fingerprints == gill.backbones.fingerprints


def test_a_licence_is_read_from_a_model_s_own_card(tmp_path):
    assert licence_of("facebook/opt-6.7b", tmp_path) == "other"
    assert licence_of("ViT-L-14:openai", tmp_path) == "mit"
    assert licence_of("/my/own", tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: gemma\ntags: [a]\n---\n# Ours\n")
    assert licence_of("facebook/opt-6.7b", tmp_path) == "gemma"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of("/my/own", tmp_path) is None


def test_what_the_hub_refuses_is_one_line(gill, hub, tmp_path, monkeypatch):
    gill.push_to_hub("me/my-gill")
    refused = {
        "me/nothing: .* no such repository": ("me/nothing", None),
        r"me/my gill: .* nor a repository id \(OWNER/NAME\)": ("me/my gill", None),
        "me/my-gill: .* no such revision": ("me/my-gill", "v9"),
    }
    for message, (name, revision) in refused.items():
        with pytest.raises(HubError, match=message) as told:
            pull(name, tmp_path / "pulled", revision)
        assert "\n" not in str(told.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(InputError, match="mine is not empty"):
        pull("me/my-gill", tmp_path / "mine", None)
    with pytest.raises(HubError, match=r"a/b/c could not be sent .* \(OWNER/NAME\)"):
        gill.push_to_hub("a/b/c")
    with pytest.raises(HubError, match=r"Invalid metadata in README.md.* license") as told:
        gill.push_to_hub("me/my-gill", licence="made-up")
    assert "\n" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(HubError, match="nobody is logged in: `hf auth login`"):
        gill.push_to_hub("me/my-gill")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        gill.push_to_hub("me/my-gill")
    with pytest.raises(HubError, match="cannot be reached"):
        pull("me/my-gill", tmp_path / "other", None)
