"""Against the released annotations (all 1632 rows) and a published worked example of kappa."""

import math
from collections import Counter
from pathlib import Path

import pytest

from corpora.parti_prompts import (
    PartiPrompt,
    VotedPrompt,
    agreed_label,
    fleiss_kappa,
    paper_split,
    percent_agreement,
    read_prompts,
    read_votes,
    write_votes,
)
from corpora.records import CorpusError


@pytest.fixture(scope="module")
def released(shared_data: Path) -> Path:
    return shared_data / "parti_prompts"


@pytest.fixture(scope="module")
def labels(released: Path) -> list[str]:
    """Those released with the paper, in the order of the prompts."""
    lines = (released / "PartiPromptsDecisionsConfident.tsv").read_text("utf-8").splitlines()
    assert lines[0].split("\t")[4] == "Decision"
    return [line.split("\t")[4] for line in lines[1:]]


def test_the_agreement_rule_gives_the_released_labels(released: Path, labels: list[str]) -> None:
    voted = read_votes(released / "PartiPromptsAllDecisions_Alignment.tsv")
    assert [agreed_label(row.votes) for row in voted] == labels
    assert Counter(labels) == {"gen": 592, "ret": 319, "same": 721}
    assert Counter(len(row.votes) for row in voted) == {5: 1630, 4: 2}


def test_votes_are_on_the_prompts_of_the_benchmark(released: Path) -> None:
    prompts = read_prompts(released / "PartiPrompts.tsv")
    assert len(prompts) == 1632
    assert prompts[0] == PartiPrompt(
        "bond", "Abstract", "Basic", "Biology-inspired concepts with multiple meanings"
    )
    assert prompts[1560].prompt.startswith('"G I G G L E" painted in thick')
    voted = read_votes(released / "PartiPromptsAllDecisions_Realism.tsv")
    assert [row.prompt.prompt for row in voted] == [row.prompt for row in prompts]


def test_writing_gives_back_the_bytes_that_were_read(released: Path, tmp_path: Path) -> None:
    voted = released / "PartiPromptsAllDecisions_Alignment.tsv"
    write_votes(tmp_path / "votes.tsv", read_votes(voted))
    assert (tmp_path / "votes.tsv").read_bytes() == voted.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["votes.tsv"]


def test_paper_split_has_the_class_counts_of_appendix_c(labels: list[str]) -> None:
    train, test = paper_split(labels)
    assert len(train) == 600
    assert Counter(labels[position] for position in test) == {"gen": 201, "ret": 110}
    assert not set(train) & set(test)
    assert "same" not in {labels[position] for position in train}


@pytest.mark.parametrize(
    ("votes", "label"),
    [
        ("gen gen gen gen gen", "gen"),
        ("gen gen gen same ret", "gen"),
        ("ret gen ret ret same", "ret"),
        ("ret ret gen ret gen", "same"),
        ("ret ret same same gen", "same"),
        ("same same same same same", "same"),
        ("gen gen gen", "gen"),
    ],
)
def test_agreed_label(votes: str, label: str) -> None:
    assert agreed_label(votes.split()) == label


# 10 subjects, 14 raters, 5 answers: the worked example of the encyclopedia article "Fleiss' kappa".
WORKED_EXAMPLE = [
    (0, 0, 0, 0, 14),
    (0, 2, 6, 4, 2),
    (0, 0, 3, 5, 6),
    (0, 3, 9, 2, 0),
    (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2),
    (6, 5, 2, 1, 0),
    (0, 2, 2, 3, 7),
]


def test_fleiss_kappa_of_the_worked_example() -> None:
    votes = [
        [str(answer) for answer, number in enumerate(row) for _ in range(number)]
        for row in WORKED_EXAMPLE
    ]
    assert percent_agreement(votes) == pytest.approx(0.378, abs=5e-4)
    assert fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)


