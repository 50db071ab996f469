"""PartiPrompts, the votes of people on it, and the label that the votes agree on.

    PartiPrompts.tsv                 Prompt Category Challenge Note             -> PartiPrompt
    PartiPromptsAllDecisions_*.tsv   ... Decisions ("ret,gen,gen,same,gen")     -> VotedPrompt

A vote says which picture suits the prompt better: the generated one ("gen"), the retrieved one
("ret"), or neither more than the other ("same"). Paper: section 3.3, appendices C and F.

The released files are raw tab-separated text without a quoting convention: one prompt begins with
a quotation mark that belongs to it, and a CSV reader would drop it. Reading and writing give the
same bytes back. What a program saved anew with commas, or with all its marks quoted, is read so.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from corpora.records import CorpusError
from corpora.text_files import marked_encoding
from gill_errors import InputError
from gill_files import written_whole

_PROMPT_COLUMNS = ("Prompt", "Category", "Challenge", "Note")
_VOTE_COLUMNS = (*_PROMPT_COLUMNS, "Decisions")
_VOTES = ("gen", "ret", "same")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class PartiPrompt:
    """One prompt of the benchmark, for example ("bond", "Abstract", "Basic", "Biology-...")."""

    prompt: str
    category: str
    challenge: str
    note: str


@dataclass(frozen=True, slots=True)
class VotedPrompt:
    """A prompt and one vote per annotator, in the order of the annotators."""

    prompt: PartiPrompt
    votes: tuple[str, ...]


def read_prompts(path: Path) -> list[PartiPrompt]:
    """The prompts of PartiPrompts.tsv, or of a list with a prompt a line.

    CorpusError names the file, the line and what is wrong.
    """
    return _read(path, ("Prompt",), _prompt)


def read_votes(path: Path) -> list[VotedPrompt]:
    """Prompts with all votes, as released with the paper (column `Decisions`, comma-separated)."""

    def record(cells: dict[str, str]) -> VotedPrompt:
        votes = tuple(vote.strip().lower() for vote in cells["Decisions"].split(","))
        for vote in votes:
            if vote not in _VOTES:
                raise InputError(f"vote {vote!r} is none of {', '.join(_VOTES)}")
        return VotedPrompt(_prompt(cells), votes)

    return _read(path, ("Prompt", "Decisions"), record)


def _prompt(cells: dict[str, str]) -> PartiPrompt:
    return PartiPrompt(*(cells.get(name, "") for name in _PROMPT_COLUMNS))


def write_votes(path: Path, rows: Iterable[VotedPrompt]) -> None:
    """Write what `read_votes` reads, whole or not at all."""
    lines = ["\t".join(_VOTE_COLUMNS)]
    for row in rows:
        prompt = row.prompt
        fields = (prompt.prompt, prompt.category, prompt.challenge, prompt.note)
        for field in fields:
            if any(character in field for character in "\t\n\r"):
                raise CorpusError(
                    f"{path}: {field!r} holds a tab or a line break, which this format cannot store"
                )
        lines.append("\t".join((*fields, ",".join(row.votes))))
    with written_whole(path) as partial:
        partial.write_bytes(("\n".join(lines) + "\n").encode())


def agreed_label(votes: Sequence[str]) -> str:
    """The label on which the annotators agree, or "same".

    A side wins with at least 3 votes when at most 1 vote goes to the other side; a vote "same" is
    counted as agreement. This is the rule behind the released labels, on all 1632 prompts (592 gen,
    319 ret, 721 same); "an inter-annotator agreement of at least 4/5" in appendix F.

    gen,gen,gen,same,ret -> gen      ret,ret,gen,ret,gen -> same      ret,ret,same,same,gen -> same
    """
    count = Counter(votes)
    for side, other in (("gen", "ret"), ("ret", "gen")):
        if count[side] >= 3 and count[other] <= 1:
            return side
    return "same"


def paper_split(labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Positions of the training and the test prompts, those labelled "same" being in neither.

    The confident prompts in file order: the first 600 of the released 911 train, the last 311 test
    (of another number, the first 600/911). That gives the 201 "gen" and 110 "ret" of appendix C,
    which are behind the two ranges of Table 6. How the authors drew their split is not written
    down, and the first two rows of that table need 198 "gen" and 113 "ret", which the *first* 311
    have. The file is ordered by category, so this split also asks for some generalisation.
    """
    confident = [position for position, label in enumerate(labels) if label in ("gen", "ret")]
    cut = round(len(confident) * 600 / 911)
    return confident[:cut], confident[cut:]


