"""The stage evaluate on the original formats, interrupted, without baseline, without an index."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from distributed import LocalCluster
from PIL import Image
from stage_runs import run as run_stage
from stage_runs import write_params

from corpora.prompts import released_dialogue_prompt
from corpora.records import CorpusError
from corpora.visdial import read_dialogues
from evaluation.metrics.images import frechet_distance
from evaluation.metrics.uncertainty import bootstrap_interval
from evaluation.pictures import PictureMaker, PictureWorker, load_worker
from evaluation.results import Record, Result, read_records, read_results
from evaluation.variants import lay_over
from gill.artifacts import Artifacts
from gill.loading import Gill
from gill_errors import StageError
from pipeline.bridge.checkpoint import load_heads, save_heads
from pipeline.frozen.image_generator import ImageGenerator
from pipeline.talking import generation
from settings.params import Params, ParamsError, read_params
from stages import build_index, candidate_index, evaluate

STAGES = (
    "prepare-captions",
    "prepare-backbones",
    "precompute-features",
    "precompute-targets",
    "train",
    "build-index",
)
SIZES = {"pictures": 24, "held_out_pictures": 8, "stories": 5, "dialogues": 2, "prompts": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with heads trained for two steps on a very small miniature world."""
    folder = tmp_path_factory.mktemp("world")
    roles = ("language_model", "visual_encoder", "image_generator")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params(
            run={"batch_sizes": {"pictures": 3}},
            captions={"miniature": SIZES},
            backbones={f"{role}_dtype": "float32" for role in roles},
            training={"steps": 2},
            evaluation={"captions": 4, "retrieval_scenes": 20, "examples_shown": 2},
        )
        for stage in STAGES:
            run_stage(stage)
        yield folder


@pytest.fixture
def run(world, monkeypatch, tmp_path):
    """Evaluates with changed params into a root of its own; gives results and records.

    Nothing was evaluated before.
    """
    monkeypatch.chdir(world)
    for made in ("pictures", "evaluation"):
        shutil.rmtree(f"work/{made}", ignore_errors=True)
    root = tmp_path / "own"
    for part in ("model", "index"):
        shutil.copytree(f"artifacts/{part}", root / part)
    artifacts = Artifacts(root, shared=Path("artifacts"))

    def evaluated(
        scheduler: str = "single", **changes: object
    ) -> tuple[list[Result], list[Record]]:
        evaluate.run(_params(scheduler, **changes), artifacts, root / "metrics")
        folder = artifacts.evaluation
        return read_results(folder / "results.json"), read_records(folder / "records.parquet")

    evaluated.artifacts = artifacts  # type: ignore[attr-defined]
    return evaluated


def _params(scheduler: str = "single", **changes: object) -> Params:
    raw = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    # The miniature samples Table 8 in its own way; without, it is sampled as published.
    del raw["evaluation"]["generation"]
    laid = {"run": {"scheduler": scheduler}, "evaluation": changes}
    return Params.model_validate(lay_over(raw, laid))


def _one(results: list[Result], set_: str, method: str, metric: str) -> Result:
    [row] = [r for r in results if (r.set, r.method, r.metric) == (set_, method, metric)]
    return row


def test_vist_files_give_tables_1_and_5_and_a_lost_picture_costs_its_story(run, tmp_path):
    folder = tmp_path / "vist"
    shutil.copytree("artifacts/miniature/story_images", folder)
    told = json.loads(Path("artifacts/miniature/stories.json").read_text())
    lost = told["annotations"][2][0]
    (folder / f"{lost['photo_flickr_id']}.png").unlink()
    files = {"stories": "artifacts/miniature/stories.json", "images": str(folder)}
    results, records = run(tables=["table_1", "table_5"], vist=files)
    assert {row.metric for row in results if row.table == "table_1"} == {
        "clip_similarity",
        "lpips",
        "fid",
    }, "the oracle does not judge files that were named"
    assert {(row.examples, row.of) for row in results} == {(4, 5)}
    gill = _one(results, "story_5_pictures", "gill", "clip_similarity")
    assert gill.published == 0.641
    own = [r for r in records if r.set == "story_5_pictures"]
    values = [r.scores["gill.clip_similarity"] for r in own]
    assert gill.value == pytest.approx(np.mean(values))
    assert gill.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert (gill.low, gill.high) == bootstrap_interval(values, 0)
    assert lost["story_id"] not in {r.id for r in own}
    assert [list(part) for part in own[0].context] == [["text"], ["picture"]] * 4 + [["text"]]
    assert own[0].prompt == " ".join(part["text"] for part in own[0].context if "text" in part)
    fid = _one(results, "story_1", "gill", "fid")
    assert fid.value is None
    assert "published weights" in fid.absent
    assert _one(results, "story_5_pictures", "clip", "recall_at_5").published == 0.223
    assert {row.method for row in results if row.set == "story_5"} == {
        "generator",
        "gill",
        "clip",
        "clip_captions",
    }
    # The generator takes no pictures: it reads the same captions, with the same seeds, once.
    same = [r.pictures["generator"] for r in records if r.set == "story_5"]
    assert [r.pictures["generator"] for r in own] == same


