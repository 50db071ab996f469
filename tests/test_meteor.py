"""METEOR against numbers of its reference implementation (meteor-1.5.jar, `-l en -norm`).

The published tables are not part of this project. Those written here hold the rows that the
sentences below need; where pycocoevalcap is installed, the same numbers are asked of the real ones.
"""

import gzip
import importlib.util
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("snowballstemmer", reason="METEOR's stemmer: pip install 'gill[captions]'")

from evaluation.metrics.basic import MetricUnavailable
from evaluation.metrics.meteor import Meteor

FUNCTION_WORDS = """
's 't , . a also are at been by for has in is it more not of on one said the there they this two
was which
"""
MEANINGS = {
    "be": "1",
    "kid": "2",
    "child": "2",
    "quickly": "3",
    "rapidly": "3",
    "large": "4",
    "big": "4",
    "on": "5",
    "along": "5",
    "ride": "6",
    "drive": "7 8",
    "play": "9",
    "run": "10",
    "say": "11",
}
IRREGULAR = {"be": "is was been", "child": "children", "say": "said", "drive": "driving"}
PREFIXES = "# comment\n\nMr\nSt\nNo #NUMERIC_ONLY#\n"
PARAPHRASES = [
    ("which has been", "which was"),
    ("has been", "was"),
    ("has been", "is"),
    ("seems", "is"),
    ("beach", "seashore"),
    ("man", "person"),
    ("the beach", "the seashore"),
    ("horse", "horseback"),
    ("quickly", "rapidly"),
    ("quickly", "rapidly in"),
    ("are", "run"),
    ("are running", "run"),
    ("rapidly", "quickly"),
    ("rapidly in", "quickly through"),
    ("tall", "high"),
    ("a large", "a big"),
    ("large", "a big"),
    ("large", "big"),
    ("big", "large"),
    ("the street", "road"),
    ("street", "road"),
    ("football", "soccer"),
    ("soccer", "football"),
    ("kids", "children"),
    ("kids", "of children"),
    ("play", "playing"),
    ("playing", "play"),
    ("football in", "soccer in"),
    ("several", "a number"),
    ("several", "a number of"),
    ("several", "are a number"),
    ("several", "are a number of"),
    ("several children", "a number of children"),
    ("a number", "several"),
    ("a number of", "several"),
    ("known", "famous"),
    ("said", "they say"),
    ("said", "say"),
    ("say", "said"),
    ("wasn", "was"),
    ("is a", "is also a"),
]

RECORDED = [
    (
        "a man rides a horse on the beach",
        ["a person is riding a horse along the seashore", "man on horseback at the beach"],
        0.39888849732215,
    ),
    (
        "two dogs are running quickly through tall grass",
        ["a pair of dogs run rapidly in the high grass"],
        0.29621941171762367,
    ),
    ("the cat sat on the mat", ["on the mat sat the cat"], 0.4776696620223255),
    (
        "a large red bus drives down the street",
        [
            "a big red double-decker bus is driving down a city street",
            "the bus goes along the road",
        ],
        0.2685867539866126,
    ),
    (
        "there are a number of children playing football in the park",
        [
            "many kids play soccer in a park",
            "several children are playing a game of football",
        ],
        0.2899920563382994,
    ),
    (
        "a well-known U.S. actor wasn't there at 5 p.m. , it's said .",
        ["the famous US actor was not there at 5 pm, they say..."],
        0.3710522524161158,
    ),
    ("purple elephants", ["the quick brown fox"], 0.0),
    ("the the the the", ["the cat the dog"], 0.1081081081081081),
    ("this is a good test", ["this is a test", "this is also a test"], 0.4443438716486749),
    (
        "Le test est en français.",
        ["Test en français.", "Le test en français."],
        0.48372379050300296,
    ),
    ("テスト", ["テスト"], 1.0),
]
RECORDED_CORPUS = 0.33322757109711076


