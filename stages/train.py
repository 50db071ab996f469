"""Stage train: the heads against the frozen language model, or weights that exist."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from corpora.caption_table import CaptionTable
from gill.artifacts import ARTIFACTS, INPUTS, METRICS, Artifacts
from gill.dimensions import check_dimensions
from gill.world import have_world
from gill_errors import StageError
from settings.params import Params
from stages.models_in_use import frozen_in_use
from stages.required import required
from stages.stores import link_store
from workfolder import (
    Entry,
    WorkFolder,
    bring_from_repository,
    code_of,
    content_of,
    file_md5,
    place,
    watch_files,
)

STATE = "state.safetensors"


def run(
    params: Params,
    artifacts: Artifacts = ARTIFACTS,
    metrics: Path = METRICS,
    *,
    anew: bool = False,
) -> None:
    """Put trained heads into artifacts/model: finished ones, trained ones, or given ones.

    Training goes on where a run with the same inputs was killed, however either was started. With
    `anew` what there is of it is put aside first.
    """
    chosen = params.training.weights
    named = {
        "weights": chosen or params.training.start_from,
        "captioning": params.training.captioning_from,
    }
    bring_from_repository(named.values())
    if not _is_worker() and artifacts == ARTIFACTS:  # DVC runs no cell of the findings
        watch_files(INPUTS / "train", named)
    if chosen is not None:
        if not _is_worker():
            _use_weights(chosen, params, artifacts, metrics)
        return
    check_dimensions(artifacts, (), params)
    work = WorkFolder.open(params.run.work)
    entry = training_entry(work, params, artifacts)
    curve = metrics / "train"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _train_together(entry, params, artifacts, curve, anew)
    else:
        with entry.alone():
            _put_aside(entry, anew)
            if entry.finished is None:
                _train(entry, params, artifacts, curve)
            else:
                print(f"nothing to do: trained before, in {entry.folder}")
                place(entry.folder / "curve", curve)
    if not _is_worker():
        _place_heads(entry, params, artifacts)


def training_entry(work: WorkFolder, params: Params, artifacts: Artifacts) -> Entry:
    """The training of exactly these inputs."""
    # What is chosen after training, or in place of it, decides none of its numbers.
    mixture = params.training.mixture
    unused = {"checkpoint", "weights", *(() if mixture else ("mixture",))}
    numbers = params.training.model_dump(mode="json", exclude=unused)
    stores = ["features"] + (["targets"] if params.targets.source == "cache" else [])
    decided_by: dict[str, Any] = {
        "captions": file_md5(required(artifacts.captions, "prepare-captions")),
        # By content: a store that was repaired, or filled elsewhere, to the same bytes is the same.
        "stores": {name: _content(getattr(artifacts, name)) for name in stores},
        "backbones": frozen_in_use(artifacts),
        "model": params.model.model_dump(mode="json"),
        "batches": params.batches.model_dump(mode="json"),
        "objective": params.objective.model_dump(mode="json"),
        "training": numbers,
        "code": code_of("training", work),
    }
    if params.model.turns == "chat":
        decided_by["streams"] = params.stream_shares
    if params.needs_replies:
        decided_by["replies"] = file_md5(required(artifacts.replies, "precompute-replies"))
    if params.training.shares.get("documents"):
        decided_by["documents"] = file_md5(required(artifacts.documents, "prepare-captions"))
    for key in ("start_from", "captioning_from"):
        start = getattr(params.training, key)
        if start is not None and Path(start).exists():  # a name on the hub is in `training`
            decided_by[key] = content_of(Path(start))
    return work.entry("training", decided_by)


def _train(entry: Entry, params: Params, artifacts: Artifacts, curve: Path) -> None:
    """Train in this process, and record that it is finished."""
    from pipeline.training.distribution import from_first_process, rank
    from stages.head_training import train_heads

    held_out = CaptionTable(artifacts.captions).rows_of_split("val")
    if params.training.checkpoint == "best" and not len(held_out):
        raise StageError(
            f"training.checkpoint: best is chosen on the split val, of which {artifacts.captions} "
            "has no row: set captions.val_fraction, or training.checkpoint: last"
        )
    for name in entry.decided_by["stores"]:
        link_store(entry.work, getattr(artifacts, name))
    check_dimensions(artifacts, ("features", "targets"), params)
    if params.is_miniature:  # validation reads its scenes; a copy or a clone has none of it yet
        have_world(entry.work, artifacts.miniature, params.captions.miniature.model_dump())
    first = rank() == 0
    # Found by what decides it, a state is of this very run: only a kill can have left it.
    # Only the first process needs its file (the others may lie on other disks): it says for all.
    resume = from_first_process((entry.folder / STATE).is_file())
    if first:
        if resume:
            print(f"going on from the last state in {entry.folder}")
        elif why := entry.explain_absence(artifacts.stage("train")):
            print(f"train: {why}")
        entry.begin()
        entry.work.note_use(artifacts.stage("train"), entry)
    began = time.monotonic()
    train_heads(params, artifacts, entry.folder, curve, resume=resume)
    if first:
        place(curve, entry.folder / "curve")
        # Last and best, where there was a validation; the state stays, but is no output.
        heads = sorted(path.name for path in entry.folder.glob("[lb]*st.safetensors"))
        entry.finish(heads, time.monotonic() - began, steps=params.training.steps)


def _train_together(
    entry: Entry, params: Params, artifacts: Artifacts, curve: Path, anew: bool
) -> None:
    """The same in every process of torchrun: the first decides, and writes."""
    from pipeline.training.distribution import from_first_process, processes

    # The first process holds the lock for all: the others would wait for it for ever.
    with processes() as rank, entry.alone() if rank == 0 else nullcontext():
        if rank == 0:
            # torchrun starts all processes anew when one of them dies: that is no new training.
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            _put_aside(entry, anew and not restarted)
        # One answer for all: some that saw it finished would leave the others waiting.
        if from_first_process(entry.finished is not None):
            if rank == 0:
                print(f"nothing to do: trained before, in {entry.folder}")
                place(entry.folder / "curve", curve)
            return
        _train(entry, params, artifacts, curve)


def _put_aside(entry: Entry, anew: bool) -> None:
    if anew and entry.begun:
        aside = entry.put_aside()
        print(
            f"what was trained is put aside as {aside}; "
            f"`stages work --restore {aside.relative_to(entry.work.root)}` brings it back"
        )


def _place_heads(entry: Entry, params: Params, artifacts: Artifacts) -> None:
    """Put the heads that every later stage uses into artifacts/model, and nothing else."""
    target = artifacts.heads(params.training.checkpoint)
    source = entry.folder / target.name
    if not source.is_file():
        raise StageError(
            f"training.checkpoint is {params.training.checkpoint}, but there is no {source}: "
            "nothing was validated (captions.val_fraction, batches.validation_rows)"
        )
    place(source, target)
    _remove_others(target)
    entry.work.note_use(artifacts.stage("train"), entry)


def _remove_others(file: Path) -> None:
    """Make a file the only one in its folder."""
    for other in file.parent.iterdir():
        if other.is_file() and other != file:
            other.unlink()


def _use_weights(source: str, params: Params, artifacts: Artifacts, metrics: Path) -> None:
    """Put given heads into artifacts/model, and say whose they are."""
    from gill.frozen import read_backbones
    from pipeline.bridge.checkpoint import save_heads
    from stages.trained_weights import read_weights

    found = read_weights(source, params, read_backbones(artifacts))
    target = artifacts.heads(params.training.checkpoint)
    save_heads(target, found.heads, found.record)
    _remove_others(target)
    curve = metrics / "train"
    curve.mkdir(parents=True, exist_ok=True)
    (curve / "plots").mkdir(exist_ok=True)
    (curve / "metrics.json").write_text(json.dumps({"weights": source}) + "\n", encoding="utf-8")
    print(f"{source} is used as it is (training.weights): nothing is trained")


def _content(store: Path) -> str:
    """The fingerprint of all rows of a store, from its manifest."""
    manifest = required(store.with_suffix(".manifest.json"), f"precompute-{store.stem}")
    return json.loads(manifest.read_text(encoding="utf-8"))["content"]


def _is_worker() -> bool:
    """Whether this is another process of torchrun than the first."""
    return int(os.environ.get("RANK", "0")) > 0