def test_visdial_files_are_put_as_the_released_code_puts_them(run, shared_data, tmp_path):
    path = shared_data / "visdial/visdial_1.0_val_crowdsourced.json"
    dialogues, _ = read_dialogues(path)
    for dialogue in dialogues[5:8]:
        name = f"VisualDialog_val2018_{int(dialogue.id):012d}.jpg"
        Image.new("RGB", (40, 30), (int(dialogue.id) % 256, 90, 20)).save(tmp_path / name)
    files = {"dialogues": str(path), "images": str(tmp_path)}
    results, records = run(tables=["table_2"], visdial=files)
    assert {(row.examples, row.of) for row in results} == {(3, 97)}
    ten = [r for r in records if r.set == "dialogue_10"]
    assert [r.id for r in ten] == [d.id for d in dialogues[5:8]]
    assert ten[0].prompt == released_dialogue_prompt(dialogues[5].questions_and_answers)
    assert ten[0].prompt.count("\nA: ") == 10
    one = next(r for r in records if r.set == "dialogue_1")
    assert one.prompt == "\n".join(ten[0].prompt.split("\n")[:2])
    assert one.context == ({"text": one.prompt},)


def test_coco_and_vqa_files_give_tables_7_and_8(run, shared_data, monkeypatch):
    coco = {
        "captions": str(shared_data / "coco_mini_train/captions_train2017.json"),
        "images": str(shared_data / "coco_mini_train/images"),
    }
    vqa = {
        "questions": str(shared_data / "vqa_v2/with_images/questions_39.json"),
        "annotations": str(shared_data / "vqa_v2/with_images/annotations_39.json"),
        "images": coco["images"],
    }
    seen = []
    generate = ImageGenerator.generate

    def watched(self, *args, settings, **kwargs):
        seen.append((settings.steps, settings.guidance, settings.scheduler))
        return generate(self, *args, settings=settings.model_copy(update={"steps": 2}), **kwargs)

    monkeypatch.setattr(ImageGenerator, "generate", watched)
    results, records = run(
        tables=["table_7", "table_8"],
        coco={**coco, "limit": 3},
        coco_2014={**coco, "limit": 4},
        vqa={**vqa, "limit": 5},
    )
    assert set(seen) == {(250, 3.0, "ddim")}, "appendix E.3"
    counts = {row.set: (row.examples, row.of) for row in results}
    assert counts == {"coco_captioning": (3, 80), "vqa": (5, 39), "coco_fid": (4, 400)}
    assert _one(results, "coco_fid", "generator", "fid").published == 9.22
    assert 0 <= _one(results, "vqa", "gill", "vqa_accuracy").value <= 1
    assert _one(results, "coco_captioning", "gill", "bleu_4").published == 0.1059
    question = next(r for r in records if r.set == "vqa")
    assert question.prompt.startswith("Q: ")
    assert question.prompt.endswith("?\nA:")
    assert len(question.references) == 10
    caption = next(r for r in records if r.set == "coco_captioning")
    assert caption.prompt == "", "this run's captions begin with nothing"
    assert len(caption.references) == 5
    assert caption.texts["gill"] == caption.texts["gill"].partition("\n")[0]


