"""Stage train: what is trained once, found again, gone on with, put aside, or given."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from stage_runs import refusal, run, write_params
from typer.testing import CliRunner

from evaluation.variants import lay_over
from pipeline.bridge.checkpoint import load_heads, save_heads
from pipeline.bridge.heads import Heads
from pipeline.training.stepping import Stepper
from settings.params import ParamsError, read_params
from stages.cli import app

HEADS = Path("artifacts/model/last.safetensors")
CURVE = Path("metrics/train/metrics.json")
ALL = [0, 1, 2, 3]
"""The numbers of the steps of a whole training."""
BASE = {
    "captions": {
        "miniature": {
            "pictures": 16, "held_out_pictures": 4, "stories": 1, "dialogues": 1, "prompts": 1,
        }
    },
    # As the released layout has it, so that the heads can be exported.
    "model": {"mapper": {"adds_embedding": True}},
}  # fmt: skip


def _params(**changes: Any) -> None:
    write_params(**lay_over(BASE, changes))


class Given(NamedTuple):
    """An uninterrupted training, kept outside of the work folder."""

    heads: Path
    curve: dict
    released: Path
    """The same heads in the released layout."""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """In a folder with both stores, where it leaves the working directory."""
    folder, kept = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _params()
        for stage in ("prepare-captions", "prepare-backbones"):
            run(stage)
        for stage in ("precompute-features", "precompute-targets", "train"):
            run(stage)
        shutil.copy(HEADS, kept / "mine.safetensors")
        run("export-released", str(kept / "released"))
        curve = json.loads(CURVE.read_text())
        yield Given(kept / "mine.safetensors", curve, kept / "released")


@pytest.fixture
def steps(given, monkeypatch):
    """The numbers of the steps that are taken, where nothing is trained yet."""
    for made in ("work/training", "artifacts/model", "metrics"):
        shutil.rmtree(made, ignore_errors=True)
    _params()
    taken: list[int] = []
    take = Stepper.take

    def counted(self, step, *rest):
        taken.append(step)
        return take(self, step, *rest)

    monkeypatch.setattr(Stepper, "take", counted)
    return taken


def _entries() -> list[Path]:
    return sorted(Path("work/training").iterdir())


def _killed_after_the_third_step() -> str:
    def stop(progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.head_training.show_progress", stop)
        result = CliRunner().invoke(app, ["train"])
    assert result.exit_code == 130, result.output
    return result.output


def _same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_pictures_of_held_out_captions_change_no_weight(given, steps):
    """A grid at steps 2 and 4; killed after step 3, the second training makes the second."""
    _params(run={"pictures_every": 2})
    _killed_after_the_third_step()
    run("train")
    assert _same_tensors(HEADS, given.heads)
    (entry,) = _entries()
    shown = CURVE.parent / "plots" / "images" / "pictures"
    assert [path.name for path in sorted(shown.iterdir())] == ["000004.png"]
    with Image.open(shown / "000004.png") as grid:
        assert grid.size == (4 * 64, 64)  # as many pictures as there are held-out captions
        assert len(set(grid.get_flattened_data())) > 16
    assert not (entry / "loggers" / "loggers.json").exists()  # dvclive alone: nothing else is told


def test_a_run_that_goes_on_continues_its_curve_elsewhere(given, steps):
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="extra `tensorboard` is not installed",
    )
    _params(run={"loggers": ["dvclive", "tensorboard"]})
    _killed_after_the_third_step()
    assert "going on" in run("train")
    assert _same_tensors(HEADS, given.heads)
    (entry,) = _entries()
    events = reading.EventAccumulator(str(entry / "loggers" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(given.curve["train"]["loss"])


def test_a_finished_training_is_left_alone(steps):
    assert "nothing to do" not in run("train")
    assert steps == ALL
    made, status = HEADS.read_bytes(), HEADS.stat()
    _params(run={"log_every": 2, "checkpoint_every": 1, "prefetch": 1})  # how, not what
    assert "nothing to do: trained before" in run("train")
    assert steps == ALL
    assert HEADS.read_bytes() == made
    assert (HEADS.stat().st_ino, HEADS.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert [path.name for path in HEADS.parent.iterdir()] == [HEADS.name]


def test_other_params_are_another_training_and_the_first_is_found_again(steps, given):
    run("train")
    first, curve = HEADS.read_bytes(), CURVE.read_bytes()
    _params(model={"r": 2})
    assert "changed since: model.r 8 -> 2" in run("train")
    assert steps == ALL + ALL
    assert load_heads(HEADS)[1].sizes.r == 2
    assert all((entry / "finished.json").is_file() for entry in _entries())
    assert len(_entries()) == 2
    _params()
    assert "nothing to do" in run("train")
    assert steps == ALL + ALL
    assert HEADS.read_bytes() == first == given.heads.read_bytes()
    assert CURVE.read_bytes() == curve


def test_a_killed_training_goes_on_to_the_same_bytes(steps, given):
    assert "the next run goes on from here" in _killed_after_the_third_step()
    assert steps == [0, 1, 2]
    assert not HEADS.exists(), "heads that are not finished are nobody's"
    steps.clear()
    assert "going on from the last state" in run("train")
    assert steps == [2, 3], "the last state is that of two steps"
    assert HEADS.read_bytes() == given.heads.read_bytes()
    assert json.loads(CURVE.read_text()) == given.curve


def test_states_are_standardised_by_those_before_the_first_step(steps):
    """Measured once: a killed training goes on with what it had, to the same bytes."""
    measured = []
    measure = Heads.standardize_by

    def noted(self, states):
        measured.append(states)
        return measure(self, states)

    _params(model={"standardizes_states": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heads, "standardize_by", noted)
        run("train")
    [states] = measured
    tensors, whole = load_file(HEADS), HEADS.read_bytes()
    assert states.shape[1:] == tensors["state_mean"].shape
    torch.testing.assert_close(tensors["state_mean"], states.mean(0))
    assert float(states.std(0).mean()) > 0.01, "states of many captions"
    shutil.rmtree("work/training")
    shutil.rmtree("artifacts/model")
    _killed_after_the_third_step()
    assert "going on from the last state" in run("train")
    assert HEADS.read_bytes() == whole


def test_it_goes_on_in_micro_batches_too(steps, given):
    """Sums are then taken in another order: equal to within a hundredth of one step's change."""
    _killed_after_the_third_step()
    steps.clear()
    _params(run={"micro_batch_size": 4})
    assert "going on from the last state" in run("train")
    assert steps == [2, 3]
    assert len(_entries()) == 1
    rate = read_params(Path("params.yaml")).training.learning_rate
    found, expected = load_file(HEADS), load_file(given.heads)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=rate / 100, msg=name)


