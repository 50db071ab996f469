"""What the evaluation found, in two files: results.json (one row per number) and records.parquet
(one row per example).

A result says on how many of how many examples it ran, how uncertain it is, what the paper prints
in its place, and where it is absent, why. Shares (recall, accuracy, F1, BLEU) lie between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gill_errors import StageError
from gill_files import written_whole


@dataclass(frozen=True)
class Result:
    """One number of one table, or why it is absent."""

    table: str
    """As in the paper: `table_1` to `table_8`, `figure_6`, `figure_8`, `latency` (appendix E.4);
    `captions` and `retrieval` are the run's own caption table."""
    set: str
    """The examples: `story_5_pictures`, `dialogue_10`, `coco_captions`, ..."""
    title: str
    """The same for people."""
    method: str
    """`generator` (its own text encoder), `gill`, `clip`, ..."""
    metric: str
    """`clip_similarity`, `lpips`, `fid`, `oracle_attributes`, `recall_at_1`, `bleu_4`, ..."""
    value: float | None
    standard_error: float | None
    low: float | None
    """Lower end of the bootstrap interval (95%) over examples."""
    high: float | None
    examples: int
    """How many were measured."""
    of: int
    """How many the files offered, before exclusions and limits."""
    published: float | None = None
    absent: str | None = None
    """Why `value` is None."""
    ceiling: float | None = None
    """The most that what was read can tell (`evaluation.ceilings`), where that is known."""


@dataclass(frozen=True)
class Record:
    """One example of one set, with what every method made of it."""

    set: str
    id: str
    prompt: str
    """What the generator's own text encoder reads, or the question."""
    context: tuple[dict[str, str], ...]
    """What GILL reads, in order: {"text": ...}, {"picture": reference}, {"answer": reference} for a
    picture that it answered with before, or {"image_tokens": ""} for those of an own picture."""
    real: str | None = None
    """The real picture: a path or `shard.tar#member`, as `corpora.pictures.open_picture` takes."""
    scene: str | None = None
    """The truth in words, on the miniature world."""
    references: tuple[str, ...] = ()
    """People's captions or answers."""
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Method to file; `retrieved` is the nearest candidate of the index."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Method to caption or answer."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """`METHOD.METRIC` to the example's own number, such as `gill.clip_similarity`."""


_FOLDED = ("pictures", "texts", "scores")
_AS_JSON = ("context", "references")


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write results.json, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[Result]:
    """Raises StageError when the file is missing or of another version."""
    try:
        return [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise StageError(f"{path} is missing: run `stages evaluate`") from None
    except (ValueError, TypeError) as error:
        raise StageError(f"{path} cannot be read ({error}): run `stages evaluate` again") from None


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records.parquet, whole or not at all.

    Columns: set, id, prompt, context (JSON), real, scene, references (JSON), and `pictures.METHOD`,
    `texts.METHOD`, `scores.METHOD.METRIC`, null where a set does not have them.
    """
    rows = [_flat(record) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = [name for name in names if not name.startswith("scores.")]
    schema = pa.schema([(name, pa.string() if name in text else pa.float64()) for name in names])
    columns = {name: [row.get(name) for row in rows] for name in names}
    with written_whole(path) as part:
        pq.write_table(pa.table(columns, schema=schema), part)


def read_records(path: Path) -> list[Record]:
    """Raises StageError when the file is missing."""
    try:
        rows = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise StageError(f"{path} is missing: run `stages evaluate`") from None
    return [_unfolded(row) for row in rows]


def _flat(record: Record) -> dict[str, Any]:
    row = dict(vars(record))
    row |= {name: json.dumps(row[name], ensure_ascii=False) for name in _AS_JSON}
    for name in _FOLDED:
        row |= {f"{name}.{key}": value for key, value in row.pop(name).items()}
    return row


def _unfolded(row: dict[str, Any]) -> Record:
    values: dict[str, Any] = {name: {} for name in _FOLDED}
    for column, value in row.items():
        name, dot, key = column.partition(".")
        if name in _AS_JSON:
            values[name] = tuple(json.loads(value))
        elif not dot:
            values[name] = value
        elif value is not None:
            values[name][key] = value
    return Record(**values)