def test_files_without_their_pictures_are_refused_before_any_model_is_loaded(
    run, shared_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(Gill, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    vist = {
        "stories": str(shared_data / "vist/reconstructed_test_500.story-in-sequence.json"),
        "images": str(tmp_path),
    }
    with pytest.raises(CorpusError, match=r"0 kept, 500 excluded: picture missing 500"):
        run(tables=["table_5"], vist=vist)
    with pytest.raises(ParamsError, match=r"evaluation\.vist\.images: there is no .*absent"):
        run(tables=["table_1"], vist={**vist, "images": "absent"})
    with pytest.raises(ParamsError, match=r"evaluation\.lpips_weights: there is no alexnet"):
        run(tables=["captions"], lpips_weights="alexnet.pth")


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ({"tables": ["table_1"]}, ["vist.stories", "vist.images"]),
        ({"vist": {"stories": "a.json"}}, ["vist.images"]),
        ({"tables": ["figure_8"]}, ["visdial.dialogues", "visdial.images"]),
        ({"tables": ["table_8"], "coco": {"captions": "a", "images": "b"}}, ["coco_2014.captions"]),
        ({"tables": ["table_7"], "vqa": {"questions": "q"}}, ["vqa.annotations", "vqa.images"]),
    ],
)
def test_a_table_without_its_files_is_refused_by_key(tmp_path, section, keys):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"captions": {"table": "a.tsv"}, "evaluation": section}))
    with pytest.raises(ParamsError) as error:
        read_params(path)
    for key in keys:
        assert f"{path}: evaluation.{key}: " in str(error.value)


def test_a_table_of_ones_own_is_measured_by_what_is_named(tmp_path):
    path = tmp_path / "params.yaml"
    files = {"coco": {"captions": "a", "images": "b"}}
    path.write_text(yaml.safe_dump({"captions": {"table": "a.tsv"}, "evaluation": files}))
    chosen = read_params(path).evaluation.chosen(miniature=False)
    assert chosen == ("captions", "retrieval", "table_6", "table_7", "latency")


def test_an_interrupted_run_goes_on_and_changes_no_bit(run, monkeypatch, capsys):
    made = []
    generate = generation.generate_pictures

    def counted(*args, **kwargs):
        pictures = generate(*args, **kwargs)
        made.append(len(pictures))
        if len(made) == stop_at:
            raise KeyboardInterrupt
        return pictures

    monkeypatch.setattr("evaluation.pictures.generate_pictures", counted)
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(tables=["captions"])
    assert not run.artifacts.evaluation.exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("work/pictures").rglob("*.png")}
    assert len(kept) == 4, "the third batch was generated and not saved"
    next(iter(kept)).with_name("00002-half.part").write_bytes(b"\x89PNG half")
    stop_at = 0
    results, records = run(tables=["captions"])
    assert made == [3, 1, 3, 3, 1]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not list(run.artifacts.evaluation.rglob("*.part"))

    made.clear()
    again, _ = run(tables=["captions", "table_3"], vist={"limit": 2})
    assert made == [2, 2], "captions were there; stories are new"
    assert [replace(r, table="captions", published=None) for r in again[: len(results)]] == results
    capsys.readouterr()
    assert run(tables=["captions"])[0] == results
    assert "nothing to do: made before" in capsys.readouterr().out
    assert made == [2, 2]
    for folder in ("pictures", "evaluation"):
        shutil.rmtree(f"work/{folder}")
    whole, fresh = run(tables=["captions"])
    assert whole == results
    for record, other in zip(records, fresh, strict=True):
        assert record.scores == other.scores


def test_other_heads_make_their_own_pictures_and_the_generators_are_shared(run, monkeypatch):
    made = []
    make = PictureMaker.make

    def counted(self, one, method, settings):
        before = len(list(Path("work/pictures").rglob("*.png")))
        paths = make(self, one, method, settings)
        made.append((method, len(list(Path("work/pictures").rglob("*.png"))) - before))
        return paths

    monkeypatch.setattr(PictureMaker, "make", counted)
    first, _ = run(tables=["captions"])
    assert made == [("generator", 4), ("gill", 4)]
    file = run.artifacts.model / "last.safetensors"
    heads, record = load_heads(file)
    kept = file.read_bytes()
    with torch.no_grad():
        heads.image_embeddings.neg_()
    save_heads(file, heads, record)
    shutil.rmtree(run.artifacts.index)  # which is that of the first heads
    made.clear()
    second, _ = run(tables=["captions"])
    assert made == [("generator", 0), ("gill", 4)]
    similar = [_one(rows, "captions", "gill", "clip_similarity").value for rows in (first, second)]
    assert similar[0] != similar[1]
    file.write_bytes(kept)
    made.clear()
    third, _ = run(tables=["captions"])
    assert made == [("generator", 0), ("gill", 0)], "those of the first heads are still there"
    assert third == first


def test_the_generators_picture_is_made_once_for_what_it_reads_alike(run):
    """Its text encoder reads 24 tokens: of ten rounds no more than of five."""
    _, records = run(tables=["table_2"])
    made = {(one.set, one.id): one.pictures for one in records}
    for id_ in {id_ for _, id_ in made}:
        one, five, ten = (made[f"dialogue_{n}", id_] for n in (1, 5, 10))
        assert ten["generator"] == five["generator"] != one["generator"]
        assert ten["gill"] != five["gill"]