def write_tables(folder: Path) -> Path:
    def pairs(table: dict[str, str]) -> str:
        return "".join(f"{key}\n{value}\n" for key, value in table.items())

    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "\n".join(FUNCTION_WORDS.split()))
        jar.writestr("synonym/english.synsets", pairs(MEANINGS))
        jar.writestr("synonym/english.exceptions", pairs(IRREGULAR))
        jar.writestr("nonbreaking/english.prefixes", PREFIXES)
    (folder / "data").mkdir()
    with gzip.open(folder / "data/paraphrase-en.gz", "wt") as lines:
        lines.writelines(f"0.5\n{phrase}\n{other}\n" for phrase, other in PARAPHRASES)
    return folder


@pytest.fixture(scope="module")
def meteor(tmp_path_factory: pytest.TempPathFactory) -> Meteor:
    return Meteor(write_tables(tmp_path_factory.mktemp("meteor")))


def test_scores_are_those_of_the_reference_implementation(meteor: Meteor) -> None:
    scores = meteor.score([row[0] for row in RECORDED], [row[1] for row in RECORDED])
    assert scores.examples == pytest.approx([row[2] for row in RECORDED], abs=1e-12)
    assert scores.corpus == pytest.approx(RECORDED_CORPUS, abs=1e-12)


def test_the_published_example_of_a_corpus(meteor: Meteor, shared_data: Path) -> None:
    read = lambda name: (shared_data / "nlgeval_examples" / name).read_text().splitlines()  # noqa: E731
    references = list(map(list, zip(read("ref1.txt"), read("ref2.txt"), strict=True)))
    assert meteor.score(read("hyp.txt"), references).corpus == pytest.approx(0.295797, abs=5e-7)


@pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None,
    reason="METEOR's published tables: pip install 'gill[captions]'",
)
def test_the_published_tables_give_the_recorded_scores() -> None:
    scores = Meteor().score([row[0] for row in RECORDED], [row[1] for row in RECORDED])
    assert scores.examples == pytest.approx([row[2] for row in RECORDED], abs=1e-12)


def test_words_are_split_as_meteor_splits_them(meteor: Meteor) -> None:
    words = meteor.resources.words
    assert words("A 5-year-old's toy.") == ["a", "5", "year", "old", "'s", "toy", "."]
    assert words("Mr. Lee, No. 5 of the U.S. team. No.") == (
        ["mr.", "lee", ",", "no.", "5", "of", "the", "us", "team", ".", "no", "."]
    )
    assert words("so... it costs 1,000 (one) “thousand”") == (
        ["so", "...", "it", "costs", "1,000", "(", "one", ")", '"', "thousand", '"']
    )


def test_meanings_are_found_through_the_base_form(meteor: Meteor) -> None:
    meanings = meteor.resources.meanings
    assert meanings("children") == meanings("kids") == frozenset({"2"})
    assert meanings("drives") == frozenset({"7", "8"})
    assert meanings("was") == frozenset({"1"})
    assert meanings("grass") == frozenset()


def test_equal_sentences_are_worth_one_and_order_costs(meteor: Meteor) -> None:
    line = "a dog runs on the grass"
    assert meteor.score([line], [[line]]).examples == [1.0]
    assert meteor.score(["grass the on runs dog a"], [[line]]).examples[0] < 0.5


def test_the_corpus_is_scored_on_sums_not_on_the_mean(meteor: Meteor) -> None:
    scores = meteor.score(["a dog", "cat"], [["a dog"], ["bird"]])
    assert scores.examples == [1.0, 0.0]
    # Content words count 0.75, function words 0.25: 1.0 of 1.75 on both sides, in no fragment.
    assert scores.corpus == pytest.approx(1.0 / 1.75)


def test_missing_tables_make_the_metric_absent(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(MetricUnavailable, match=r"meteor-1\.5\.jar.*gill\[captions\]"):
        Meteor(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetricUnavailable, match="pycocoevalcap"):
        Meteor()


def test_lists_that_do_not_belong_together_are_refused(meteor: Meteor) -> None:
    for hypotheses, references, words in [
        (["a"], [], "references of 0"),
        ([], [], "no sentence"),
        (["a", "b"], [["a"], []], "sentence 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            meteor.score(hypotheses, references)
