"""Stores of the stages: what is encoded once, shared by tables, taken over, and linked."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from stage_runs import refusal, run, write_params
from typer.testing import CliRunner

from cache import open_store, read_rows, repair, verify
from gill_errors import StageError
from miniature.backbones import SHIPPED
from stages.cli import app
from stages.stores import link_store
from workfolder import WorkFolder

STORE, MANIFEST = Path("artifacts/features.zarr"), Path("artifacts/features.manifest.json")
ENCODER = Path("encoder/open_clip_model.safetensors")
ROWS = 6


def _table(rows: int) -> None:
    lines = ["caption\timage"]
    for row in range(rows):
        Image.new("RGB", (32, 32), (30 * row, 200 - 20 * row, 90)).save(f"{row}.png")
        lines.append(f"a picture with number {row}\t{row}.png")
    Path("table.tsv").write_text("\n".join(lines) + "\n")


def _params(**changes: Any) -> None:
    write_params(
        "photos",
        captions={"table": "table.tsv", "images_dir": "."},
        backbones={"visual_encoder": "encoder"},
        **changes,
    )


def _values() -> np.ndarray:
    return read_rows(STORE, range(ROWS))["pooled"]


def _verified(store: Path) -> bool:
    return "sound" in run("verify-cache", str(store))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stores of a table of one's own, with a visual encoder in a folder of one's own."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(SHIPPED.visual_encoder, "encoder")
        _table(ROWS)
        _params()
        for stage in ("prepare-captions", "prepare-backbones"):
            run(stage)
        for stage in ("precompute-features", "precompute-targets"):
            assert f"this run encoded {ROWS} " in run(stage)
    return folder


@pytest.fixture
def first(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder's store of the features, in a copy of the world."""
    shutil.copytree(world, tmp_path / "w", symlinks=True)
    monkeypatch.chdir(tmp_path / "w")
    for stage in ("precompute-features", "precompute-targets"):
        assert "nothing to do" in run(stage)  # its links lead into this copy now
    return STORE.resolve()


def test_appended_rows_are_the_only_ones_encoded(first):
    before, manifest = _values(), MANIFEST.read_bytes()
    _table(ROWS + 2)
    run("prepare-captions")
    for stage in ("precompute-features", "precompute-targets"):
        said = run(stage)
        assert f"begins with {ROWS} rows of" in said
        assert "this run encoded 2 " in said
        assert f"{ROWS} were there" in said
    assert STORE.resolve() != first
    assert len(read_rows(STORE, range(ROWS + 2))["pooled"]) == ROWS + 2
    np.testing.assert_array_equal(_values(), before)
    assert _verified(STORE)
    assert _verified(first), "the one before stays whole"
    np.testing.assert_array_equal(read_rows(first, range(ROWS))["pooled"], before)
    _table(ROWS)
    run("prepare-captions")
    assert f"nothing to do, {ROWS} rows" in run("precompute-features")
    assert STORE.resolve() == first
    assert MANIFEST.read_bytes() == manifest


def test_rows_that_left_the_table_or_moved_cost_nothing(first):
    before = _values()
    _table(ROWS + 1)
    header, *lines = Path("table.tsv").read_text().splitlines()
    left = [ROWS - 1, 0, ROWS, 3, 4]  # one moved to the front, two lost, one new in the middle
    Path("table.tsv").write_text("\n".join([header, *(lines[row] for row in left)]) + "\n")
    run("prepare-captions")
    for stage in ("precompute-features", "precompute-targets"):
        said = run(stage)
        assert "begins with 4 rows of" in said
        assert "this run encoded 1 " in said
        assert "4 were there" in said
    values = read_rows(STORE, range(5))["pooled"]
    for new, old in enumerate(left):
        if old < ROWS:
            np.testing.assert_array_equal(values[new], before[old])
    assert sorted(path.name for path in STORE.resolve().parent.iterdir()) == [
        *("decided_by.json", "features.lock", "features.manifest.json", "features.zarr"),
        "finished.json",
    ]
    assert _verified(STORE)
    assert _verified(first), "the one before stays whole"
    assert "is put aside" in run("precompute-features", "--rebuild")
    anew = read_rows(STORE, range(5))["pooled"]
    np.testing.assert_allclose(anew.astype(np.float32), values, rtol=1e-2, atol=1e-3)