def test_agreement_of_few_votes() -> None:
    assert percent_agreement([["gen", "gen"], ["gen", "ret"], ["same"]]) == 0.5
    assert fleiss_kappa([["gen", "gen"], ["ret", "ret"]]) == 1.0
    assert math.isnan(fleiss_kappa([["gen", "gen"]]))  # one answer: chance explains it
    with pytest.raises(ValueError, match="two votes"):
        percent_agreement([["gen"]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Prompt\tCategory\n", r"votes\.tsv: the header is .*without Decisions"),
        ("a dog\na cat\n", r"votes\.tsv: the header is .*without Prompt, Decisions"),
        ("Prompt\tDecisions\n\tgen\n", r"tsv:2: no prompt"),
        ("Prompt\tCategory\tChallenge\tNote\tDecisions\na\tb\tc\td\n", r"tsv:2: 4 fields"),
        (
            "Prompt\tCategory\tChallenge\tNote\tDecisions\na\tb\tc\td\tgen\na\tb\tc\td\tgen,yes\n",
            r"tsv:3: vote 'yes'",
        ),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "votes.tsv").write_text(text)
    with pytest.raises(CorpusError, match=message):
        read_votes(tmp_path / "votes.tsv")


def test_what_the_format_cannot_store_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "votes.tsv"
    path.write_text("old")
    with pytest.raises(CorpusError, match="line break"):
        write_votes(path, [VotedPrompt(PartiPrompt("a\nb", "", "", ""), ("gen",))])
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfPrompt\tCategory\tChallenge\tNote\na dog\tAnimals\tBasic\t\n",
        b"Prompt\tCategory\tChallenge\tNote\r\na dog\tAnimals\tBasic\t\r\n\r\n",
        b"note\tPROMPT\tcategory\tchallenge\n\ta dog\tAnimals\tBasic\n\n",
        "\ufeffPrompt\tCategory\tChallenge\na dog\tAnimals\tBasic\n".encode("utf-16-le"),
        b"Prompt\tCategory\tChallenge\tNote\ra dog\tAnimals\tBasic\t\r",
        b"Prompt,Category,Challenge,Note\na dog,Animals,Basic,\n",
        b'"Category";"Prompt";"Challenge"\r\n"Animals";"a dog";"Basic"\r\n',
    ],
)
def test_prompts_as_others_write_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "prompts.tsv").write_bytes(data)
    [prompt] = read_prompts(tmp_path / "prompts.tsv")
    assert prompt == PartiPrompt("a dog", "Animals", "Basic", "")


@pytest.mark.parametrize("header", ["", "Prompt\n", "\ufeff", "\ufeffprompt\r\n"])
def test_a_plain_list_of_prompts(tmp_path: Path, header: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f'{header}a dog\n"a" cat, and more\n\n', encoding="utf-8", newline="")
    assert [row.prompt for row in read_prompts(path)] == ["a dog", '"a" cat, and more']


def test_marks_of_a_program_are_taken_off_and_those_of_a_prompt_stay(tmp_path: Path) -> None:
    path = tmp_path / "prompts.tsv"
    for text, prompts in (
        ('Prompt\tNote\n"a ""big"" dog"\t\na cat\t"x ""y"""\n', ['a "big" dog', "a cat"]),
        ('Prompt,Note\n"a dog, ""big""",\na cat,\n', ['a dog, "big"', "a cat"]),
        ('Prompt\tNote\n"a ""big"" dog"\t\n"a" cat\t\n', ['"a ""big"" dog"', '"a" cat']),
        ('Prompt\tNote\n"STOP"\t\na cat\t\n', ['"STOP"', "a cat"]),
    ):
        path.write_text(text)
        assert [row.prompt for row in read_prompts(path)] == prompts
    for text in ('Prompt,Note\n"a dog,\n', '{"prompt": "a dog"}\n'):
        path.write_text(text)
        with pytest.raises(CorpusError, match=str(path)):
            read_prompts(path)


def test_votes_as_others_write_them(tmp_path: Path) -> None:
    path = tmp_path / "votes.tsv"
    path.write_bytes(b"\xef\xbb\xbfprompt\tdecisions\r\na dog\tGEN, ret,same\r\n\r\n")
    assert read_votes(path) == [
        VotedPrompt(PartiPrompt("a dog", "", "", ""), ("gen", "ret", "same"))
    ]


def test_the_collected_prompts(shared_data: Path) -> None:
    folder = shared_data / "awkward_inputs/prompts"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    found = {f.name: [row.prompt for row in read_prompts(f)] for f in folder.iterdir()}
    assert found == {
        "blank_end.tsv": ["a dog"],
        "bom.tsv": ["a dog"],
        "plain.txt": ["a dog", "a cat"],
    }
