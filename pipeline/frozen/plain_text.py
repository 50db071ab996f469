"""Text is text: what spells a control token (`</s>`, `<|endoftext|>`) is read letter by letter.

Tokenizers otherwise take such words for the tokens themselves, and a caption that holds one ends
there, or is pooled there.
"""

from __future__ import annotations

from typing import Any

import regex
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.pre_tokenizers import Sequence, Split


def read_control_tokens_as_text(tokenizer: Any) -> Any:
    """Change a tokenizer, of transformers or open_clip, so that no text becomes a control token.

    Those that it puts around a text stay. Gives the tokenizer.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps those of transformers
    if hasattr(inner, "added_tokens_decoder"):
        _split_added_tokens(inner)
    elif hasattr(inner, "all_special_ids"):
        _forget_special_words(inner)
    return tokenizer


def _split_added_tokens(tokenizer: Any) -> None:
    tokenizer.split_special_tokens = True
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    # Only those that are called special are split. Runs of blanks are text already.
    read_as_text(backend, [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()])


def read_as_text(backend: Tokenizer, tokens: list[AddedToken]) -> None:
    """Have texts that spell `tokens` read letter by letter where `encode_special_tokens` is set."""
    backend.add_special_tokens(
        [renamed(t, t.content, special=True) for t in tokens if not t.special]
    )
    # The vocabulary of some models has these words a second time, as pieces of text.
    whole = [t.content for t in tokens if _id(backend, t) in _ids(backend, f"a {t.content} b")]
    if whole:
        starts = "|".join(f"{regex.escape(w[0])}(?={regex.escape(w[1:])})" for w in whole if w[1:])
        split = Split(Regex(starts), "isolated")
        before = backend.pre_tokenizer
        backend.pre_tokenizer = split if before is None else Sequence([before, split])


def renamed(token: AddedToken, content: str, *, special: bool = False) -> AddedToken:
    """A token that is met as another is, under a name of its own."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=special,
    )


def _id(backend: Tokenizer, token: AddedToken) -> int | None:
    return backend.token_to_id(token.content)


def _ids(backend: Tokenizer, text: str) -> list[int]:
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def _forget_special_words(tokenizer: Any) -> None:
    """Of open_clip's own tokenizer, whose pattern begins with its special words."""
    words = [tokenizer.decoder[token] for token in tokenizer.all_special_ids]
    for word in words:
        tokenizer.cache.pop(word, None)
    pattern = tokenizer.pat.pattern.removeprefix("|".join(words) + "|")
    tokenizer.pat = regex.compile(pattern, tokenizer.pat.flags)
