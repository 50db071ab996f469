"""Where sentences end: in texts that people give, and in answers as they come.

it rained. "is it over ?" we went out  ->  [it rained.], ["is it over ?"], [we went out]
"""

from __future__ import annotations

import re

_ENDS = ".!?…。！？"
_CLOSES = "\"'”’»)]"
_END = re.compile(rf"[{re.escape(_ENDS)}]+[{re.escape(_CLOSES)}]*(?=\s|$)")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|(?i:mrs?|ms|dr|prof|st|jr|sr|vs|e\.g|i\.e))\.$")
_NUMBER_ONLY = re.compile(r"^\d+\.$")


def ends_sentence(text: str) -> bool:
    """Whether `text` breaks off behind a whole sentence, spaces and closing quotes aside."""
    text = text.rstrip()
    bare = text.rstrip(_CLOSES)
    return bare.endswith(tuple(_ENDS)) and _ABBREVIATION.search(bare) is None


def sentences_of(text: str) -> list[list[str]]:
    """The sentences of each paragraph, in order. Paragraphs are parted by empty lines; white space
    within one becomes single spaces."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        sentences: list[str] = []
        begin = 0
        for end in _END.finditer(words):
            sentence = words[begin : end.end()]
            if ends_sentence(sentence) and not _NUMBER_ONLY.match(sentence.strip()):
                sentences.append(sentence.strip())
                begin = end.end()
        if rest := words[begin:].strip():
            sentences.append(rest)
        if sentences:
            paragraphs.append(sentences)
    return paragraphs