def test_a_variant_runs_without_baseline_index_and_classifier(run):
    shutil.rmtree(run.artifacts.root / "index")
    results, records = run(tables=["captions", "table_6", "latency"], methods=["gill"], captions=2)
    assert {row.method for row in results if row.table == "captions"} == {"gill"}
    assert _one(results, "captions", "gill", "oracle_attributes").value is not None
    assert set(records[0].pictures) == {"gill"}
    assert "run `stages fit-decision`" in _one(results, "decision", "linear", "macro_f1").absent
    assert _one(results, "retrieval", "gill", "seconds").absent == "there is no candidate index"
    assert _one(results, "generation", "gill", "seconds").value > 0
    assert _one(results, "text", "gill", "tokens_per_second").value > 0


def test_lpips_and_fid_are_the_libraries_numbers_where_weights_are_named(
    run, tmp_path, monkeypatch
):
    """LPIPS by the library on random weights; FID's network is replaced, its distance is not."""
    lpips = pytest.importorskip("lpips")
    from torchvision.models import alexnet
    from torchvision.transforms.functional import resize

    torch.manual_seed(0)
    layers = {f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()}
    torch.save(layers, tmp_path / "alexnet.pth")
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in range(1, 6):
        for number, layer in getattr(reference.net, f"slice{part}").named_children():
            names = ("weight", "bias") if f"features.{number}.weight" in layers else ()
            layer.load_state_dict({name: layers[f"features.{number}.{name}"] for name in names})

    class Inception:
        def __init__(self, *_: object) -> None:
            pass

        def encode(self, pictures):
            small = [np.array(p.convert("L").resize((64, 32)), np.float32) for p in pictures]
            return torch.from_numpy(np.stack(small)).flatten(1) / 255

    monkeypatch.setattr("evaluation.scores.InceptionFeatures", Inception)
    results, records = run(
        tables=["captions"], captions=3, lpips_weights=str(tmp_path / "alexnet.pth")
    )

    def pixels(path: str) -> torch.Tensor:
        picture = np.array(Image.open(path).convert("RGB"))
        return resize(lpips.im2tensor(picture), [256, 256], antialias=True)

    with torch.no_grad():
        expected = [reference(pixels(r.pictures["gill"]), pixels(r.real)).item() for r in records]
    assert [r.scores["gill.lpips"] for r in records] == pytest.approx(expected, rel=1e-4)
    assert _one(results, "captions", "gill", "lpips").value == pytest.approx(np.mean(expected))
    sides = [
        Inception().encode([Image.open(path) for path in paths])
        for paths in ([r.pictures["gill"] for r in records], [r.real for r in records])
    ]
    fid = _one(results, "captions", "gill", "fid")
    assert fid.value == pytest.approx(frechet_distance(*sides))
    assert (fid.standard_error, fid.absent) == (None, None)


def test_a_cluster_makes_the_same_pictures_and_the_same_index(run):
    results, _ = run(tables=["captions"])
    artifacts = run.artifacts
    expected = _files(artifacts.evaluation / "pictures") | _files(artifacts.index)
    for folder in (artifacts.evaluation, artifacts.index):
        shutil.rmtree(folder)
    for made in ("pictures", "evaluation", "index"):
        shutil.rmtree(f"work/{made}")
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        params = _params(address)
        build_index.run(params, artifacts=artifacts)
        again, _ = run(address, tables=["captions"])
    assert again == results
    assert _files(artifacts.evaluation / "pictures") | _files(artifacts.index) == expected
    for load in (
        lambda: load_worker(artifacts, params, "others"),
        lambda: candidate_index.make_projection(
            artifacts.candidate_features,
            artifacts.model / "last.safetensors",
            "others",
            artifacts.backbones,
            params.run,
        ),
    ):
        with pytest.raises(StageError, match="all machines of a cluster need the same files"):
            load()


def test_threads_of_one_process_load_models_one_after_the_other():
    """While diffusers loads a model, torch modules that other threads make have no contents."""
    loading, most = 0, 0

    class Models:
        @property
        def generator(self):
            nonlocal loading, most
            loading += 1
            most = max(most, loading)
            time.sleep(0.05)
            loading -= 1

    worker = PictureWorker(Models())
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(worker, None) for _ in range(4)]
    for made in asked:
        with pytest.raises(StageError, match="no image generator is loaded"):
            made.result()
    assert most == 1


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
