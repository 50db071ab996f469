import copy

import torch

from pipeline.bridge.image_tokens import (
    append_image_logits,
    embed_with_image_tokens,
    image_token_ids,
    rescale_image_rows,
)
from pipeline.frozen.language_model import LanguageModel
from tests.tiny_language_models import tiny_model, tiny_tokenizer


def test_ids_follow_the_frozen_vocabulary() -> None:
    assert image_token_ids(601, 3) == [601, 602, 603]


def test_rows_come_from_the_table_or_from_e_img() -> None:
    model = LanguageModel(copy.deepcopy(tiny_model("opt", torch.float32)), tiny_tokenizer())
    images = torch.randn(2, model.width)
    n = model.num_rows
    rows = embed_with_image_tokens(torch.tensor([3, n, 7, n + 1]), model, images)
    table = model.input_rows
    assert rows.equal(torch.stack([table[3], images[0], table[7], images[1]]))


def test_image_logits_follow_the_words() -> None:
    hidden, images = torch.randn(2, 3, 4), torch.randn(2, 4)
    words = torch.randn(2, 3, 5)
    logits = append_image_logits(words, hidden, images)
    assert logits[..., :5].equal(words)
    torch.testing.assert_close(logits[..., 6], (hidden * images[1]).sum(-1))


def test_rescaling_keeps_directions() -> None:
    images = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    rescale_image_rows(images, mean_row_norm=10.0)
    torch.testing.assert_close(images, torch.tensor([[6.0, 8.0], [0.0, 10.0]]))
    before = images.clone()
    rescale_image_rows(images, mean_row_norm=1.0, unless=torch.tensor(True))
    assert torch.equal(images, before)
    rescale_image_rows(images, mean_row_norm=1.0, unless=torch.tensor(False))
    torch.testing.assert_close(images, before / 10)