def test_a_picture_that_vanished_is_left_out_named_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _table(ROWS)
    lines = Path("table.tsv").read_text().splitlines()
    splits = ["split", *["train"] * (ROWS - 2), "val", "val"]
    Path("table.tsv").write_text(
        "".join(f"{line}\t{split}\n" for line, split in zip(lines, splits, strict=True))
    )
    shutil.copytree(SHIPPED.visual_encoder, "encoder")
    _params(training={"steps": 1, "batch_size": 4, "validate_every": 1})
    for stage in ("prepare-captions", "prepare-backbones"):
        run(stage)
    Path(f"{ROWS - 1}.png").rename("away.png")
    assert f"row {ROWS - 1} failed" in run("precompute-features")
    assert "1 of them failed and are left out" in run("precompute-features")
    run("precompute-targets")
    run("train")  # validated on the other row
    Path("away.png").rename(f"{ROWS - 1}.png")
    assert "this run encoded 1 " in run("verify-cache", str(STORE), "--repair")
    assert "failed" not in run("precompute-features")


def test_an_index_is_extended_by_the_new_candidates_and_is_the_one_built_anew(first, monkeypatch):
    monkeypatch.setattr("stages.candidate_index.BLOCK_ROWS", 2)

    def index(kind: str = "flat") -> str:
        _params(
            training={"steps": 1, "batch_size": 4, "validate_every": 1},
            index={"candidates": "candidates.tsv", "kind": kind},
        )
        return run("build-index")

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path("artifacts/index").iterdir()}

    table = Path("table.tsv").read_text().splitlines()
    shutil.copy("table.tsv", "candidates.tsv")
    Path("table.tsv").write_text(
        "".join(
            f"{line}\t{split}\n"
            for line, split in zip(table, ["split", *["train"] * 4, "val", "val"], strict=True)
        )
    )
    _params(training={"steps": 1, "batch_size": 4, "validate_every": 1})
    for stage in ("prepare-captions", "precompute-features", "precompute-targets", "train"):
        run(stage)
    Path("candidates.tsv").write_text("\n".join(table[:4]) + "\n")
    assert "are taken from" not in index()
    Path("candidates.tsv").write_text("\n".join(table) + "\n")
    said = index()
    assert f"2 of {ROWS} pictures are taken from" in said, "and not the half block"
    extended = content()
    assert "are taken from" not in index("hnsw"), "it places vectors by those before"
    Path("candidates.tsv").write_text("\n".join([table[0], *table[2:]]) + "\n")
    assert "are taken from" not in index(), "the first picture is another"
    shutil.rmtree("work/index")
    Path("candidates.tsv").write_text("\n".join(table) + "\n")
    assert "are taken from" not in index()
    assert content() == extended


def test_a_repair_that_is_killed_is_gone_on_with(first):
    [shard] = (first / "pooled" / "c").rglob("[0-9]*/0")
    content = bytearray(shard.read_bytes())
    content[10] ^= 1  # of the first row
    shard.unlink()  # its bytes may have another name, in a copy of this store
    shard.write_bytes(content)
    report = verify(first)
    assert report.bad_rows
    repair(first, report)  # and no more: killed before it encoded anything
    pending = open_store(first).status_counts()["pending"]
    assert f"this run encoded {pending} " in run("precompute-features")
    assert _verified(first)


