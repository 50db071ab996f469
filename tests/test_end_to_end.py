"""Every stage in order, small, in an empty folder: the miniature world, then photographs."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from stage_runs import ROOT, refusal, run, write_params
from test_docs import PAGES, blocks, typed
from typer.testing import CliRunner

from cache import read_rows
from evaluation.metrics.basic import MetricUnavailable
from evaluation.results import read_records, read_results
from evaluation.variants import lay_over
from gill.artifacts import ARTIFACTS
from gill.frozen import read_backbones
from gill.loading import Gill
from miniature.backbones import SHIPPED
from pipeline.bridge.upstream import export_decision
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import GeneratedImage, ReplySettings, RetrievedImage, Text
from settings.evaluation import TableName
from stages.cli import app
from stages.gill_cli import app as gill_app

STAGES = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
EVALUATION = {
    "captions": 4,
    "vist": {"limit": 2},
    "told_stories": 2,
    "visdial": {"limit": 2},
    "coco": {"limit": 4},
    "vqa": {"limit": 4},
    "coco_2014": {"limit": 2},
    "generation": {"table_8": {"steps": 2}},
    "retrieval_scenes": 20,
    "examples_shown": 2,
}
WORLD: dict[str, Any] = {
    "captions": {
        "miniature": {
            "pictures": 40, "held_out_pictures": 20, "stories": 4, "dialogues": 4, "prompts": 40,
        }
    },
    # The shape of the released heads, so that they can be exported as such.
    "model": {"mapper": {"adds_embedding": True}},
    # Four steps of training make no model whose pictures could win both ways.
    "decision": {"votes": "votes.tsv"},
    "evaluation": EVALUATION,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder where every stage has run on a very small miniature world."""
    folder = tmp_path_factory.mktemp("world")

    def absent():
        raise MetricUnavailable("its tables take seconds to read, and test_evaluate reads them")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("evaluation.texts.Meteor", absent)
        write_params(**WORLD)
        _label_by_hand()
        for stage in STAGES:
            run(stage)
        yield folder


