"""Stage prepare-captions: the miniature world drawn, or the user's own table checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from corpora.caption_table import CaptionTable
from corpora.captions import CaptionReport, check_captions
from gill.artifacts import ARTIFACTS, INPUTS
from gill.world import have_world
from gill_progress import Ticker
from settings.params import Params
from stages.init import link_code
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
    report = check_table(work, params, table, ARTIFACTS.captions)
    notes = (
        watch_files(INPUTS / "captions", {})
        if params.is_miniature
        else watch_table(INPUTS / "captions", table, CaptionTable(ARTIFACTS.captions))
    )
    print(f"{report.source}: {report.kept} rows kept, {report.excluded} excluded")
    for reason, count in report.reasons.items():
        print(f"  {reason}: {count}")
    for line in (*report.examples, *notes):
        print(f"  {line}")
    if report.excluded > len(report.examples):
        print(f"  all of them: {ARTIFACTS.captions.with_suffix('.excluded.tsv')}")


def check_table(work: WorkFolder, params: Params, table: str, out: Path) -> CaptionReport:
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
            workers=params.run.readers,
        )


def watch_table(folder: Path, source: str, table: CaptionTable) -> list[str]:
    """Have DVC watch a table file, or shards, and the pictures of its rows; notes for people."""
    files: dict[str, Path] = {}
    if Path(source).is_file():
        files["table"] = Path(source)
    for row in table:
        file = row.image.partition("#")[0]  # a picture in a shard is shard.tar#offset...
        files[f"pictures/{hashlib.sha256(file.encode()).hexdigest()[:16]}"] = Path(file)
        if len(files) > MOST_FILES:
            kept = {"table": files["table"]} if "table" in files else {}
            return [
                f"more than {MOST_FILES:,} pictures: DVC watches the table alone. After replacing "
                "pictures: dvc repro --force --single-item prepare-captions, then dvc repro",
                *watch_files(folder, kept),
            ]
    return watch_files(folder, files)
