"""Stage prepare-captions: the miniature world drawn, or the user's own table checked."""

from __future__ import annotations

import json
from pathlib import Path

from corpora.captions import check_captions
from miniature import corpus
from stages.params import Params
from stages.paths import ARTIFACTS
from stages.progress import Ticker


def run(params: Params) -> None:
    """Write the checked caption table, its report, and the list of excluded rows."""
    section = params.captions
    if section.table == "miniature":
        table = str(_draw_miniature(params))
    else:
        table = section.table
    ARTIFACTS.captions.parent.mkdir(parents=True, exist_ok=True)
    with Ticker("checking captions") as ticker:
        report = check_captions(section.for_table(table), ARTIFACTS.captions, ticker.show)
    print(f"{report.source}: {report.kept} rows kept, {report.excluded} excluded")
    for reason, count in report.reasons.items():
        print(f"  {reason}: {count}")
    for example in report.examples:
        print(f"  {example}")
    if report.excluded > len(report.examples):
        print(f"  all of them: {ARTIFACTS.captions.with_suffix('.excluded.tsv')}")


def _draw_miniature(params: Params) -> Path:
    """Draw the world unless exactly this one is there already."""
    wanted = params.captions.miniature.model_dump()
    drawn = ARTIFACTS.miniature / "drawn.json"
    if drawn.is_file():
        found = json.loads(drawn.read_text(encoding="utf-8"))
        if all(found.get(name) == value for name, value in wanted.items()):
            return ARTIFACTS.miniature / "captions.tsv"
    print(f"drawing {wanted['pictures']} pictures of the miniature world")
    return corpus.draw(ARTIFACTS.miniature, **wanted)
