"""A caption table is checked once; every later stage reads only what passed.

Each row of the source is either kept or written down with file, row and reason. The checked
table (`corpora.caption_table`), the list of excluded rows and the summary appear together, and
only when the whole source has been read.
"""

import gc
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

from corpora.caption_params import CaptionParams
from corpora.caption_report import CaptionReport, ExclusionWriter, Tally
from corpora.caption_sources import open_source
from corpora.caption_table import (
    DOCUMENTS,
    SPLITS,
    CaptionTable,
    CaptionTableWriter,
    CheckedRow,
)
from corpora.document_table import DocumentPictures
from corpora.picture_checks import PictureChecks
from corpora.picture_paths import PicturePaths
from corpora.picture_verdicts import Verdict
from corpora.records import SPLIT_NAMES, CaptionTableError, Exclusion
from corpora.references import is_file_address, is_url
from corpora.source_rows import CaptionSource, SourceRow
from corpora.visible_text import CONTROLS, is_visible
from gill_files import written_whole

__all__ = [
    "CaptionParams",
    "CaptionReport",
    "CaptionTable",
    "CaptionTableError",
    "CheckProgress",
    "check_captions",
]

_BLOCK_ROWS = 1024
_COLLECTED_AFTER = 50_000  # new objects, of which rows have a handful

_Rows = list[SourceRow | Exclusion]
_Answers = Callable[[], dict[str, Verdict]]


class CheckProgress(NamedTuple):
    """How far a check has come; `fraction` of the source read, `seconds` since the start."""

    rows: int
    excluded: int
    fraction: float
    seconds: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def eta(self) -> float:
        """Seconds left, if the rest goes like what is done."""
        return self.seconds * (1 / self.fraction - 1) if self.fraction else float("inf")

    def __str__(self) -> str:
        return (
            f"{self.fraction:.0%}, {self.rows} rows, {self.excluded} excluded, "
            f"{self.rate:.0f} rows/s, {self.eta:.0f} s left"
        )


def check_captions(
    params: CaptionParams,
    out: Path,
    progress: Callable[[CheckProgress], None] | None = None,
    *,
    journal: Path | None = None,
    workers: int = 0,
    documents: DocumentPictures | None = None,
) -> CaptionReport:
    """Checks a caption table and writes, beside each other and each of them atomically,

        OUT.parquet        the kept rows in the order of the source
        OUT.report.json    the CaptionReport
        OUT.excluded.tsv   file, row, reason and detail of each row that was left out
        documents.jsonl    where there are any, the documents whose pictures are rows of OUT
    `out` names the first of them. The same source gives the same bytes. Rows added at the end of a
    source leave the earlier rows of the table as they were.

    journal: keeps the verdicts on the pictures, so that the next check is cheap; by default
        OUT.pictures.sqlite. Beside it lie the shards that had to be unpacked.
    workers: threads that check pictures; 0: one per core.
    documents: their pictures become rows behind all others, of a split of their own.

    Raises:
        CaptionTableError: the source cannot be used, or no row of it can.
    """
    journal = journal or out.with_suffix(".pictures.sqlite")
    source = open_source(params, journal.with_name("unpacked"))
    paths = PicturePaths(source.root, allow_outside=params.allow_outside, own=source.files)
    started = time.monotonic()
    tally = Tally()
    with (
        _rare_collections(),
        PictureChecks(
            journal,
            params.check,
            params.max_pixels,
            workers,
        ) as pictures,
        CaptionTableWriter(out, source.root) as table,
        ExclusionWriter(out.with_suffix(".excluded.tsv")) as excluded,
    ):
        rows = _checked_rows(source, params, paths, pictures, tally)
        if documents is not None:
            theirs = _document_rows(documents, source.root, params, pictures, tally)
            place = out.with_name("documents.jsonl")
            rows = itertools.chain(rows, theirs, documents.write(place))
        for row in rows:
            if isinstance(row, Exclusion):
                excluded.append(row)
                tally.add_excluded(row)
            else:
                table.append(row)
                tally.add_kept(row)
            if progress is not None and tally.rows % _BLOCK_ROWS == 0:
                seconds = time.monotonic() - started
                progress(CheckProgress(tally.rows, tally.excluded, tally.fraction, seconds))
        if progress is not None:
            progress(CheckProgress(tally.rows, tally.excluded, 1.0, time.monotonic() - started))
        excluded.close()
        fingerprint = table.close() if tally.kept else ""
        report = tally.report(params, source, fingerprint)
    _write_json(asdict(report), out.with_suffix(".report.json"))
    if not report.kept:
        raise CaptionTableError(
            _nothing_left(report, out.with_suffix(".excluded.tsv"), paths.outside_folder)
        )
    return report


