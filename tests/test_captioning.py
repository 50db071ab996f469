"""Words after pictures, on the shipped language model."""

import pytest
import torch

from miniature.backbones import SHIPPED
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.language_model import load_language_model
from pipeline.talking.captioning import caption_pictures, first_sentence, words_after_pictures
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, decode


@pytest.fixture(scope="module")
def gill() -> MultimodalLanguageModel:
    torch.manual_seed(0)
    model = load_language_model(SHIPPED.language_model)
    sizes = HeadSizes(d=6, e=model.width, k=2, r=2, L=3, D=4, m=8, p=4)
    return MultimodalLanguageModel(model, Heads(sizes).eval())


def test_a_picture_comes_before_the_start_and_the_prompt(gill: MultimodalLanguageModel) -> None:
    """As in the captioning loss; batched, and read alone, prompt by prompt."""
    pooled = torch.randn(3, 6)
    prompts = ["", "Q: is it red? A:", "in the sea"]
    said = words_after_pictures(gill, pooled, prompts, max_tokens=6)
    model = gill.language_model
    for row, prompt in enumerate(prompts):
        ids = [*model.start_ids, *model.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        words = model.embed(torch.tensor(ids, dtype=torch.int64))
        alone = torch.cat([gill.visual_prefix(pooled[row : row + 1])[0], words])
        settings = DecodingSettings(max_tokens=6, max_images=0)
        [answer] = decode(gill, Context(model), [alone], settings)
        assert said[row] == answer.text.strip().partition("\n")[0].strip()
    assert len(set(said)) > 1
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        words_after_pictures(gill, pooled, [""], 4)


def test_a_caption_is_what_follows_the_released_prompt_up_to_its_stop(
    gill: MultimodalLanguageModel,
) -> None:
    pooled = torch.randn(4, 6)
    said = words_after_pictures(gill, pooled, ["A picture of"] * 4, max_tokens=32)
    assert caption_pictures(gill, pooled) == [first_sentence(text) for text in said]
    bare = words_after_pictures(gill, pooled, [""] * 4, max_tokens=5)
    assert caption_pictures(gill, pooled, "", 5) == [first_sentence(text) for text in bare]
    assert bare != said


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a red ring. it moves.", "a red ring"),
        ("st. peter waits. then goes", "st. peter waits. then goes"),
        (" a ring", "a ring"),
        ("", ""),
    ],
)
def test_captions_end_at_their_first_full_stop(text: str, kept: str) -> None:
    assert first_sentence(text) == kept
