"""Every preset is a whole params file of models that exist and fit together."""

from pathlib import Path

import pytest
import yaml

from doctor.blueprints import find, generator_blueprint, visual_encoder_blueprint
from doctor.known_models import known_language_model
from settings.params import Params, read_params

PRESETS = {path.stem: path for path in (Path(__file__).parents[1] / "presets").glob("*.yaml")}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_whole_params_file(name: str) -> None:
    read_params(PRESETS[name])
    text = PRESETS[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert set(Params.model_fields) >= set(yaml.safe_load(text)) >= {
        "run", "captions", "backbones", "features", "targets", "model", "objective", "training",
        "generation", "index", "decision", "evaluation",
    }  # fmt: skip


def test_the_presets_of_the_task_are_there() -> None:
    wanted = {"miniature", "paper", "released", "small", "qwen-sdxl", "smollm2", "qwen-chat-sdxl"}
    assert wanted <= PRESETS.keys()


# d, e, L, D, D_pooled as the published models have them.
WIDTHS = {
    "paper": (1024, 4096, 77, 768, None),
    "released": (1024, 4096, 77, 768, None),
    "small": (1024, 2048, 77, 768, None),
    "qwen-sdxl": (1152, 2560, 77, 2048, 1280),
    "qwen-chat-sdxl": (1152, 2560, 77, 2048, 1280),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_of_its_models(name: str) -> None:
    import torch

    backbones = read_params(PRESETS[name]).backbones
    language_model = known_language_model(backbones.language_model)
    assert language_model is not None
    encoder, _ = visual_encoder_blueprint(
        find("visual_encoder", backbones.visual_encoder), torch.float32
    )
    generator = generator_blueprint(
        find("image_generator", backbones.image_generator), torch.float32
    )
    assert generator.text_width == generator.cross_attention_width
    e = language_model.sizes["hidden_size"]
    found = (encoder.width, e, generator.length, generator.text_width, generator.pooled_width)
    assert found == WIDTHS[name]


def test_released_differs_from_paper_in_how_it_trains_alone() -> None:
    paper, released = (read_params(PRESETS[name]).model_dump() for name in ("paper", "released"))
    assert {key for key in paper if paper[key] != released[key]} == {
        "model", "objective", "training",
    }  # fmt: skip
