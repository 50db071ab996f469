"""The words, stems, synonyms and paraphrases of METEOR 1.5 for English, read without Java.

Denkowski and Lavie 2014, "Meteor Universal", section 2.1. The tables come with the `pycocoevalcap`
package, as the authors published them: WordNet 3.0 synonym sets, function words and nonbreaking
prefixes inside `meteor-1.5.jar` (a zip file), paraphrases in `data/paraphrase-en.gz`. The stemmer
is Snowball English as of 2.x: version 3 changed its rules.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path

from evaluation.metrics.basic import MetricUnavailable
from evaluation.metrics.text import CAPTIONS_EXTRA

JAR = "meteor-1.5.jar"
PARAPHRASES = "data/paraphrase-en.gz"
MAX_PHRASE = 7
"""Words in the longest phrase of the paraphrase table."""

# What METEOR holds to be letters: Latin and Cyrillic.
_LETTER = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ԧꙀ-ꙮ꙾-ꚗᴀ-ᵿ"
_ALNUM = "0-9" + _LETTER
_DOT = "\ue000"  # Private use: a dot of an ellipsis, which no rule below may touch.

# Each applies to the whole line, in this order, and never twice to the same character.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (rf"([^{_ALNUM}\s.'`,\-‘’{_DOT}])", r" \1 "),
        (r"([^0-9]),([^0-9])", r"\1 , \2"),
        (r"([0-9]),([^0-9])", r"\1 , \2"),
        (r"([^0-9]),([0-9])", r"\1 , \2"),
        (r"[`‘’]", "'"),
        (r"[“”]|''", ' " '),
        (r"–", "-"),
        (r"--", "-"),
        # A hyphen between words, so that half a compound can match.
        (rf"([{_ALNUM}.])-([{_ALNUM}])", r"\1 \2"),
        # An apostrophe stays with the letters that follow it: it 's
        (rf"([^{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([^{_LETTER}0-9])'([{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([^{_LETTER}])", r"\1 ' \2"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),
        (r"([0-9])'(s)", r"\1 '\2"),
    ]
]

# WordNet's endings for nouns, verbs and adjectives, in its order.
_ENDINGS = [
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"),
    ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"),
    ("ing", ""),
    ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
]  # fmt: skip


class MeteorResources:
    """Lookups over the published tables, kept for the words that were asked for.

    Args:
        folder: holds `meteor-1.5.jar` and `data/paraphrase-en.gz`; by default the one inside the
            installed `pycocoevalcap`.

    Raises:
        MetricUnavailable: a table or the stemmer is missing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or _installed_folder()
        for name in (JAR, PARAPHRASES):
            if not (folder / name).is_file():
                raise MetricUnavailable(f"METEOR needs {folder / name}: {CAPTIONS_EXTRA}")
        self._stem = _snowball_english()
        self._paraphrase_file = folder / PARAPHRASES
        with zipfile.ZipFile(folder / JAR) as jar:
            self.function_words = frozenset(_lines(jar, "function/english.words"))
            synsets = _lines(jar, "synonym/english.synsets")
            self._synsets = dict(zip(synsets[::2], synsets[1::2]))
            self._bases: defaultdict[str, list[str]] = defaultdict(list)
            irregular = _lines(jar, "synonym/english.exceptions")
            for base, forms in zip(irregular[::2], irregular[1::2]):
                for form in forms.split():
                    self._bases[form].append(base)
            prefixes = [line.split() for line in _lines(jar, "nonbreaking/english.prefixes")]
        prefixes = [fields for fields in prefixes if fields and not fields[0].startswith("#")]
        self._before_numbers = {fields[0] for fields in prefixes if "#NUMERIC_ONLY#" in fields}
        self._prefixes = {fields[0] for fields in prefixes} - self._before_numbers
        self._stems: dict[str, str] = {}
        self._meanings: dict[str, frozenset[str]] = {}

    def words(self, line: str) -> list[str]:
        """Lowercase words as METEOR's `-norm` makes them, punctuation kept.

        "A 5-year-old's toy." -> ["a", "5", "year", "old", "'s", "toy", "."]
        """
        line = re.sub(r"\.{2,}", lambda dots: f" {_DOT * len(dots[0])} ", f" {line} ")
        for pattern, replacement in _REWRITES:
            line = pattern.sub(replacement, line)
        tokens = line.split()
        words = []
        for token, following in zip(tokens, [*tokens[1:], ""]):
            words += self._split_dot(token, following)
        return [word.replace(_DOT, ".").lower() for word in words]

    def _split_dot(self, token: str, following: str) -> list[str]:
        """Separate a final dot that ends a sentence: p.m. -> pm, toy. -> toy ."""
        if len(token) == 1 or not token.endswith("."):
            return [token]
        stem = token[:-1]
        # Dots within: an abbreviation, whose dots all go.
        if "." in stem and re.search(f"[{_LETTER}]", stem):
            return [token.replace(".", "")]
        abbreviation = stem in self._prefixes or re.match("[a-z]", following)
        if abbreviation or (stem in self._before_numbers and re.match("[0-9]", following)):
            return [token]
        return [stem, "."]

    def stem(self, word: str) -> str:
        """Snowball English stem."""
        if word not in self._stems:
            self._stems[word] = self._stem(word)
        return self._stems[word]

    def meanings(self, word: str) -> frozenset[str]:
        """WordNet synonym sets of a word and of its base form."""
        if word not in self._meanings:
            bases = self._bases.get(word) or [self._base_form(word)]
            sets = (self._synsets.get(form, "") for form in (word, *bases))
            self._meanings[word] = frozenset(number for line in sets for number in line.split())
        return self._meanings[word]

    def _base_form(self, word: str) -> str:
        if word.endswith("ss") or len(word) <= 2:
            return word
        # The first ending that leads to a word of WordNet, as its own lookup does.
        for ending, replacement in _ENDINGS:
            base = word.removesuffix(ending) + replacement
            if word.endswith(ending) and base in self._synsets:
                return base
        return ""

    def paraphrases(
        self, sentences: Iterable[list[str]]
    ) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
        """Phrases of these sentences, with those phrases of these sentences that paraphrase them.

        Reads the whole table (5.3 million pairs, some seconds) and keeps what the sentences need.
        """
        phrases = {
            " ".join(words[i:j]).encode() + b"\n"
            for words in set(map(tuple, sentences))
            for i in range(len(words))
            for j in range(i + 1, min(i + MAX_PHRASE, len(words)) + 1)
        }
        found: defaultdict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        with gzip.open(self._paraphrase_file) as table:
            # GzipFile makes each line in Python; a buffered reader is more than twice as fast.
            lines = BufferedReader(table, 1 << 20)
            # Three lines a pair, from one iterator.
            for _probability, phrase, paraphrase in zip(lines, lines, lines):
                if phrase in phrases and paraphrase in phrases:
                    found[tuple(phrase.decode().split())].append(tuple(paraphrase.decode().split()))
        return dict(found)


def _installed_folder() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise MetricUnavailable(
            f"METEOR needs the tables that come with pycocoevalcap: {CAPTIONS_EXTRA}"
        )
    return Path(found.submodule_search_locations[0]) / "meteor"


def _snowball_english() -> Callable[[str], str]:
    try:
        import snowballstemmer
    except ModuleNotFoundError:
        raise MetricUnavailable(f"METEOR needs snowballstemmer below 3: {CAPTIONS_EXTRA}") from None
    stem: Callable[[str], str] = snowballstemmer.stemmer("english").stemWord
    if stem("archaeologist") != "archaeologist":
        raise MetricUnavailable(
            "METEOR needs snowballstemmer below 3, and a later one with other stems is installed: "
            + CAPTIONS_EXTRA
        )
    return stem


def _lines(jar: zipfile.ZipFile, name: str) -> list[str]:
    return jar.read(name).decode("utf-8").splitlines()