def split_of(image: str, val_fraction: float, test_fraction: float) -> str:
    """The split of an image, from a hash of its path: the same for all its captions, in every
    run and on every machine. A larger fraction keeps what a smaller one had chosen."""
    digest = hashlib.blake2b(image.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place >= 1 - val_fraction else "train"


def _checked_rows(
    source: CaptionSource,
    params: CaptionParams,
    paths: PicturePaths,
    pictures: PictureChecks,
    tally: Tally,
) -> Iterator[CheckedRow | Exclusion]:
    seen, seen_ids = _Seen(), _Seen()
    coming: tuple[_Rows, _Rows, _Answers, float] = ([], [], dict, 0.0)
    # While the pictures of a block are looked at, the rows of the one before are judged: those who
    # look always have a block waiting.
    for block in itertools.chain(_blocks(source, _BLOCK_ROWS), [[]]):
        cleaned = [
            row if isinstance(row, Exclusion) else _clean(row, params, paths) for row in block
        ]
        images = [row.image for row in cleaned if isinstance(row, SourceRow)]
        written_rows, rows, answers, tally.fraction = coming
        coming = block, cleaned, _look_up(images, paths, pictures), source.fraction()
        verdicts = answers()
        verdicts |= _respell(rows, verdicts, paths, pictures, tally)
        for written, row in zip(written_rows, rows):
            if isinstance(row, SourceRow):
                checked = _judge(row, verdicts[row.image], seen, seen_ids, params)
                if isinstance(checked, CheckedRow):
                    tally.captions_cleaned += checked.caption != written.caption  # type: ignore[union-attr]
                yield checked
            else:
                yield row


def _document_rows(
    documents: DocumentPictures,
    root: str,
    params: CaptionParams,
    pictures: PictureChecks,
    tally: Tally,
) -> Iterator[CheckedRow | Exclusion]:
    paths = PicturePaths(documents.root, allow_outside=params.allow_outside)
    for row in _checked_rows(documents, params, paths, pictures, tally):
        if isinstance(row, CheckedRow):
            documents.rows[row.id] = tally.kept  # the next row of the table
            folder, name = os.path.split(os.path.join(paths.root, row.image))
            # Without links: a step up from within a linked folder leads elsewhere.
            image = os.path.relpath(os.path.realpath(folder), os.path.realpath(root))
            image = os.path.join(image, name)
            row = row._replace(image=image, split=DOCUMENTS)
        yield row


def _look_up(images: Iterable[str], paths: PicturePaths, pictures: PictureChecks) -> _Answers:
    references = {image: os.path.join(paths.root, image) for image in images}
    wait = pictures.ask(references.values())

    def answers() -> dict[str, Verdict]:
        verdicts = wait()
        return {image: verdicts[reference] for image, reference in references.items()}

    return answers


def _respell(
    rows: _Rows,
    verdicts: dict[str, Verdict],
    paths: PicturePaths,
    pictures: PictureChecks,
    tally: Tally,
) -> dict[str, Verdict]:
    """Rows whose picture has another name get that name; the verdicts on those and on the rest."""
    missing = [image for image, verdict in verdicts.items() if verdict.kind == "missing"]
    meant = {image: name for image in missing if (name := paths.find(image)) is not None}
    new = [name for name in meant.values() if name not in verdicts]
    changed = _look_up(new, paths, pictures)()
    for image in missing:
        if image not in meant:
            verdict = verdicts[image]
            changed[image] = verdict._replace(detail=verdict.detail + paths.hint(image))
    for place, row in enumerate(rows):
        if isinstance(row, SourceRow) and row.image in meant:
            rows[place] = row._replace(image=meant[row.image])
            tally.paths_respelled += 1
    return changed


def _clean(row: SourceRow, params: CaptionParams, paths: PicturePaths) -> SourceRow | Exclusion:
    """Collapses white space and control characters, and refuses what no picture can mend."""

    def excluded(reason: str, detail: str = "") -> Exclusion:
        return Exclusion(row.file, str(row.row), reason, detail)

    try:
        "".join((row.image, row.caption, row.id or "", row.split or "")).encode()
    except UnicodeEncodeError:
        return excluded("bad encoding", "half of a surrogate pair")
    caption = " ".join(CONTROLS.sub(" ", row.caption).split())
    if not is_visible(caption):
        why = ": invisible characters alone" if caption else ""
        return excluded("no caption", f"{row.image}{why}")
    if len(caption) > params.max_caption_chars:
        return excluded(
            "caption too long",
            f"{row.image}: {len(caption)} characters, at most {params.max_caption_chars}",
        )
    if not row.image:
        return excluded("no image")
    if is_url(row.image) and not is_file_address(row.image):
        return excluded("url", f"{row.image}: pictures are never downloaded")
    image = paths.inside(row.image)
    if image is None:
        return excluded("outside images_dir", f"{row.image}: not below {paths.root or os.curdir}")
    if row.id == "":
        return excluded("no id")
    split = None if row.split is None else SPLIT_NAMES.get(row.split.lower())
    if split is None and row.split is not None:
        return excluded("unknown split", f"{row.split!r}; known: {', '.join(SPLITS)}")
    return SourceRow(row.file, row.row, image, caption, row.id, split)


def _judge(
    row: SourceRow, verdict: Verdict, seen: "_Seen", seen_ids: "_Seen", params: CaptionParams
) -> CheckedRow | Exclusion:
    def excluded(reason: str, detail: str = "") -> Exclusion:
        return Exclusion(row.file, str(row.row), reason, detail)

    if verdict.kind is not None:
        return excluded(f"picture {verdict.kind}", f"{row.image}: {verdict.detail}")
    if not seen.first(f"{row.image}\0{row.caption}"):
        return excluded("duplicate", f"an earlier row has {row.image} with this caption")
    if row.id is not None and not seen_ids.first(row.id):
        return excluded("duplicate id", row.id)
    return CheckedRow(
        str(row.row) if row.id is None else row.id,
        row.image,
        row.caption,
        row.split or split_of(row.image, params.val_fraction, params.test_fraction),
        row.row,
        verdict.identity,
    )


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Rows make no cycles: looking for some after every 700 objects takes a third of their time."""
    usual = gc.get_threshold()
    gc.set_threshold(_COLLECTED_AFTER, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class _Seen:
    """Which texts have come before, by 64-bit hashes: some 100 bytes a text.

    Python's own hashes (SipHash, keyed by process) do, as none of them is written down.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()

    def first(self, text: str) -> bool:
        before = len(self._hashes)
        self._hashes.add(hash(text))
        return len(self._hashes) > before


def _nothing_left(report: CaptionReport, excluded: Path, outside: str | None) -> str:
    if not report.rows:
        return f"{report.source}: the table has no rows"
    reasons = ", ".join(f"{reason} {n}" for reason, n in report.reasons.items())
    reason = next(iter(report.reasons))
    remedy = report.remedies.get(reason, "")
    if reason == "outside images_dir" and outside is not None:
        remedy = f"set captions.images_dir: {outside}, the folder that they share"
    return (
        f"{report.source}: none of its {report.rows} rows can be used: {reasons}. "
        f"First: {report.examples[reason][0]}. What to do: {remedy}. All of them: {excluded}"
    )


def _write_json(content: dict, path: Path) -> None:
    with written_whole(path) as partial:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        partial.write_text(text, encoding="utf-8")


_T = TypeVar("_T")


def _blocks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