def test_anew_puts_the_finished_one_aside_and_restore_brings_it_back(steps):
    run("train")
    made, file = HEADS.read_bytes(), HEADS.stat().st_ino
    said = run("train", "--anew")
    assert steps == ALL + ALL
    assert HEADS.read_bytes() == made
    assert HEADS.stat().st_ino != file
    [name] = re.findall(r"`stages work --restore (\S+)` brings it back", said)
    assert (Path("work") / name / "last.safetensors").stat().st_ino == file
    assert f"there is: {name}" in refusal("work", "--restore", "training/other")
    said = run("work", "--restore", name)
    assert "what is there now is put aside as" in said
    assert f"{name} is back as" in said
    assert "nothing to do" in run("train")
    assert steps == ALL + ALL
    assert HEADS.stat().st_ino == file


def test_a_restart_by_torchrun_is_no_new_training(steps, monkeypatch):
    """`torchrun stages train --anew` whose processes die at the end must not begin again."""

    @contextmanager
    def alone():
        yield 0

    monkeypatch.setattr("pipeline.training.distribution.processes", alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run("train", "--anew")
    assert steps == ALL
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "nothing to do" in run("train", "--anew")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "put aside" in run("train", "--anew")
    assert steps == ALL + ALL


def test_the_best_heads_are_used_where_they_are_asked_for(steps):
    _params(training={"checkpoint": "best"})
    run("train")
    [entry] = _entries()
    best = HEADS.with_name("best.safetensors")
    assert [path.name for path in best.parent.iterdir()] == [best.name]
    assert best.read_bytes() == (entry / best.name).read_bytes()
    _params()
    assert "nothing to do" in run("train"), "the same training has both"
    assert [path.name for path in best.parent.iterdir()] == [HEADS.name]
    _params(training={"checkpoint": "best"}, batches={"validation_rows": 0})
    assert "batches.validation_rows: 0 leaves nothing to choose" in refusal("train")


@pytest.mark.parametrize("source", ["heads", "released"])
def test_given_weights_are_used_as_they_are(steps, given, source):
    named = str(getattr(given, source))
    _params(training={"weights": named})
    assert f"{named} is used as it is (training.weights): nothing is trained" in run("train")
    assert steps == []
    assert _same_tensors(HEADS, given.heads)
    assert [path.name for path in HEADS.parent.iterdir()] == [HEADS.name]
    assert not Path("work/training").exists()
    assert json.loads(CURVE.read_text()) == {"weights": named}
    assert Path("inputs/train").is_dir(), "DVC watches the file"


def test_weights_that_do_not_fit_are_refused_in_one_line_that_names_everything(
    steps, given, tmp_path
):
    run("train")
    made = HEADS.read_bytes()
    heads, record = load_heads(given.heads)
    _params(model={"r": 3, "m": 32}, training={"weights": str(given.released)})
    said = refusal("train")
    assert "model.r is 8 in the weights, 3 here" in said
    assert "model.m is 64 in the weights, 32 here" in said
    assert said.count("\n") == 1

    others = record.backbones | {"language_model": "0" * 64, "visual_encoder": "1" * 64}
    save_heads(tmp_path / "x", heads, record.model_copy(update={"backbones": others}))
    _params(training={"weights": str(tmp_path / "x")})
    said = refusal("train")
    here = record.backbones["language_model"][:12]
    assert f"trained with another language_model (000000000000, here {here})" in said
    assert "trained with another visual_encoder (111111111111" in said
    assert "image_generator" not in said
    assert said.count("\n") == 1

    sizes = heads.sizes.model_copy(update={"d": 5, "L": 9})
    save_heads(tmp_path / "x", Heads(sizes), record.model_copy(update={"sizes": sizes}))
    said = refusal("train")
    assert f"d (visual width) is 5 in the weights, {heads.sizes.d} here" in said
    assert f"L (text positions) is 9 in the weights, {heads.sizes.L} here" in said
    assert HEADS.read_bytes() == made, "what was there stays"

    _params(training={"weights": str(tmp_path)})
    assert f"{tmp_path} holds no trained heads" in refusal("train")


def test_training_starts_from_given_weights(steps, given, tmp_path):
    """At a rate that moves nothing, what comes out is what it began with."""
    named = tmp_path / "first.safetensors"
    shutil.copy(given.heads, named)
    _params(training={"start_from": str(named), "learning_rate": 1e-30})
    run("train")
    assert steps == ALL
    found, expected = load_file(HEADS), load_file(given.heads)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-20, msg=name)
    assert "nothing to do" in run("train")

    heads, record = load_heads(given.heads)
    with torch.no_grad():
        heads.image_to_text.weight.zero_()
    save_heads(named, heads, record)  # other weights under the same name
    assert "start_from" in run("train")
    assert steps == ALL + ALL
    assert load_file(HEADS)["image_to_text.weight"].abs().max() < 1e-20


