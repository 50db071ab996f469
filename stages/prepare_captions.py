"""Stage prepare-captions: the miniature world drawn, or the user's own table checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from corpora.caption_table import CaptionTable
from corpora.captions import CaptionReport, check_captions
from corpora.document_table import DocumentPictures
from corpora.references import file_of
from gill.artifacts import ARTIFACTS, INPUTS
from gill.world import have_world
from gill_progress import Ticker
from settings.params import Params
from stages.init import link_code
from stages.required import write_without_content
from workfolder import MOST_FILES, WorkFolder, bring_from_repository, watch_files


def run(params: Params) -> None:
    """Write the checked caption table, its report, and the list of excluded rows."""
    section = params.captions
    work = WorkFolder.open(params.run.work)
    if (INPUTS / "code").is_symlink():
        link_code()
    if params.is_miniature:
        table = str(have_world(work, ARTIFACTS.miniature, section.miniature.model_dump()))
    else:
        table = section.table
        bring_from_repository([table, section.images_dir])
    named = section.documents
    bring_from_repository([named.file, named.images_dir])
    documents = None
    if named.file is None:
        write_without_content(ARTIFACTS.documents)
    else:
        captions = section.for_table(table)
        documents = DocumentPictures(captions, named.file, named.images_dir)
    report = check_table(work, params, table, ARTIFACTS.captions, documents)
    own = {} if named.file is None else {"documents": Path(named.file)}
    notes = (
        watch_files(INPUTS / "captions", own)
        if params.is_miniature
        else watch_table(INPUTS / "captions", report.files, CaptionTable(ARTIFACTS.captions), own)
    )
    print("\n".join(report.lines(ARTIFACTS.captions.with_suffix(".excluded.tsv"))))
    for note in (*notes, *unmet_needs(report.splits, params)):
        print(f"  {note}")


def unmet_needs(splits: Mapping[str, int], params: Params) -> list[str]:
    """What later stages need of a table with so many rows per split and will not get, a line each.

    No error here: the features and targets of these rows stay whatever their splits become.
    """
    lines = []
    training, trains = params.training, params.training.weights is None
    if trains and splits["train"] < training.batch_size:
        lines.append(
            f"train takes {training.batch_size} rows a step, but the split train has "
            f"{splits['train']}: set training.batch_size lower, or add rows"
        )
    if trains and params.batches.validation_rows and not splits["val"]:
        lines.append(
            "training.checkpoint: best is chosen on the split val, which has no rows: set "
            "captions.val_fraction, or training.checkpoint: last"
            if training.checkpoint == "best"
            else "train validates on the split val, which has no rows: it goes on without; set "
            "captions.val_fraction to see how it does"
        )
    if params.index.candidates is None and not splits["train"]:
        lines.append(
            "build-index takes the pictures of the split train, which has no rows: add some, or "
            "name other pictures under index.candidates"
        )
    reading = sorted(_READ_TEST_ROWS & set(params.evaluation_tables))
    if reading and not splits["test"]:
        lines.append(
            f"evaluate reads the split test for {', '.join(reading)}, which has no rows: set "
            "captions.test_fraction, or leave them out of evaluation.tables"
        )
    return lines


_READ_TEST_ROWS = {"captions", "retrieval", "latency", "chat", "table_3", "table_4"}


def check_table(
    work: WorkFolder,
    params: Params,
    table: str,
    out: Path,
    documents: DocumentPictures | None = None,
) -> CaptionReport:
    """Check a caption table; the verdicts on its pictures are kept in the work folder."""
    where = f"{Path(table).resolve()} {params.captions.images_dir}"
    journal = work.root / "pictures" / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.sqlite"
    out.parent.mkdir(parents=True, exist_ok=True)
    with Ticker("checking captions") as ticker:
        return check_captions(
            params.captions.for_table(table),
            out,
            ticker.show,
            journal=journal,
            workers=params.run.readers or 0,
            documents=documents,
        )


def watch_table(
    folder: Path,
    sources: Sequence[str],
    table: CaptionTable,
    more: Mapping[str, Path] | None = None,
) -> list[str]:
    """Have DVC watch the files of a table, and the pictures of its rows; notes for people."""
    own = {
        **(more or {}),
        **{f"table{place or ''}": Path(source) for place, source in enumerate(sources)},
    }
    files = dict(own)
    for row in table:
        file = file_of(row.image)
        files[f"pictures/{hashlib.sha256(file.encode()).hexdigest()[:16]}"] = Path(file)
        if len(files) > MOST_FILES:
            return [
                f"more than {MOST_FILES:,} pictures: DVC watches the table alone. After replacing "
                "pictures: dvc repro --force --single-item prepare-captions, then dvc repro",
                *watch_files(folder, own),
            ]
    return watch_files(folder, files)
