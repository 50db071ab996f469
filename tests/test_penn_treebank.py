"""Words as Stanford CoreNLP 3.4.1 (`PTBTokenizer -lowerCase`) gave them, less the punctuation."""

import pytest

from evaluation.metrics.penn_treebank import treebank_words

RECORDED = [
    ("A man riding on the back of a brown horse.", "a man riding on the back of a brown horse"),
    (
        "A man can't, won't and shouldn't ride; I'm gonna say it's the dogs' park.",
        "a man ca n't wo n't and should n't ride i 'm gon na say it 's the dogs park",
    ),
    (
        "\"Hello,\" she said, 'what's up?' he'd asked. They'll've gone; y'all should've known.",
        "hello she said what 's up he 'd asked they 'll 've gone y' all should 've known",
    ),
    (
        "The U.S. Army arrives at 5:30 p.m. on Main St. near Dr. Smith's house.",
        "the u.s. army arrives at 5:30 p.m. on main st. near dr. smith 's house",
    ),
    (
        "It costs $5.50 or £3, 50% off, 1/2 price, 3,000 people, #1 store & AT&T.",
        "it costs $ 5.50 or # 3 50 % off 1/2 price 3,000 people # 1 store & at&t",
    ),
    (
        "A black/white photo (in a frame) [small] {tiny} -- nice - or so... ok . . . fine… yes—no.",
        "a black/white photo -lrb- in a frame -rrb- -lsb- small -rsb- -lcb- tiny -rcb-"
        " nice or so ok fine yes no",
    ),
    (
        "He has a 6' tall 2nd cousin in the 1990's and the '90s with 10-year-old kids, T-shirt.",
        "he has a 6 tall 2nd cousin in the 1990 's and the '90s with 10-year-old kids t-shirt",
    ),
    ("“curly quotes” ‘single’ it’s don’t café", "curly quotes single it 's do n't café"),
    (
        "cannot wanna gimme gotta lemme 'tis 'twas ma'am o'clock",
        "can not wan na gim me got ta lem me 't is 't was ma'am o'clock",
    ),
    (
        "Wow!! Really?! Yes!!! A tea cup full of tea..",
        "wow !! really ?! yes !!! a tea cup full of tea",
    ),
    ("No. 5 is it? No.", "no. 5 is it no"),
    ("well...  yes.. <b>bold</b>  - -- --- <UNK>", "well yes <b> bold </b> <unk>"),
    ("日本語 テスト", "日本語 テスト"),
    ("...", ""),
    ("", ""),
]


@pytest.mark.parametrize(("caption", "words"), RECORDED)
def test_words_are_those_of_the_reference_tokeniser(caption: str, words: str) -> None:
    assert treebank_words(caption) == words.split()


def test_a_very_long_caption_takes_no_more_than_its_length() -> None:
    # Where a pattern backtracks over all it has read, a million letters never end.
    assert treebank_words("a" * 1_000_000) == ["a" * 1_000_000]
    assert treebank_words("<a" * 100_000).count("<") == 100_000
    assert treebank_words("a-" * 100_000)[0].startswith("a-a-")
    assert treebank_words(". " * 100_000) == []