def test_captioning_that_was_trained_once_serves_other_heads_bit_by_bit(steps, tmp_path):
    """Every part is that of a whole training: W_cap knows of no other, and no other of W_cap."""
    _params(training={"clip_norm": None})
    run("train")
    named = tmp_path / "others.safetensors"
    shutil.copy(HEADS, named)
    others = {"r": 2, "mapper": {"kind": "linear", "adds_embedding": False}}
    _params(model=others, training={"clip_norm": None})
    run("train")
    whole = shutil.copy(HEADS, tmp_path / "whole.safetensors")
    curve = json.loads(CURVE.read_text())
    assert curve["train"]["captioning"] > 0

    _params(model=others, training={"clip_norm": None, "captioning_from": str(named)})
    run("train")
    assert steps == ALL * 3
    assert _same_tensors(HEADS, whole)
    left_out = json.loads(CURVE.read_text())
    assert left_out["train"]["captioning"] == 0, "its pass is not run"
    assert left_out["train"]["generation"] == curve["train"]["generation"]

    heads, record = load_heads(named)
    with torch.no_grad():
        heads.caption_projection.bias.zero_()
    save_heads(named, heads, record)  # another W_cap under the same name
    assert "captioning_from" in run("train")
    assert load_file(HEADS)["caption_projection.bias"].abs().max() == 0

    _params(model={"k": 2}, training={"captioning_from": str(named)})
    assert "model.k is 4 in the weights, 2 here" in refusal("train")


def test_import_released_names_the_weights_and_their_sizes(steps, given):
    _params(model={"r": 3, "m": 32, "mapper": {"encoder_layers": 1, "adds_embedding": False}})
    before = yaml.safe_load(Path("params.yaml").read_text())
    text = "# my own run\n" + Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("  r: 3\n", "  r: 3  # [IMG] tokens\n"))
    run("import-released", str(given.released))
    text = Path("params.yaml").read_text()
    assert text.startswith("# my own run\n")
    assert "  r: 8  # [IMG] tokens\n" in text
    after = yaml.safe_load(text)
    assert list(after) == list(before)
    sizes = load_heads(given.heads)[1].sizes
    assert after.pop("training") == before.pop("training") | {"weights": str(given.released)}
    model = before.pop("model") | {"k": sizes.k, "r": sizes.r, "m": sizes.m, "p": sizes.p}
    assert after.pop("model") == model | {"mapper": sizes.mapper.model_dump()}
    assert after == before
    run("train")
    assert steps == []
    assert _same_tensors(HEADS, given.heads)


def test_import_released_leaves_the_params_alone_where_the_heads_do_not_fit(steps, given, tmp_path):
    text = Path("params.yaml").read_text()
    manifest = Path("artifacts/backbones/backbones.json")
    kept = manifest.read_text()
    models = json.loads(kept)
    models["visual_encoder"]["widths"]["d"] += 1
    manifest.write_text(json.dumps(models))
    try:
        said = refusal("import-released", str(given.released))
    finally:
        manifest.write_text(kept)
    assert "does not fit: d (visual width) is" in said
    shutil.copy(given.released / "model_args.json", tmp_path)
    assert "pretrained_ckpt.pth.tar is missing" in refusal("import-released", str(tmp_path))
    assert Path("params.yaml").read_text() == text


def test_a_quantised_language_model_is_not_sharded(tmp_path):
    path = tmp_path / "params.yaml"
    raw = {
        "run": {"shard_language_model": True},
        "backbones": {"language_model_quantization": "nf4"},
    }
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match="does not go with a language model in nf4"):
        read_params(path)