def percent_agreement(votes: Sequence[Sequence[str]]) -> float:
    """Share of the pairs of annotators who gave the same vote, averaged over the prompts (0 to 1).

    Prompts with fewer than two votes say nothing about agreement and are left out. ValueError when
    none is left.
    """
    shares = [_pair_agreement(Counter(row)) for row in votes if len(row) >= 2]
    if not shares:
        raise InputError("agreement needs at least one prompt with two votes")
    return sum(shares) / len(shares)


def fleiss_kappa(votes: Sequence[Sequence[str]]) -> float:
    """Fleiss' kappa: agreement beyond the chance that the shares of the answers give (1 = perfect).

    J. L. Fleiss, "Measuring nominal scale agreement among many raters", 1971; where prompts have
    unequal numbers of votes, chance is taken from the shares over all votes. NaN when every vote is
    the same answer, where chance explains everything. ValueError as `percent_agreement`.
    """
    observed = percent_agreement(votes)
    total = Counter(vote for row in votes if len(row) >= 2 for vote in row)
    number = sum(total.values())
    chance = sum((count / number) ** 2 for count in total.values())
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def _pair_agreement(count: Counter[str]) -> float:
    number = sum(count.values())
    return sum(n * (n - 1) for n in count.values()) / (number * (number - 1))


def _read(
    path: Path, needed: tuple[str, ...], record: Callable[[dict[str, str]], _Record]
) -> list[_Record]:
    """The rows as {column: cell}. Columns may stand in any order and case, and but for the needed
    ones be absent; one column without a header is a list of prompts."""
    data = path.read_bytes()
    try:
        text = data.decode(marked_encoding(data[:4]))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    try:
        lines = list(_lines(text))
    except csv.Error as error:
        raise CorpusError(f"{path}: {error}") from error
    if lines and lines[0][1][0].startswith('{"'):
        raise CorpusError(f"{path}: JSON; expected a table of tabs or commas, or a prompt a line")
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    names = {name.casefold(): name for name in _VOTE_COLUMNS} | {"prompts": "Prompt"}
    columns = [names.get(cell.casefold(), cell) for cell in header]
    absent = [name for name in needed if name not in columns]
    if lines and absent == ["Prompt"] and len(header) == 1:
        columns, absent = ["Prompt"], []
    else:
        lines = lines[1:]
    if absent:
        raise CorpusError(
            f"{path}: the header is {tuple(header)}, without {', '.join(absent)}; expected "
            f"{', '.join(_VOTE_COLUMNS if 'Decisions' in needed else _PROMPT_COLUMNS)}, separated "
            "by tabs"
        )
    rows = []
    for number, fields in lines:
        if len(fields) != len(columns):
            raise CorpusError(
                f"{path}:{number}: {len(fields)} fields, expected {len(columns)} separated by tabs"
            )
        cells = dict(zip(columns, fields))
        try:
            if not cells["Prompt"].strip():
                raise InputError("no prompt")
            rows.append(record(cells))
        except ValueError as error:
            raise CorpusError(f"{path}:{number}: {error}") from error
    return rows


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of every line that holds something, with its number."""
    lines = re.split("\r\n|\n|\r", text)
    first = next((line for line in lines if line.strip()), "")
    of_header = {
        mark: {cell.strip(' "').casefold() for cell in first.split(mark)} for mark in "\t,;"
    }
    delimiter = next((mark for mark, cells in of_header.items() if "prompt" in cells), "\t")
    marked = [cell for line in lines for cell in line.split("\t") if '"' in cell]
    doubled = first.startswith('"') or any('""' in cell[1:-1] for cell in marked)
    if delimiter != "\t" or (doubled and all(map(_QUOTED.fullmatch, marked))):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        yield from ((reader.line_num, cells) for cells in reader if "".join(cells).strip())
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.split("\t")
