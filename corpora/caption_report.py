"""The account of a check of captions: what was kept, what was not, why, and what mends it."""

from __future__ import annotations

import array
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from corpora.caption_params import CaptionParams, CheckLevel
from corpora.caption_table import DOCUMENTS, SPLITS, CheckedRow
from corpora.records import Exclusion
from corpora.source_rows import CaptionSource
from corpora.visible_text import CONTROLS

_PLACES = (*SPLITS, DOCUMENTS)
_NUM_EXAMPLES = 3
_SHOWN_REASONS = 3
REMEDIES = {
    "no caption": "write one: white space and invisible characters are none",
    "caption too long": "shorten it, or raise captions.max_caption_chars",
    "no image": "name the picture, or drop the row",
    "several images": "rename the members: a shard's key ends at the first dot",
    "url": "download the pictures first, with img2dataset for one",
    "outside images_dir": "set captions.images_dir to a folder above the pictures, or "
    "captions.allow_outside: true",
    "no id": "give every row an id, or drop the column",
    "unknown split": "write train, val or test",
    "duplicate": "nothing: the earlier row is kept",
    "duplicate id": "give every row an id of its own, or drop the column",
    "wrong number of columns": "take tabs out of the cells; captions.quoting says whether marks "
    "around cells hold them together",
    "broken quoting": "close the quotation mark, or set captions.quoting: literal",
    "bad encoding": "save it as UTF-8, or set captions.encoding",
    "line too long": "look for a quotation mark or a line break that is missing",
    "not JSON": "one record {...} a line",
    "malformed": "look at the cell",
    "unreadable caption": "save it as UTF-8, or as JSON that is whole",
    "unsafe member name": "pack the shard with relative names",
    "damaged shard": "fetch the shard again: what stands before the damage is used",
    "unreadable shard": "fetch the shard again",
    "picture missing": "see captions.images_dir, which the names are relative to",
    "picture url": "download the pictures first",
    "picture empty": "fetch the file again",
    "picture truncated": "fetch the file again",
    "picture unreadable": "fetch or convert the file",
    "picture unsupported": "convert it, to PNG for one, or install what the row names",
    "empty document": "drop the line, or fill it",
    "document without pictures": "train on captions, or on documents with pictures",
    "document without text": "write texts, or captions of its pictures",
    "picture too large": "make it smaller, or raise captions.max_pixels",
}
"""Reason -> what a person can do about it."""


@dataclass(frozen=True)
class CaptionReport:
    """The summary of a check.

    `files` are the source's own, without pictures. For each reason for which rows were excluded,
    `reasons` counts them, `examples` has the first three and `remedies` what mends them.
    `pictures_in_several_splits` counts pictures (by identity) that the kept rows put into more
    than one split, so that the splits leak; `paths_respelled` counts rows whose picture was found
    under another spelling of its name.
    """

    source: str
    files: tuple[str, ...]
    check: CheckLevel
    fingerprint: str
    rows: int
    kept: int
    excluded: int
    reasons: dict[str, int]
    examples: dict[str, tuple[str, ...]]
    remedies: dict[str, str]
    splits: dict[str, int]
    captions_cleaned: int
    paths_respelled: int
    pictures: int
    pictures_in_several_splits: int
    ignored_columns: tuple[str, ...]

    def lines(self, excluded: Path) -> list[str]:
        """What a person sees, in five lines at most; `excluded` is the list of all such rows."""
        also = f", {self.paths_respelled} pictures found by another spelling of their names"
        lines = [
            f"{self.source}: {self.kept} rows kept, {self.excluded} excluded"
            + (also if self.paths_respelled else "")
        ]
        for reason, count in list(self.reasons.items())[:_SHOWN_REASONS]:
            remedy = f": {self.remedies[reason]}" if reason in self.remedies else ""
            lines.append(f"  {reason} {count}{remedy}. First: {self.examples[reason][0]}")
        if self.excluded:
            more = len(self.reasons) - _SHOWN_REASONS
            lines.append(f"  {f'{more} more reasons; ' if more > 0 else ''}all of them: {excluded}")
        return lines


class Tally:
    """Everything that the report counts, and the fraction of the source that it comes from."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self.rows = self.kept = self.excluded = self.captions_cleaned = self.paths_respelled = 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._splits: Counter[str] = Counter()
        self._pictures = array.array("Q")
        self._split_codes = array.array("B")

    def add_kept(self, row: CheckedRow) -> None:
        """Count a row that stays."""
        self.rows += 1
        self.kept += 1
        self._splits[row.split] += 1
        self._pictures.append(int.from_bytes(row.picture[:8], "little"))
        self._split_codes.append(_PLACES.index(row.split))

    def add_excluded(self, exclusion: Exclusion) -> None:
        """Count a row that is left out, by its reason."""
        self.rows += 1
        self.excluded += 1
        self._reasons[exclusion.reason] += 1
        examples = self._examples.setdefault(exclusion.reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(str(exclusion))

    def report(
        self, params: CaptionParams, source: CaptionSource, fingerprint: str
    ) -> CaptionReport:
        """The report of all that was counted."""
        pictures = np.frombuffer(self._pictures, np.uint64) if self.kept else np.empty(0)
        codes = np.frombuffer(self._split_codes, np.uint8) if self.kept else np.empty(0)
        num_pictures = len(np.unique(pictures))
        in_splits = sum(len(np.unique(pictures[codes == code])) for code in range(len(_PLACES)))
        reasons = dict(self._reasons.most_common())
        return CaptionReport(
            source=params.table,
            files=tuple(source.files),
            check=params.check,
            fingerprint=fingerprint,
            rows=self.rows,
            kept=self.kept,
            excluded=self.excluded,
            reasons=reasons,
            examples={reason: tuple(self._examples[reason]) for reason in reasons},
            remedies={reason: REMEDIES[reason] for reason in reasons if reason in REMEDIES},
            splits={
                split: self._splits[split] for split in _PLACES if split in (*SPLITS, *self._splits)
            },
            captions_cleaned=self.captions_cleaned,
            paths_respelled=self.paths_respelled,
            pictures=num_pictures,
            pictures_in_several_splits=in_splits - num_pictures,
            ignored_columns=source.ignored_columns,
        )


class ExclusionWriter:
    """Writes excluded rows as they come; the file appears when `close` is called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = self._partial.open("w", encoding="utf-8", errors="backslashreplace")
        self._file.write("file\trow\treason\tdetail\n")

    def append(self, exclusion: Exclusion) -> None:
        """Write one line; control characters become spaces."""
        cells = (exclusion.file, exclusion.row, exclusion.reason, exclusion.detail)
        self._file.write("\t".join(CONTROLS.sub(" ", cell) for cell in cells) + "\n")

    def close(self) -> None:
        """Give the file its name."""
        self._file.close()
        os.replace(self._partial, self._path)

    def __enter__(self) -> ExclusionWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)
