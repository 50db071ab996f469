"""Penn Treebank words of a caption, as the COCO caption evaluation counts them.

The evaluation server (Chen et al. 2015, "Microsoft COCO Captions", section 3.2) tokenises with
Stanford CoreNLP 3.4.1 and leaves punctuation out. These are its rules for English captions and
dialogue, without Java. On 12 129 captions, stories, dialogues, questions and prompts of COCO, VIST,
VisDial, VQA and PartiPrompts, all but two come out equal; they have an emoticon and a "**".
"""

import re
from pathlib import Path

import yaml

_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_PUNCTUATION = frozenset(_WORDS["punctuation"])
_SPELLED_OUT = str.maketrans(_WORDS["spelled_out"])
_ABBREVIATIONS = "|".join(_WORDS["keep_their_dot"].split())

_TOKEN = re.compile(
    rf"""
      </?[a-z][^<>]*> | https?://\S+ | www\.[^\s,;]+
    # Numbers: 5:30  3,000  -5  .5  1/2  10/12/2005
    | (?<!\w)\d+(?:-\d+)?/\d+(?:/\d+)?(?![\w/])
    | (?<!\w)[+-]?\d+(?:[.,:]\d+)+ | (?<!\w)[+-]?\.?\d+(?![\w'/]|-\w|&\w)
    # Letters with dots: u.s.  p.m.  j.r.r.  and known abbreviations
    | (?<!\w)(?:[^\W\d_]\.)+[^\W\d_](?:\.(?!\w)|(?![\w.])) | (?<![\w'])[^\W\d_]\.(?!\w\w|\.)
    | (?<!\w)no\.(?=\s*\d) | (?<!\w)(?:{_ABBREVIATIONS})\.(?!\w)
    # Clitics, and what stands before one of them: do n't  it 's  'm  the '90s
    | n't\b | '(?:s|m|d|re|ve|ll)\b | '\d\ds\b | 'n' | '(?:em|cause|n)\b | 't(?=is\b|was\b)
    | (?<!\w)\w+?(?=n't\b) | y'(?=all\b)
    | (?<!\w)(?:o'clock|ma'am|c'mon|ol'|[dol]'[^\W\d_]{{2,}})
    # Words: 10-year-old  w/o  at&t  at_work  index.html
    | \w+(?:-\w+)+ | (?<!\w)[^\W\d]\w*(?:/\w+){{1,2}} | \w+(?:&\w+)+
    | [^\W\d_]+(?:\.[^\W\d_]{{2,}})+ | \w+
    | \.(?:\s?\.)+ | --+ | [!?]+ | \S
    """,
    re.VERBOSE,
)

_DOTS_OR_DASHES = re.compile(r"[.\s]+|--+")


def treebank_words(caption: str) -> list[str]:
    """Lowercase words of a caption, without punctuation.

    "A man can't ride the dogs' 5-year-old sled." ->
    ["a", "man", "ca", "n't", "ride", "the", "dogs", "5-year-old", "sled"]
    """
    text = caption.translate(_SPELLED_OUT).lower()
    words: list[str] = []
    for token in _TOKEN.findall(text):
        words += _WORDS["two_words"].get(token, [_WORDS["renamed"].get(token, token)])
    return [
        word for word in words if word not in _PUNCTUATION and not _DOTS_OR_DASHES.fullmatch(word)
    ]
