"""model.turns in params and manifests: plain changes nothing, chat is never mixed with it."""

from pathlib import Path

import pytest

from gill.artifacts import Artifacts
from gill.dimensions import DimensionError, check_dimensions
from gill.frozen import locate_backbones
from gill.loading import read_caption_prompt
from miniature.backbones import SHIPPED
from pipeline.frozen.backbones import BackboneError, Backbones, ChatSettings
from pipeline.frozen.language_model import check_language_model
from pipeline.frozen.pinning import fingerprint_backbone, resolve_backbone
from pipeline.talking.captioning import CAPTION_QUESTION
from settings.params import ModelParams, Params, ParamsError, parse_params
from tests.chat_templates import chat_language_model


def test_plain_turns_leave_no_trace_in_what_decides() -> None:
    keys = set(ModelParams().model_dump())
    assert keys == {"k", "r", "m", "p", "mapper", "image_token_init", "seed"}
    chat = ModelParams(turns="chat", system_prompt="Paint.")
    assert set(chat.model_dump()) == keys | {"turns", "system_prompt", "template_options"}
    assert ModelParams.model_validate(chat.model_dump()) == chat
    assert set(chat.sizes) == set(ModelParams().sizes) == {"k", "r", "m", "p", "mapper"}
    assert ModelParams().chat is None
    assert chat.chat == ChatSettings(system_prompt="Paint.")


@pytest.mark.parametrize(
    ("key", "value"), [("system_prompt", "Paint."), ("template_options", {"a": 1})]
)
def test_what_only_chat_has_is_refused_without_it(key: str, value: object) -> None:
    with pytest.raises(ParamsError, match=rf"model\.{key}: only chat has one: set model\.turns"):
        parse_params({"model": {key: value}}, Path("params.yaml"))


def test_turns_are_pinned_with_the_language_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    chat_language_model("smollm2").tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "config.json").write_text("{}")
    plain = fingerprint_backbone("language_model", folder)
    chat = fingerprint_backbone("language_model", folder, chat=ChatSettings())
    assert chat.startswith("chat:")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert fingerprint_backbone("language_model", folder) == plain
    assert fingerprint_backbone("language_model", folder, chat=ChatSettings()) != chat


def test_a_manifest_of_other_turns_is_refused_by_name(tmp_path: Path) -> None:
    found = {
        role: resolve_backbone(role, str(getattr(SHIPPED, role))).model_copy(
            update={"source": "miniature"}
        )
        for role in Backbones.model_fields
    }
    artifacts = Artifacts(tmp_path)
    Backbones(**found).write(artifacts.backbones)
    check_dimensions(artifacts, (), Params())
    with pytest.raises(DimensionError, match="model.turns is chat, but .* prepare-backbones"):
        check_dimensions(artifacts, (), Params(model=ModelParams(turns="chat")))
    told = found["language_model"].model_copy(update={"chat": ChatSettings()})
    Backbones(**found | {"language_model": told}).write(artifacts.backbones)
    with pytest.raises(DimensionError, match="model.turns is plain, but"):
        check_dimensions(artifacts, (), Params())
    # The plain fingerprint in it is not that of turns.
    with pytest.raises(BackboneError, match="are not the pinned ones"):
        locate_backbones(artifacts.backbones, tmp_path)


def test_the_built_in_model_has_no_template() -> None:
    with pytest.raises(BackboneError, match="has no chat template"):
        check_language_model(SHIPPED.language_model, ChatSettings())


def test_a_chat_model_is_asked_for_captions(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("captions: {table: miniature}\nmodel: {turns: chat}\n")
    assert read_caption_prompt(params) == CAPTION_QUESTION
    params.write_text("captions: {table: miniature}\nmodel: {k: 4}\n")
    assert read_caption_prompt(params) == ""
