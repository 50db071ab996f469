"""A candidate index in a folder, saved whole or not at all and checked when it is loaded.

`index.json` names the other files by their content, so replacing it is the one atomic step of a
save: a reader sees the old index or the new one, never a mixture.

    index.json                      settings, fingerprints, size and SHA-256 of the files below
    vectors-<sha>.faiss             the vectors
    candidates-<sha>.parquet        row, with image and caption where known, in the same order

The checks on loading find damage and mix-ups. They do not make a file from a stranger safe: faiss
parses it in native code, so load indexes that you or your pipeline built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from gill_files import force_to_disk, hash_of, written_whole
from gill_records import Record
from pipeline.settings import IndexSettings
from pipeline.talking.retrieval import IndexPart, RetrievalError, RetrievalIndex

RECORD = "index.json"
# The first four bytes of a faiss file name its class (IVF ones sit inside a re-ranking index).
_MAGIC = {
    "flat": {b"IxFI"},
    "hnsw": {b"IHNf"},
    "ivf-sq8": {b"IwSq", b"IxRF"},
    "ivf-pq": {b"IwPf", b"IxRF"},
}


class _File(Record):
    name: str = Field(pattern=r"^[a-z]+-[0-9a-f]{16}\.(faiss|parquet)$")
    bytes: int
    sha256: str


class _Record(Record):
    format: Literal[1] = 1
    settings: IndexSettings
    width: int
    parts: tuple[IndexPart, ...] = Field(min_length=1)
    vectors: _File
    candidates: _File


def save_index(index: RetrievalIndex, folder: Path) -> None:
    """Write the index, whole or not at all. Files that no longer belong to it are removed."""
    if index.is_for_searching_only:
        raise RetrievalError("this index is on a GPU: save the one it was loaded from")
    folder.mkdir(parents=True, exist_ok=True)
    table = index.candidates if index.candidates is not None else pa.table({"row": index.rows})
    # Files first, under names of their own. Killed before the record is replaced, the old index
    # stands beside a file too many, which the next save removes.
    record = _Record(
        settings=index.settings,
        width=index.width,
        parts=index.parts,
        vectors=_write(folder, "vectors", "faiss", lambda p: faiss.write_index(index.vectors, p)),
        candidates=_write(folder, "candidates", "parquet", lambda p: pq.write_table(table, p)),
    )
    body = record.model_dump(mode="json")
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"
    with written_whole(folder / RECORD) as part:
        part.write_text(text)
        force_to_disk(part)
    force_to_disk(folder)
    kept = {RECORD, record.vectors.name, record.candidates.name}
    for pattern in ("vectors-*.faiss", "candidates-*.parquet"):
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink()


def load_index(
    folder: Path, *, heads: str | None = None, features: str | Sequence[str] | None = None
) -> RetrievalIndex:
    """Read a saved index, after checking its record, sizes and checksums.

    `heads` and `features` (a fingerprint per part, in order) are what the caller works with now: an
    index made from others is refused, naming both. None skips that check.

    RetrievalError when a file is missing, damaged or of another kind, or a fingerprint differs.
    """
    record = _read_record(folder)
    _same_origin(folder, "heads", [record.parts[0].heads], heads)
    _same_origin(folder, "features", [part.features for part in record.parts], features)
    # Size and hash before faiss sees a byte: its parser is native code.
    vectors_file = _verified(folder, record.vectors)
    with open(vectors_file, "rb") as file:
        magic = file.read(4)
    if magic not in _MAGIC[record.settings.kind]:
        raise RetrievalError(
            f"{vectors_file} begins with {magic!r}, not with the mark of {record.settings.kind}"
        )
    # Not read_table, which imports pyarrow.dataset and with it pandas, where that is installed.
    table = pq.ParquetFile(_verified(folder, record.candidates)).read()
    vectors = faiss.read_index(str(vectors_file))
    rows = np.ascontiguousarray(table["row"].to_numpy(), dtype=np.int64)
    if (vectors.ntotal, vectors.d) != (len(rows), record.width):
        raise RetrievalError(
            f"{vectors_file} holds {vectors.ntotal} vectors of width {vectors.d}, but {folder} "
            f"records {len(rows)} of width {record.width}; build the index again"
        )
    candidates = table if "image" in table.column_names else None
    return RetrievalIndex(vectors, rows, record.settings, record.parts, candidates)


def _same_origin(
    folder: Path, what: str, recorded: Sequence[str], current: str | Sequence[str] | None
) -> None:
    if current is None:
        return
    given = [current] if isinstance(current, str) else list(current)
    if list(recorded) != given:
        raise RetrievalError(
            f"the index in {folder} was built from {what} {', '.join(recorded)}, but "
            f"the current {what} are {', '.join(given)}: build the index again, or use what it "
            "was built from"
        )


def _write(folder: Path, stem: str, suffix: str, write: Callable[[str], object]) -> _File:
    """Write a file named by its content."""
    # Its name is its hash, known only when it is written.
    new = folder / f"{stem}.new"
    with written_whole(new) as part:
        write(str(part))
        force_to_disk(part)
    digest = hash_of(new)
    written = new.rename(folder / f"{stem}-{digest[:16]}.{suffix}")
    return _File(name=written.name, bytes=written.stat().st_size, sha256=digest)


def _read_record(folder: Path) -> _Record:
    path = folder / RECORD
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise RetrievalError(f"{path} does not match its own checksum; build the index again")
        return _Record.model_validate(body)
    except FileNotFoundError as error:
        raise RetrievalError(f"there is no index in {folder}: {RECORD} is missing") from error
    except (KeyError, AttributeError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise RetrievalError(f"{path} is not the record of an index: {error}") from error


def _verified(folder: Path, expected: _File) -> Path:
    path = folder / expected.name
    if not path.is_file():
        raise RetrievalError(f"{path} is missing; build the index again")
    size = path.stat().st_size
    if size != expected.bytes:
        raise RetrievalError(
            f"{path} has {size} bytes, {RECORD} records {expected.bytes}; build the index again"
        )
    if hash_of(path) != expected.sha256:
        raise RetrievalError(f"{path} is damaged: its SHA-256 differs; build the index again")
    return path


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
