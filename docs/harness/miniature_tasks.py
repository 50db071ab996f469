"""What lmms-eval asks of the miniature world, in the words of this project's own evaluation."""

import json
from pathlib import Path

from PIL import Image

from evaluation.metrics.vqa_accuracy import vqa_accuracies
from miniature.language import question_prompt

WORLD = Path("artifacts/miniature")


def write(folder: Path = Path("artifacts/harness"), world: Path = WORLD) -> None:
    """The miniature's questions and captions as one JSON object a line, for `load_dataset`."""
    folder.mkdir(parents=True, exist_ok=True)
    read = {name: json.loads((world / f"{name}.json").read_text()) for name in _FILES}
    names = {one["id"]: one["file_name"] for one in read["coco_captions"]["images"]}
    answers = {one["question_id"]: one["answers"] for one in read["annotations"]["annotations"]}
    questions = [
        {
            "image": str(world / names[one["image_id"]]),
            "prompt": question_prompt("", one["question"]),
            "references": [answer["answer"] for answer in answers[one["question_id"]]],
        }
        for one in read["questions"]["questions"][:200]
    ]
    captions: dict[int, list[str]] = {}
    for one in read["coco_captions"]["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"])
    pictures = [
        {"image": str(world / names[number]), "prompt": "", "references": references}
        for number, references in sorted(captions.items())[:200]
    ]
    for name, rows in (("vqa", questions), ("captioning", pictures)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


_FILES = ("coco_captions", "questions", "annotations")


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    """The picture before the words: GILL answers what follows."""
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}]
    if doc["prompt"]:
        content.append({"type": "text", "text": doc["prompt"]})
    return [{"role": "user", "content": content}]


def process_vqa(doc, results):
    (accuracy,) = vqa_accuracies([_sentence(results[0])], [doc["references"]])
    return {"vqa_accuracy": accuracy}


def process_caption(doc, results):
    """Whether the caption is one that people gave, word for word, but for its full stop."""
    return {"exact": float(_sentence(results[0]) in map(_sentence, doc["references"]))}


def _sentence(text):
    return text.partition(".")[0].strip()


if __name__ == "__main__":
    write()
