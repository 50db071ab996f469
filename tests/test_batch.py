import pytest
import torch

from pipeline.bridge.batch import CaptionBatch


def batch(captions: list[list[int]], max_tokens: int = 23) -> CaptionBatch:
    n = len(captions)
    return CaptionBatch.from_lists(
        captions,
        torch.arange(n * 4.0).view(n, 4),
        torch.zeros(n, 3, 2),
        torch.arange(10, 10 + n),
        max_tokens,
    )


def test_captions_lie_one_after_the_other_cut_at_the_stated_length() -> None:
    b = batch([[5, 6, 7], [8], [9, 10, 11, 12]], max_tokens=3)
    assert b.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert b.offsets.tolist() == [0, 3, 4, 7]
    assert b.lengths == [3, 1, 3]
    assert len(b) == 3


def test_an_empty_caption_is_refused_by_its_row() -> None:
    with pytest.raises(ValueError, match=r"example 1 \(row 11\): the caption has no tokens"):
        batch([[5], [], [6]])


def test_contradicting_counts_are_refused() -> None:
    b = batch([[5, 6], [7]])
    with pytest.raises(ValueError, match="offsets end at 2, but there are 3 tokens"):
        CaptionBatch(b.tokens, torch.tensor([0, 1, 2]), b.pooled, b.targets, b.rows)
    with pytest.raises(ValueError, match="1 captions from token 0, but there are 2 pooled"):
        CaptionBatch(b.tokens, torch.tensor([0, 3]), b.pooled, b.targets, b.rows)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        batch([[5]], max_tokens=0)


def test_moving_leaves_the_offsets_on_the_cpu() -> None:
    b = batch([[5, 6], [7]]).to("meta")
    assert b.offsets.device.type == "cpu"
    assert {b.tokens.device.type, b.pooled.device.type, b.targets.device.type} == {"meta"}
    assert b.pooled_targets is None