def test_replaced_weights_are_another_store_and_the_first_stays(first):
    before, kept = _values(), ENCODER.read_bytes()
    weights = load_file(ENCODER)
    name = next(name for name in weights if name.startswith("visual.") and name.endswith("weight"))
    save_file({**weights, name: weights[name] * 1.5}, ENCODER)
    _table(ROWS + 1)  # there is something to encode
    run("prepare-captions")
    said = refusal("precompute-features")
    assert "visual_encoder encoder: the weights here (" in said
    assert "are not the pinned ones (" in said
    _table(ROWS)
    run("prepare-captions")
    run("prepare-backbones")
    said = run("precompute-features")
    assert f"this run encoded {ROWS} " in said
    assert "changed since: " in said  # the rows too, of the run that was refused
    assert 'weights "' in said
    assert STORE.resolve() != first
    assert np.abs(_values() - before).max() > 1e-3
    assert _verified(first)
    ENCODER.write_bytes(kept)
    run("prepare-backbones")
    assert "nothing to do" in run("precompute-features")
    assert STORE.resolve() == first
    np.testing.assert_array_equal(_values(), before)


def _as_an_earlier_version_left_it(store: Path) -> None:
    STORE.unlink()
    shutil.copytree(store, STORE)
    shutil.rmtree("work/features")


def test_a_store_of_an_earlier_version_is_taken_over(first):
    before = _values()
    _as_an_earlier_version_left_it(first)
    with pytest.raises(StageError, match="run `stages precompute-features`, which takes it over"):
        link_store(WorkFolder.open(None), STORE)
    said = run("precompute-features")
    assert f"{STORE} is taken over into" in said
    assert "this run encoded 0 " in said
    assert STORE.is_symlink()
    assert STORE.resolve() == first
    np.testing.assert_array_equal(_values(), before)
    assert _verified(STORE)


def test_parts_of_several_machines_are_joined_and_taken_over(first):
    _params(features={"shard_rows": 2})
    run("precompute-features")
    alone, manifest = STORE.resolve(), MANIFEST.read_bytes()
    shutil.move(alone.parent, "alone")
    parts = [f"artifacts/features.part-{number}-of-2.zarr" for number in (1, 2)]
    assert "2 of 2 rows done" in run("precompute-features", "--part", "1/2")
    assert "4 of 4 rows done" in run("precompute-features", "--part", "2/2", "--to", "there.zarr")
    assert not alone.exists()
    assert "is a link to the store in use" in refusal("join-stores", *parts, "--to", str(STORE))
    STORE.unlink()
    assert "no part has shard 1 (rows 2 to 3)" in refusal(
        "join-stores", parts[0], "--to", str(STORE)
    )
    assert "6 rows, 6 done" in run("join-stores", parts[0], "there.zarr", "--to", str(STORE))
    said = run("precompute-features")
    assert "is taken over into" in said
    assert "this run encoded 0 " in said
    assert STORE.resolve() == alone
    assert MANIFEST.read_bytes() == manifest
    assert _verified(STORE)
    for file in Path("alone/features.zarr").rglob("*"):
        if file.is_file():
            assert (STORE / file.relative_to("alone/features.zarr")).read_bytes() == (
                file.read_bytes()
            )
    for options in (["--to", "x"], ["--part", "1/2", "--rebuild"]):
        assert "--to belongs to --part" in refusal("precompute-features", *options)


def test_stores_lie_where_a_url_says(first, bucket, monkeypatch):
    monkeypatch.setenv("GILL_WORK", str(Path("work").resolve()))
    tiny = {"steps": 1, "batch_size": 4, "validate_every": 1}
    before, manifest = _values(), MANIFEST.read_bytes()
    _params(training=tiny)
    run("train")
    [trained] = Path("artifacts/model").glob("*.safetensors")
    heads = trained.read_bytes()
    _params(training=tiny, run={"stores": f"{bucket}/gill"})
    for stage in ("precompute-features", "precompute-targets"):
        said = run(stage)
        assert f"begins with {ROWS} rows of" in said
        assert "this run encoded 0 " in said
        assert f"nothing to do, {ROWS} rows lie in s3://corpus/gill/" in run(stage)
    url = f"{bucket}/gill/features/{first.parent.name}/features.zarr"
    assert os.readlink(STORE) == url
    assert MANIFEST.read_bytes() == manifest
    np.testing.assert_array_equal(_values(), before)
    assert _verified(STORE)
    shutil.rmtree("work/training")
    run("train")
    assert trained.read_bytes() == heads
    # Another machine, with the object store alone.
    monkeypatch.setenv("GILL_WORK", str(Path("elsewhere").resolve()))
    assert "this run encoded 0 " in run("precompute-features")
    _table(ROWS + 2)
    run("prepare-captions")
    said = run("precompute-features")
    assert f"begins with {ROWS} rows of {url}" in said
    assert "this run encoded 2 " in said
    shard = f"{os.readlink(STORE)}/pooled/c/0/0"
    with fsspec.open(shard, "rb") as file:
        content = bytearray(file.read())
    content[3] ^= 1
    with fsspec.open(shard, "wb") as file:
        file.write(bytes(content))
    assert CliRunner().invoke(app, ["verify-cache", str(STORE)]).exit_code == 1
    assert "sound" in run("verify-cache", str(STORE), "--repair")