def _label_by_hand() -> None:
    lines = ["Prompt\tCategory\tChallenge\tNote\tDecisions"]
    for i in range(40):
        votes = ["gen", "ret"][i % 2]
        lines.append(
            f"a {'red' if i % 2 else 'blue'} ring number {i}\tA\tB\tC\t{','.join([votes] * 5)}"
        )
    Path("votes.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_every_stage_leaves_what_it_promises(world):
    for definition in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for kind in ("outs", "metrics", "plots"):
            for out in definition.get(kind, []):
                path = out if isinstance(out, str) else next(iter(out))
                assert (world / path).exists(), path


def test_metrics_and_report_tell_the_run(world):
    results = read_results(world / "artifacts/evaluation/results.json")
    found = {(r.table, r.set, r.method, r.metric): r for r in results}
    assert {table for table, *_ in found} == set(get_args(TableName)) - {
        "table_3",
        "table_4",
        "chat",
        "memory",
        "unseen_prompts",
    }
    judged = found["captions", "captions", "generator", "oracle_attributes"]
    assert (judged.examples, judged.of) == (4, 20)
    assert 0 <= judged.value <= 1
    assert found["retrieval", "all_scenes", "gill", "recall_at_1"].examples == 20
    assert found["table_6", "decision", "linear", "macro_f1"].value is not None
    assert "seconds to read" in found["table_7", "coco_captioning", "gill", "meteor"].absent
    headline = json.loads((world / "metrics/evaluation.json").read_text())
    assert headline["captions.generator"] == round(judged.value, 4)
    decision = json.loads((world / "artifacts/decision/evaluation.json").read_text())
    assert decision["labels"] == {"gen": 20, "ret": 20, "same": 0}
    page = (world / "artifacts/report/index.html").read_text()
    assert "miniature world" in page
    assert page.count("data:image/png;base64") > 20
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_generator_alone_is_good_even_here(world, monkeypatch):
    """The shipped weights on held-out captions, at 12 steps."""
    from miniature import oracle
    from miniature.world import Scene
    from pipeline.frozen.text_conditioner import load_text_conditioner
    from pipeline.talking.generation import generate_pictures, text_conditioning

    monkeypatch.chdir(world)
    gill = Gill.load("artifacts")
    records = read_records(Path("artifacts/evaluation/records.parquet"))
    captions = [r for r in records if r.set == "captions"]
    conditioner = load_text_conditioner(str(SHIPPED.image_generator))
    pictures = generate_pictures(
        gill.generator,
        text_conditioning(conditioner, [r.prompt for r in captions]),
        gill.empty_prompt,
        GenerationSettings(steps=12, guidance=2.5),
        seed=0,
    )
    scenes = [Scene(*r.scene.split()) for r in captions]
    assert oracle.score(pictures, scenes)["attributes"] >= 0.9


def test_replies_are_of_the_kind_asked_for_and_repeatable(world, monkeypatch):
    monkeypatch.chdir(world)
    gill = Gill.load("artifacts")
    picture = Image.open("artifacts/miniature/images/test/000000.png").convert("RGB")
    few = GenerationSettings(steps=2)
    for want, kind in (("generate", GeneratedImage), ("retrieve", RetrievedImage)):
        settings = ReplySettings(want=want, generation=few, seed=3)
        first, second = (gill.reply(["a red ring", picture], settings) for _ in range(2))
        images = [a for a in first if not isinstance(a, Text)]
        assert [type(a) for a in images] == [kind]
        assert [getattr(a, "text", None) for a in first] == [
            getattr(a, "text", None) for a in second
        ]
        again = [a for a in second if not isinstance(a, Text)]
        assert images[0].picture.tobytes() == again[0].picture.tobytes()
    words = gill.reply(["a red ring", picture], ReplySettings(want="text"))
    assert all(isinstance(a, Text) for a in words)


def test_retrieved_pictures_do_not_come_twice(world, monkeypatch):
    monkeypatch.chdir(world)
    conversation = Gill.load("artifacts").conversation()
    settings = ReplySettings(want="retrieve")
    for _ in range(3):
        conversation.reply(["a red ring."], settings)
    assert len(conversation.shown) == 3
    assert len(set(conversation.shown)) == 3


def test_gill_ask_writes_pictures_and_json(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    words = ["ask", "a red ring.", "artifacts/miniature/images/test/000000.png"]
    options = ["--want", "generate", "--steps", "2", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(gill_app, words + options)
    assert result.exit_code == 0, result.output
    answers = json.loads(result.output[result.output.index("[") :])
    made = [one for one in answers if one["kind"] == "generated"]
    assert Image.open(made[0]["path"]).size == (64, 64)
    result = CliRunner().invoke(gill_app, ["ask", "look", "missing.png"])
    assert result.exit_code == 1
    assert "missing.png" in result.output
    assert "Traceback" not in result.output


def test_a_second_run_makes_nothing(world, monkeypatch):
    monkeypatch.chdir(world)
    kept = _content(Path("artifacts"))
    for stage in set(STAGES) - {"prepare-captions", "prepare-backbones", "report"}:
        assert "nothing to do" in run(stage)
    assert _content(Path("artifacts")) == kept


def _content(folder: Path) -> dict[str, bytes]:
    """Files, those behind links too."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_the_first_steps_type_works(world, monkeypatch):
    """But for what goes on until somebody ends it, of which the options are tested elsewhere."""
    monkeypatch.chdir(world)
    steps = [words for words in typed(PAGES["docs/getting-started.md"]) if words]
    assert steps[0] == ["make", "repro"]  # `world`: the stages of dvc.yaml in their order
    answers = {}
    for program, *words in steps:
        if program == "gill" and words[0] not in ("app", "serve"):
            result = CliRunner().invoke(gill_app, words, input="a red ring.\nquit\n")
            assert result.exit_code == 0, f"{words}: {result.output}\n{result.exception!r}"
            answers[words[0]] = result.output
        elif program == "stages":
            run(*words)
    assert answers.keys() == {"ask", "caption", "chat", "tell"}
    assert "picture" in answers["ask"]
    assert "picture" in answers["chat"]
    assert "pictures: story.html" in answers["tell"]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/howto/interleaved.md",
        "docs/howto/stories.md",
        "docs/howto/own-loop.md",
    ],
)
def test_the_python_of_the_pages_runs(world, monkeypatch, page):
    monkeypatch.chdir(world)
    for block in blocks(PAGES[page], "python"):
        exec(compile(block, page, "exec"), {})


def kinds_of_outputs(notebook) -> dict[str, set[str]]:
    """What each cell of code shows: its streams by name, everything else by its kind."""
    return {
        cell.id: {output.get("name", output.output_type) for output in cell.outputs}
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def test_the_notebook_runs(world):
    """In a process of its own, with fewer steps of training than a reader sees."""
    nbclient = pytest.importorskip("nbclient", reason="the extra `dev` brings nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs/tutorial.ipynb", 4)
    (training,) = [cell for cell in notebook.cells if "STEPS = 60" in cell.source]
    training.source = training.source.replace("STEPS = 60", "STEPS = 3")
    shown = kinds_of_outputs(notebook)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(world)}}
    ).execute()
    (training,) = [cell for cell in notebook.cells if "STEPS = 3" in cell.source]
    # What is printed comes in as many pieces as a kernel's clock makes of it.
    assert "".join(output.text for output in training.outputs).endswith(", 3 steps\n")
    made = kinds_of_outputs(notebook)
    assert made == shown, "the committed notebook shows other outputs than running it gives"
    assert not [cell for cell, kinds in made.items() if "stderr" in kinds], "libraries talk"


def test_weights_that_are_not_the_pinned_ones_are_refused(world, monkeypatch):
    monkeypatch.chdir(world)
    manifest = Path("artifacts/backbones/backbones.json")
    kept = manifest.read_text()
    found = json.loads(kept)
    found["image_generator"]["fingerprint"] = "0" * 64
    manifest.write_text(json.dumps(found))
    try:
        said = refusal("precompute-targets")
        asked = CliRunner().invoke(gill_app, ["ask", "a red ring."])
    finally:
        manifest.write_text(kept)
    assert asked.exit_code == 1
    for words in (said, asked.output):
        assert "image_generator miniature: the weights here (" in words
        assert "are not the pinned ones (000000000000): run `stages prepare-backbones`" in words
    assert "nothing to do" in run("precompute-targets")


def test_damage_is_found_and_mended_through_the_link(world, monkeypatch):
    monkeypatch.chdir(world)
    store = "artifacts/features.zarr"
    assert Path(store).is_symlink()
    assert "sound" in run("verify-cache", store)
    before = read_rows(store, range(80))["pooled"]
    shard = next(p for p in Path(store, "pooled/c").rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[0] ^= 255
    shard.write_bytes(bytes(data))
    result = CliRunner().invoke(app, ["verify-cache", store])
    assert result.exit_code == 1
    assert "row" in result.output
    said = run("verify-cache", store, "--repair")
    assert "this run encoded" in said
    assert "sound" in said
    np.testing.assert_allclose(read_rows(store, range(80))["pooled"], before, atol=1e-6)
    assert "nothing to do" in run("precompute-features")


def test_the_cache_can_be_inspected_by_caption_and_picture(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    picture = "artifacts/miniature/images/train/000003.png"
    output = run("inspect-cache", "artifacts/features.zarr", "--image", picture)
    assert "000003.png" in output
    page = tmp_path / "page.html"
    run("inspect-cache", "artifacts/targets.zarr", "--row", "0", "--html", str(page))
    assert "cosine" in page.read_text()


def test_targets_encoded_online_are_those_of_the_cache(world, monkeypatch):
    """Equal but for the float16 of the store; and training runs on them."""
    from corpora.caption_table import CaptionTable
    from pipeline.frozen.language_model import load_language_model
    from pipeline.frozen.text_conditioner import load_text_conditioner
    from stages.cached_batches import BatchMaker

    monkeypatch.chdir(world)
    backbones = read_backbones(ARTIFACTS)
    table = CaptionTable(Path("artifacts/captions/captions.parquet"))
    model = load_language_model(backbones.language_model.path)
    encode = load_text_conditioner(backbones.image_generator.path).encode
    cached = BatchMaker(table, model, 24).read([3, 0, 5])
    online = BatchMaker(table, model, 24, encode).read([3, 0, 5])
    assert torch.equal(cached.tokens, online.tokens)
    assert torch.equal(cached.pooled, online.pooled)
    torch.testing.assert_close(cached.targets, online.targets, atol=3e-3, rtol=1e-3)


def test_pairs_for_annotators_are_made_from_prompts(world, monkeypatch, tmp_path):
    from app.annotations import read_pairs

    monkeypatch.chdir(world)
    lines = Path("artifacts/miniature/prompts.tsv").read_text().splitlines()[:4]
    (tmp_path / "prompts.tsv").write_text("\n".join(lines) + "\n")
    run("make-pairs", str(tmp_path / "prompts.tsv"), "--out", str(tmp_path / "study"))
    pairs = read_pairs(tmp_path / "study")
    assert [pair.prompt for pair in pairs] == [line.split("\t")[0] for line in lines[1:]]


def test_a_classifier_is_fitted_anew_beside_one_of_other_heads(world, monkeypatch):
    """Its stage alone after training: the one that lies there is not read."""
    monkeypatch.chdir(world)
    stages = ("train", "build-index", "fit-decision")
    record = Path("artifacts/decision/decision.json")
    before = record.read_bytes()
    write_params(**lay_over(WORLD, {"model": {"seed": 1}}))
    try:
        for stage in stages:
            run(stage)
        assert record.read_bytes() != before
        assert Gill.load("artifacts").decision is not None
    finally:
        write_params(**WORLD)
        said = {stage: run(stage) for stage in stages}
    assert all("nothing to do" in words for words in said.values())
    assert record.read_bytes() == before


def test_weights_bring_their_classifier(world, monkeypatch, tmp_path):
    """Released weights instead of trained ones, and back."""
    monkeypatch.chdir(world)
    after = ("train", "build-index", "fit-decision")
    heads = Path("artifacts/model/last.safetensors")
    before, e = load_file(heads), Gill.load("artifacts").model.language_model.width
    run("export-released", str(tmp_path))
    torch.manual_seed(0)
    linear = torch.nn.Linear(e, 2)
    export_decision(linear.weight, linear.bias, tmp_path)
    write_params(**lay_over(WORLD, {"decision": {"votes": None}}))
    run("import-released", str(tmp_path))
    try:
        said = {stage: run(stage) for stage in after}
        assert f"the classifier is that of {tmp_path}" in said["fit-decision"]
        found = load_file(heads)
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
        weight, bias = Gill.load("artifacts").decision.to_linear()
        torch.testing.assert_close(weight, linear.weight.detach())
        torch.testing.assert_close(bias, linear.bias.detach())
    finally:
        write_params(**WORLD)
        said = {stage: run(stage) for stage in after}
    assert all("nothing to do" in words for words in said.values())


def test_a_clone_that_pulled_the_results_talks_and_evaluates(world, monkeypatch, tmp_path):
    """Only what DVC carries: no work folder, no pictures, no stores."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    for out in (out if isinstance(out, str) else next(iter(out)) for out in outs):
        copy = shutil.copytree if (world / out).is_dir() else shutil.copy
        (tmp_path / out).parent.mkdir(parents=True, exist_ok=True)
        copy(world / out, tmp_path / out)
    monkeypatch.chdir(tmp_path)
    few = {"tables": ["captions", "table_5"], "methods": ["gill"]}
    write_params(**lay_over(WORLD, {"decision": {"votes": None}, "evaluation": few}))
    assert not Path("artifacts/miniature").exists()
    gill = Gill.load("artifacts")
    [picture] = gill.reply(["a red ring."], want="retrieve").images
    assert picture.picture.size == (64, 64)
    run("evaluate")
    made = {path.name for path in Path("work").iterdir() if path.is_dir()}
    assert made == {"evaluation", "locks", "miniature", "pictures", "uses"}, "no store"
    assert not list(Path("artifacts").glob("*.zarr"))
    found, expected = (
        {
            (r.table, r.set, r.metric): r.value
            for r in read_results(folder / "artifacts/evaluation/results.json")
            if r.method == "gill"
        }
        for folder in (tmp_path, world)
    )
    assert {table for table, *_ in found} == {"captions", "table_5"}
    for key, value in found.items():
        assert value == pytest.approx(expected[key]), key


def test_photographs_with_broken_files_among_them(shared_data, tmp_path, monkeypatch):
    """The road with a user's own table: broken files are reported by row, the run finishes."""
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    shutil.copytree(shared_data / "coco_mini_train/images", photos)
    lines = (shared_data / "coco_mini_train/captions.tsv").read_text().splitlines()
    kept = lines[:101]
    for name in ("truncated_corrupt/truncated_jpeg.jpg", "bomb/decompression_bomb.gif"):
        shutil.copy(shared_data / "robust_images/pillow" / name, photos)
        kept.append(f"a broken picture\t{Path(name).name}")
    kept.append("nothing there\tabsent.jpg")
    (photos / "captions.tsv").write_text("\n".join(kept) + "\n")
    table = {"table": "photos/captions.tsv", "images_dir": "photos"}
    measured = {"tables": ["captions", "retrieval"], "captions": 4, "examples_shown": 2}
    write_params("photos", evaluation=measured, captions=table)
    for stage in STAGES:
        run(stage)
    report = json.loads(Path("artifacts/captions/captions.report.json").read_text())
    assert (report["kept"], report["excluded"]) == (100, 3)
    excluded = Path("artifacts/captions/captions.excluded.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in excluded] == ["102", "103", "104"]
    page = Path("artifacts/report/index.html").read_text()
    assert "Rows left out" in page


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("caption\timage\n", "no rows"),
        ("a\tb\n", "header"),
        ("caption\timage\nx\tabsent.png\n", "absent.png"),
    ],
)
def test_unusable_tables_are_one_clear_line(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("captions.tsv").write_text(text)
    write_params("photos", captions={"table": "captions.tsv", "images_dir": "."})
    result = CliRunner().invoke(app, ["prepare-captions"])
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_stream_shows_half_made_pictures(world, monkeypatch):
    from pipeline.talking.answers import PictureProgress

    monkeypatch.chdir(world)
    gill = Gill.load("artifacts")
    settings = gill.settings(want="generate", steps=4, preview_every=2)
    events = list(gill.conversation().stream(["a red ring."], settings))
    seen = [(e.step, e.preview is not None) for e in events if isinstance(e, PictureProgress)]
    assert seen == [(1, False), (2, True), (3, False), (4, False)]
    made = next(e for e in events if isinstance(e, GeneratedImage))
    halfway = next(e.preview for e in events if isinstance(e, PictureProgress) and e.preview)
    assert halfway.size == made.picture.size


@pytest.mark.parametrize(
    ("role", "file"),
    [
        ("language_model", "tokenizer.json"),
        ("language_model", "model.safetensors"),
        ("visual_encoder", "open_clip_config.json"),
        ("image_generator", "unet/config.json"),
        ("image_generator", "text_encoder/model.safetensors"),
    ],
)
def test_a_backbone_with_a_missing_file_is_one_clear_line(world, tmp_path, monkeypatch, role, file):
    folder = tmp_path / role
    shutil.copytree(ROOT / "miniature/weights" / role, folder)
    (folder / file).unlink()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "artifacts/captions", tmp_path / "artifacts/captions")
    write_params(backbones={role: str(folder)})
    result = CliRunner().invoke(app, ["prepare-backbones"])
    assert result.exit_code == 1
    assert "error:" in result.output
    assert str(folder) in result.output or role in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("stage", [name for name in STAGES if not name.startswith("prepare")])
def test_a_stage_without_its_inputs_says_what_to_run(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    # So that every stage has something to do.
    needed = {
        "precompute-latents": {"objective": {"diffusion_weight": 1.0}},
        "precompute-replies": {"model": {"turns": "chat"}},
    }
    write_params(**needed.get(stage, {}))
    result = CliRunner().invoke(app, [stage])
    assert result.exit_code == 1
    assert "error: artifacts/" in result.output
