import copy
import math

import pytest
import torch

from pipeline.bridge.heads import Heads, HeadSizes, mean_image_embeddings, word_image_embeddings
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.language_model import LanguageModel
from tests.tiny_language_models import tiny_model, tiny_tokenizer


def test_the_paper_trains_fifty_million_parameters() -> None:
    with torch.device("meta"):
        heads = Heads(HeadSizes(d=1024, e=4096))
    count = sum(p.numel() for p in heads.parameters())
    assert count == 50_096_385
    assert all(p.requires_grad for p in heads.parameters())
    shapes = {n: tuple(p.shape) for n, p in heads.named_parameters() if not n.startswith("mapper.")}
    assert shapes == {
        "image_embeddings": (8, 4096),
        "logit_scale": (),
        "caption_projection.weight": (4 * 4096, 1024),
        "caption_projection.bias": (4 * 4096,),
        "text_to_image.weight": (256, 4096),
        "text_to_image.bias": (256,),
        "image_to_text.weight": (256, 1024),
        "image_to_text.bias": (256,),
    }


def test_temperature_starts_at_seven_hundredths() -> None:
    heads = Heads(HeadSizes(d=4, e=8, m=16, L=5, D=6))
    assert float(heads.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    assert heads.pooled_projection is None


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel(copy.deepcopy(tiny_model("opt", torch.float32)), tiny_tokenizer())


def test_image_embeddings_around_the_mean_row(language_model: LanguageModel) -> None:
    rows = language_model.input_rows[: language_model.num_rows]
    drawn = mean_image_embeddings(language_model, 4000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.mean(0), rows.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.std(0), rows.std(0), atol=0.01, rtol=0)


def test_image_embeddings_from_words(language_model: LanguageModel) -> None:
    texts = ["w3", "w7 w9", "w4"]
    ids = language_model.tokenizer.convert_tokens_to_ids(["w3", "w7", "w9", "w4"])
    first, second, third, fourth = words = language_model.input_rows[ids]
    # Whatever r is, every text stands in one of the rows.
    expected = {
        1: [words.mean(0)],
        2: [(first + second + third) / 3, fourth],
        3: [first, (second + third) / 2, fourth],
    }
    for r, means in expected.items():
        rows = word_image_embeddings(language_model, r, texts)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, torch.stack(means))
    rows = word_image_embeddings(language_model, 2, texts)
    heads = Heads(HeadSizes(d=4, e=32, m=16, L=5, D=6, r=2))
    heads.set_image_embeddings(rows)
    assert heads.image_embeddings.equal(rows)
    assert heads.image_embeddings.requires_grad
    with pytest.raises(ValueError, match="3 texts; r = 4"):
        word_image_embeddings(language_model, 4, ["w3", "w7", "w9"])
    with pytest.raises(ValueError, match="text 2, '', has no tokens"):
        word_image_embeddings(language_model, 2, ["w3", ""])


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="num_img"):
        HeadSizes(d=4, e=8, num_img=3)  # type: ignore[call-arg]


def test_states_are_standardised_for_the_mapper_and_the_query_alike(
    language_model: LanguageModel,
) -> None:
    """One constant on all states, however large, changes nothing that is read."""
    torch.manual_seed(0)
    sizes = HeadSizes(d=6, e=32, k=1, r=3, L=4, D=8, m=16, p=5, standardizes_states=True)
    gill = MultimodalLanguageModel(language_model, Heads(sizes).double())
    heads = gill.heads
    states = torch.randn(40, 3, 32, dtype=torch.float64) * torch.rand(3, 32) + 0.1
    states[..., 7] = 1e-6 * torch.randn(40, 3)  # hardly varies
    heads.standardize_by(states)
    read = heads.standardized(states)
    torch.testing.assert_close(read.mean(0), torch.zeros(3, 32, dtype=torch.float64))
    floor = 0.3 * states.std(0).mean()
    torch.testing.assert_close(read.std(0), states.std(0) / states.std(0).clamp(min=floor))
    assert float(read[..., 7].abs().max()) < 1e-4
    torch.testing.assert_close(heads.standardized(states[:, :1]), read[:, :1])
    pictures, queries = gill.generation_embedding(states), gill.text_query(states)
    heads.standardize_by(states + 50)
    torch.testing.assert_close(gill.generation_embedding(states + 50), pictures)
    torch.testing.assert_close(gill.text_query(states + 50), queries)
    assert "state_mean" in heads.state_dict()
    plain = Heads(sizes.model_copy(update={"standardizes_states": False}))
    assert "state_mean" not in plain.state_dict()
    assert plain.standardized(states) is states