def test_what_cannot_be_done_at_a_url_is_one_line(first):
    url = f"memory://{uuid.uuid4().hex}"
    store = f"{url}/features/{first.parent.name}/features.zarr"
    _params(run={"stores": url})
    assert f"{store}: a store at a URL is not put aside" in refusal(
        "precompute-features", "--rebuild"
    )
    STORE.unlink()
    shutil.copytree(first, STORE)
    said = " ".join(refusal("precompute-features").split())
    assert f"run.stores has this store at {store}: `stages join-stores {STORE} --to" in said
    run("join-stores", str(STORE), "--to", store)
    shutil.rmtree(STORE)
    assert f"nothing to do, {ROWS} rows lie in {url}" in run("precompute-features")
    _params()  # and back to where it lay before
    assert f"nothing to do, {ROWS} rows lie in" in run("precompute-features")
    assert STORE.resolve() == first
    link_store(WorkFolder.open(None), STORE)
    assert STORE.resolve() == first
    _params(run={"stores": "nowhere://gill"})
    assert "cannot be reached from here: Protocol not known: nowhere" in refusal(
        "precompute-features"
    )


def test_an_earlier_store_that_was_made_otherwise_is_kept(first):
    before = _values()
    _as_an_earlier_version_left_it(first)
    _params(features={"codec": {"dtype": "float32"}})
    said = run("precompute-features")
    assert "was made otherwise, it is kept as" in said
    assert f"this run encoded {ROWS} " in said
    assert _values().dtype == np.float32
    np.testing.assert_allclose(_values(), before, rtol=1e-3, atol=1e-3)
    [earlier] = Path("work/features").glob("*/features.earlier.zarr")
    np.testing.assert_array_equal(read_rows(earlier, range(ROWS))["pooled"], before)


@pytest.mark.parametrize("earlier", [False, True])
def test_rebuild_encodes_every_row_and_keeps_what_was_there(first, earlier):
    if earlier:
        _as_an_earlier_version_left_it(first)
    said = run("precompute-features", "--rebuild")
    assert f"this run encoded {ROWS} " in said
    assert "what was there is put aside as" in said
    assert STORE.resolve() == first
    [aside] = Path("work/features").glob("*.aside-1")
    assert _verified(aside / "features.zarr")


def test_the_link_follows_the_manifest_that_dvc_brings_back(first):
    manifest = MANIFEST.read_text()
    _params(features={"codec": {"dtype": "float32"}})
    run("precompute-features")
    second = STORE.resolve()
    assert second != first
    MANIFEST.unlink()  # a hard link into the work folder
    MANIFEST.write_text(manifest)
    work = WorkFolder.open(None)
    link_store(work, STORE)
    assert STORE.resolve() == first
    changed = json.loads(manifest) | {"content": "0" * 64}
    MANIFEST.write_text(json.dumps(changed))
    with pytest.raises(StageError, match=r"is not in the work folder .*run `stages precompute-"):
        link_store(work, STORE)
    assert STORE.resolve() == first


def test_what_is_no_link_of_ours_is_left_alone(first):
    STORE.unlink()
    STORE.mkdir()
    (STORE / "mine").write_text("")
    said = refusal("precompute-features")
    assert f"{STORE} is not a link into the work folder, and is left as it is" in said
    assert (STORE / "mine").is_file()
