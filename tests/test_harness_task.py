"""The tasks of docs/harness, which lmms-eval reads: their rows, their words, their scores."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

HARNESS = Path(__file__).parents[1] / "docs" / "harness"
NAMES = ("vqa", "captioning")


@pytest.fixture
def utils():
    spec = importlib.util.spec_from_file_location("miniature_tasks", HARNESS / "miniature_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows(utils, tmp_path, monkeypatch):
    """Of a world of one picture, written where the tasks look for them."""
    monkeypatch.chdir(tmp_path)
    world = Path("artifacts/miniature")
    (world / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(world / "images/0.png")
    files = {
        "coco_captions": {
            "images": [{"id": 0, "file_name": "images/0.png"}],
            "annotations": [
                {"image_id": 0, "caption": "a red ring."},
                {"image_id": 0, "caption": "a ring."},
            ],
        },
        "questions": {
            "questions": [{"image_id": 0, "question_id": 7, "question": "what color is it?"}]
        },
        "annotations": {"annotations": [{"question_id": 7, "answers": [{"answer": "red"}] * 10}]},
    }
    for name, content in files.items():
        (world / f"{name}.json").write_text(json.dumps(content))
    utils.write()
    return {name: json.loads(Path(f"artifacts/harness/{name}.jsonl").read_text()) for name in NAMES}


def test_rows_words_and_scores(utils, rows):
    vqa, caption = rows["vqa"], rows["captioning"]
    (message,) = utils.doc_to_messages(vqa)
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"] == "Q: what color is it? A:"
    assert utils.process_vqa(vqa, [" red. and more"]) == {"vqa_accuracy": 1.0}
    assert utils.process_vqa(vqa, ["blue"]) == {"vqa_accuracy": 0.0}
    (message,) = utils.doc_to_messages(caption)
    assert [part["type"] for part in message["content"]] == ["image"]
    assert utils.process_caption(caption, ["a red ring. it"]) == {"exact": 1.0}
    assert utils.process_caption(caption, ["a red cross."]) == {"exact": 0.0}


@pytest.mark.parametrize("name", NAMES)
def test_tasks_name_functions_that_are_there(utils, name):
    text = (HARNESS / f"gill_miniature_{name}.yaml").read_text()
    named = [line.split()[-1] for line in text.splitlines() if "!function" in line]
    assert len(named) == 4
    for function in named:
        module, _, attribute = function.partition(".")
        assert module == "miniature_tasks"
        assert callable(getattr(utils, attribute))
    task = yaml.safe_load(text.replace("!function ", ""))
    assert task["dataset_kwargs"]["data_files"]["test"] == f"artifacts/harness/{name}.jsonl"


def test_lmms_eval_reads_them(rows, monkeypatch):
    tasks = pytest.importorskip("lmms_eval.tasks", reason="lmms-eval is not installed")
    manager = tasks.TaskManager("ERROR", include_path=str(HARNESS), model_name="openai")
    names = [f"gill_miniature_{name}" for name in NAMES]
    loaded = tasks.get_task_dict(names, manager, "chat")
    assert {name: len(task.test_docs()) for name, task in loaded.items()} == dict.fromkeys(names, 1)
