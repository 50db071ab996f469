import copy

import pytest
import torch
import torch.nn.functional as F

from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.frozen.language_model import LanguageModel
from tests.tiny_language_models import tiny_model, tiny_tokenizer

SIZES = HeadSizes(d=10, e=32, k=3, r=4, L=7, D=12, m=16, p=8)


@pytest.fixture(scope="module")
def gill() -> MultimodalLanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(copy.deepcopy(tiny_model("opt")), tiny_tokenizer())
    return MultimodalLanguageModel(model, Heads(SIZES).double())


def test_only_the_heads_are_its_parameters(gill: MultimodalLanguageModel) -> None:
    assert all(name.startswith("heads.") for name in gill.state_dict())
    assert sum(p.numel() for p in gill.parameters()) == sum(
        p.numel() for p in gill.heads.parameters()
    )


def test_widths_must_agree() -> None:
    model = LanguageModel(tiny_model("opt-post-norm-projected"), tiny_tokenizer())
    with pytest.raises(ValueError, match="made for e = 32, but .* width 24"):
        MultimodalLanguageModel(model, Heads(SIZES))


def test_visual_prefix_is_one_linear_map_cut_in_k(gill: MultimodalLanguageModel) -> None:
    pooled = torch.randn(2, 10, dtype=torch.float64)
    w = gill.heads.caption_projection
    expected = pooled @ w.weight.T + w.bias
    prefix = gill.visual_prefix(pooled)
    torch.testing.assert_close(prefix[1, 2], expected[1, 64:96])


def test_queries_and_keys_are_normalised_and_read_the_first_token(
    gill: MultimodalLanguageModel,
) -> None:
    hidden = torch.randn(3, 4, 32, dtype=torch.float64)
    query = gill.text_query(hidden)
    torch.testing.assert_close(query.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(query, F.normalize(gill.heads.text_to_image(hidden[:, 0]), dim=1))
    pooled = torch.randn(3, 10, dtype=torch.float64)
    torch.testing.assert_close(
        gill.image_key(pooled), F.normalize(gill.heads.image_to_text(pooled), dim=1)
    )


def test_image_hidden_after_interleaved_contexts_is_the_models_own(
    gill: MultimodalLanguageModel,
) -> None:
    lm, n = gill.language_model, gill.language_model.num_rows
    prefix = gill.visual_prefix(torch.randn(2, 10, dtype=torch.float64)).detach()
    images = gill.heads.image_embeddings.detach()
    # The second context holds an image that the model itself spoke of: ids n .. n + 3.
    contexts = [
        [torch.tensor([2, 5, 9]), prefix[0], torch.tensor([7])],
        [prefix[1], torch.tensor([4, n, n + 1, n + 2, n + 3, 8])],
        [torch.tensor([2])],
    ]
    table = torch.cat([lm.input_rows[:n], images])
    hidden = gill.image_hidden(contexts)
    assert hidden.shape == (3, 4, 32)
    own = tiny_model("opt")
    for i, context in enumerate(contexts):
        parts = [p if p.is_floating_point() else table[p] for p in context]
        inputs = torch.cat([*parts, images])[None]
        expected = own.base_model(inputs_embeds=inputs).last_hidden_state[0, -4:]
        torch.testing.assert_close(hidden[i], expected, rtol=1e-10, atol=1e-10)


def test_half_precision_computes_low_and_returns_float32() -> None:
    model = LanguageModel(tiny_model("opt", torch.bfloat16), tiny_tokenizer())
    heads = Heads(SIZES)
    gill = MultimodalLanguageModel(model, heads)
    pooled = torch.randn(2, 10)
    assert gill.visual_prefix(pooled).dtype == torch.bfloat16
    hidden = gill.image_hidden([[torch.tensor([2, 5])], [torch.tensor([2, 5, 9])]])
    assert hidden.dtype == torch.bfloat16
    for out in (gill.generation_embedding(hidden), gill.text_query(hidden), gill.image_key(pooled)):
        assert out.dtype == torch.float32
    exact = heads.mapper(hidden.float(), heads.image_embeddings)
    error = (gill.generation_embedding(hidden) - exact).norm() / exact.norm()
    assert 1e-6 < float(error.detach()) < 0.02


def test_without_a_pooled_projection_there_is_no_pooled_vector(
    gill: MultimodalLanguageModel,
) -> None:
    with pytest.raises(ValueError, match="D_pooled is not set"):
        gill.generation_pooled(torch.zeros(1, 4, 32, dtype=torch.float64))
