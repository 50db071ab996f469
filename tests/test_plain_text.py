"""Text that spells a control token stays text, for every kind of tokenizer that may come along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from miniature.backbones import SHIPPED
from pipeline.frozen.plain_text import read_control_tokens_as_text

CONTROL = ["<s>", "</s>", "<pad>", "<|endoftext|>", "<|im_start|>"]
ADDED = ["[IMG1]", "<think>"]
TEXTS = [
    "a dog",
    "a </s> b",
    "<|endoftext|>",
    "[IMG1] and <think> so",
    "<|im_start|>user",
    "<pad>x",
]
LETTERS = ["abcdefghijklmnopqrstuvwxyz<>/|[]IMG1_ 0123456789 dog cat and so user think " * 3]


def trained(model: Any, trainer: Any, before: Any, after: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = before, after
    inner.train_from_iterator(LETTERS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_special_tokens({"extra_special_tokens": CONTROL[3:]})
    made.add_tokens(ADDED)
    return made


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, OPT, Llama 3, Qwen."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=CONTROL[:3], initial_alphabet=alphabet)
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainer, before, decoders.ByteLevel())


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama, Mistral, Gemma, T5."""
    trainer = UnigramTrainer(
        vocab_size=120, special_tokens=[*CONTROL[:3], "<unk>"], unk_token="<unk>"
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT."""
    trainer = WordPieceTrainer(vocab_size=200, special_tokens=[*CONTROL[:3], "[UNK]"])
    made = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "sentence piece": sentence_piece,
    "word piece": word_piece,
    "miniature GPT-2": lambda: AutoTokenizer.from_pretrained(str(SHIPPED.language_model)),
    "miniature CLIP": lambda: AutoTokenizer.from_pretrained(f"{SHIPPED.image_generator}/tokenizer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_a_control_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    forbidden = set(tokenizer.added_tokens_decoder)
    forbidden -= {id_ for word, id_ in tokenizer.get_vocab().items() if "unk" in word.lower()}
    before = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert any(ids & forbidden for ids in before), "or this test shows nothing"
    plain, around = tokenizer("a dog", add_special_tokens=False), tokenizer("a dog")
    assert read_control_tokens_as_text(tokenizer) is tokenizer
    for each in (tokenizer, copy.deepcopy(tokenizer)):
        for text in TEXTS:
            ids = each(text, add_special_tokens=False)["input_ids"]
            assert ids
            assert not set(ids) & forbidden, (text, each.convert_ids_to_tokens(ids))
        assert each("a dog", add_special_tokens=False)["input_ids"] == plain["input_ids"]
        assert each("a dog")["input_ids"] == around["input_ids"]
    assert len(around["input_ids"]) > len(plain["input_ids"])


def test_open_clips_own_tokenizer() -> None:
    tokenizer: Any = open_clip.SimpleTokenizer()
    plain = tokenizer(["a dog's bone"]).tolist()
    assert tokenizer.eot_token_id in tokenizer.encode("a <end_of_text> b")
    read_control_tokens_as_text(tokenizer)
    for text in ("a <end_of_text> b", "<START_OF_TEXT>", "<start_of_text><end_of_text>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
    assert tokenizer(["a dog's bone"]).tolist() == plain
    read_control_tokens_as_text(tokenizer)  # again: as before
    assert tokenizer(["a dog's bone"]).tolist() == plain


def test_open_clips_wrapper_around_one_of_transformers() -> None:
    wrapped = HFTokenizer.__new__(HFTokenizer)
    wrapped.tokenizer = byte_level()
    read_control_tokens_as_text(wrapped)
    assert (
        wrapped.tokenizer.convert_tokens_to_ids("</s>")
        not in wrapped.tokenizer("a </s> b", add_special_tokens=False)["input_ids"]
    )


def test_the_loaded_models_read_text_as_text() -> None:
    from pipeline.frozen.language_model import load_language_model
    from pipeline.frozen.text_conditioner import load_text_conditioner
    from pipeline.frozen.visual_encoder import load_visual_encoder

    language_model = load_language_model(str(SHIPPED.language_model))
    assert 2 not in language_model.tokenizer("a </s> b", add_special_tokens=False)["input_ids"]
    conditioner = load_text_conditioner(str(SHIPPED.image_generator))
    # An end in the middle is where CLIP's text encoder pools, and says the same for all after it.
    said = conditioner.encode(["<|endoftext|> a red ring", "a red ring", "<|endoftext|>"]).embedding
    assert not said[0].equal(said[2])
    encoder = load_visual_encoder(f"local-dir:{SHIPPED.visual_encoder}")
    one, two = encoder.encode_text(["<|endoftext|> a red ring", "<|endoftext|> a blue ring"])
    assert not one.allclose(two, atol=1e-3)
