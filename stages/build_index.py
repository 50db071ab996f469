"""Stage build-index: W_i2t on every candidate's features, into a FAISS index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from corpora.caption_table import CaptionTable
from gill.artifacts import ARTIFACTS, INPUTS, Artifacts
from gill.dimensions import check_dimensions
from gill.world import have_world
from settings.params import Params
from stages.prepare_captions import check_table, watch_table
from stages.required import required
from stages.stores import link_store, settle, store_entry
from workfolder import WorkFolder, bring_from_repository, code_of, file_md5, watch_files

if TYPE_CHECKING:
    from cache import FillReport


def run(params: Params, *, rebuild: bool = False, artifacts: Artifacts = ARTIFACTS) -> None:
    """Make artifacts/index, unless exactly this index is in the work folder."""
    check_dimensions(artifacts, (), params)
    work = WorkFolder.open(params.run.work)
    heads = required(artifacts.heads(params.training.checkpoint), "train")
    own = have_candidates(work, params, artifacts, rebuild=rebuild)
    table = artifacts.candidates if own else artifacts.captions
    store = artifacts.candidate_features if own else artifacts.features
    entry = work.entry(
        "index",
        {
            "heads": file_md5(heads),
            "features": file_md5(
                required(store.with_suffix(".manifest.json"), "precompute-features")
            ),
            "captions": file_md5(required(table, "prepare-captions")),
            "training_only": not own,
            "index": params.index.model_dump(mode="json", exclude={"candidates"}),
            "code": code_of("index", work),
        },
    )

    def make() -> None:
        from stages.candidate_index import make_index

        if not own:
            link_store(work, store)
        check_dimensions(artifacts, ("features", "heads"), params)
        out, rows = entry.folder / "index", CaptionTable(table)
        grown = {"features": None, "captions": None}
        earlier = [
            other.folder / "index"
            for other in work.entries("index")
            if other.finished and {**other.decided_by, **grown} == {**entry.decided_by, **grown}
        ]
        make_index(rows, store, out, params, artifacts, training_only=not own, earlier=earlier)

    entry.provide(artifacts.stage("build-index"), {"index": artifacts.index}, make)


def have_candidates(
    work: WorkFolder, params: Params, artifacts: Artifacts, *, rebuild: bool = False
) -> bool:
    """Have the candidates' own table and features there; False where they are the training
    pictures."""
    source = params.index.candidates
    if source is None and not params.is_miniature:
        watch_files(INPUTS / "candidates", {})
        return False
    if artifacts.shared is not None:  # a cell reads those of the main run
        return True
    if source is None:
        have_world(work, artifacts.miniature, params.captions.miniature.model_dump())
    named = source or str(artifacts.miniature / "candidates.tsv")
    bring_from_repository([source])
    report = check_table(work, params, named, artifacts.candidates)
    print(report.source, report.kept, "candidates,", report.excluded, "excluded")
    table = CaptionTable(artifacts.candidates)
    if source is None:
        watch_files(INPUTS / "candidates", {})
    else:
        for note in watch_table(INPUTS / "candidates", report.files, table):
            print(f"  {note}")

    def fill(store: str | Path) -> FillReport:
        from stages.feature_store import fill_features

        return fill_features(store, table, params)

    entry = store_entry(work, "candidates", artifacts.candidates, "visual_encoder", params.features)
    settle(
        entry,
        artifacts.candidate_features,
        artifacts.candidates,
        fill,
        stores=params.run.stores,
        rebuild=rebuild,
    )
    return True
