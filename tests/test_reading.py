"""Reading of interleaved contexts, against ids and vectors put together by hand."""

import pytest
import torch
from PIL import Image

from gill import Gill
from pipeline.talking.reading import join_texts, read_contexts
from tests.tiny_gill import K, tiny_gill


@pytest.fixture(scope="module")
def gill() -> Gill:
    return tiny_gill()


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def ids_of(gill: Gill, text: str) -> torch.Tensor:
    ids = gill.language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def prefix_of(gill: Gill, picture: Image.Image) -> torch.Tensor:
    return gill.model.visual_prefix(gill.encoder.encode_pictures([picture]))[0].detach()


@pytest.mark.parametrize(
    ("context", "joined"),
    [
        (["a b", "c", 0, "d", "\ne", "", "f"], ["a b c", 0, "d\ne f"]),
        (["a ", "b"], ["a b"]),
        (["", "a"], ["a"]),
        ([0, "a", 0], [0, "a", 0]),
        ([], []),
    ],
)
def test_neighbouring_texts_are_one_set_off_by_one_space(context, joined, picture):
    def shown(parts):
        return [picture if part == 0 else part for part in parts]

    assert join_texts(shown(context)) == shown(joined)
    first = joined[0] if joined else 0
    expected = shown([f" {first}", *joined[1:]] if first else joined)
    assert join_texts(shown(context), after_text=True) == expected


def test_contexts_of_a_batch_are_read_as_each_alone(gill, picture):
    start = torch.tensor(gill.language_model.start_ids)
    contexts = [["a red", "ring."], [picture, "it turns blue."], [picture], ["in the sea"]]
    by_hand = [
        [start, ids_of(gill, "a red ring.")],
        [start, prefix_of(gill, picture), ids_of(gill, "it turns blue.")],
        [start, prefix_of(gill, picture)],
        [start, ids_of(gill, "in the sea")],
    ]
    found = read_contexts(gill.model, gill.encoder, contexts, batch_size=3)
    for row, parts in enumerate(by_hand):
        torch.testing.assert_close(found[row : row + 1], gill.model.image_hidden([parts]).detach())


def test_too_long_a_context_loses_words_and_whole_pictures_of_its_beginning(gill, picture):
    model, start = gill.model, torch.tensor(gill.language_model.start_ids)
    room = gill.language_model.max_positions - model.heads.sizes.r - len(start)
    words = ids_of(gill, "ring " * 300)[: room + 5]
    text = gill.language_model.tokenizer.decode(words)
    assert torch.equal(ids_of(gill, text), words)
    expected = model.image_hidden([[start, words[5:]]]).detach()
    torch.testing.assert_close(read_contexts(model, gill.encoder, [[text]]), expected)
    # One position too many, and all k of the picture go; then there is room for one less than k.
    few = words[: room - K + 1]
    text = gill.language_model.tokenizer.decode(few)
    expected = model.image_hidden([[start, few]]).detach()
    torch.testing.assert_close(read_contexts(model, gill.encoder, [[picture, text]]), expected)
    fits = few[1:]
    text = gill.language_model.tokenizer.decode(fits).lstrip()
    read = [start, prefix_of(gill, picture), ids_of(gill, text)]
    expected = model.image_hidden([read]).detach()
    torch.testing.assert_close(read_contexts(model, gill.encoder, [[picture, text]]), expected)
