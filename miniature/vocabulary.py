"""The tokenizers of the tiny backbones: byte-level BPE, in which every word is one token.

Bytes cover everything else, so that any text can be tokenized; a word the world does not know
comes out in pieces that no backbone has seen.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, GPT2Tokenizer

from miniature.language import words

TEXT_LENGTH = 24  # L: text positions of CLIP and the image generator, begin and end included
MAX_POSITIONS = 256  # of the language model, `</s>` included

_SPACE = "Ġ"  # how byte-level BPE writes a space
_WORD_END = "</w>"  # how CLIP's BPE marks the last piece of a word


def learn_merges(pieces: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each of the given words is one piece.

    Args:
        pieces: the words, each cut into its first symbols, for example `("Ġ", "r", "i", "n", "g")`.
    """
    merges: list[tuple[str, str]] = []
    cut = list(pieces)
    while pairs := Counter(pair for word in cut for pair in itertools.pairwise(word)):
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((first, second))
        cut = [_merge(word, first, second) for word in cut]
    return merges


def _merge(word: tuple[str, ...], first: str, second: str) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in word:
        # A pair never overlaps itself here unless its halves are equal, as in "ee"; then the left
        # one wins.
        if merged and merged[-1] == first and symbol == second:
            merged[-1] = first + second
        else:
            merged.append(symbol)
    return tuple(merged)


def _number(symbols: Iterable[str]) -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}


def language_model_tokenizer() -> GPT2Tokenizer:
    """OPT's kind: `</s>` (2) begins every text and ends it, `<pad>` is 1, case and spaces count."""
    merges = learn_merges(tuple(form) for word in words() for form in (word, _SPACE + word))
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    return GPT2Tokenizer(
        vocab=_number([*symbols, *(a + b for a, b in merges)]),
        merges=merges,  # type: ignore[arg-type]
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
        model_max_length=MAX_POSITIONS,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's kind: lower case, `<|startoftext|> ... <|endoftext|>`, padded with the latter."""
    lower = dict.fromkeys(word.lower() for word in words())
    merges = learn_merges((*word[:-1], word[-1] + _WORD_END) for word in lower)
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + _WORD_END for byte in alphabet)]
    # Last, so that CLIP finds the end of a text as its largest id.
    special = ("<|startoftext|>", "<|endoftext|>")
    return CLIPTokenizer(
        vocab=_number([*symbols, *(a + b for a, b in merges), *special]),
        merges=merges,  # type: ignore[arg-type]
        model_max_length=TEXT_LENGTH,
    )
