"""VQAv2: the questions file and the annotations file, joined by question id.

{"questions":   [{"question_id": 540769000, "image_id": 540769, "question": "..."}, ...]}
{"annotations": [{"question_id": 540769000, "image_id": 540769, "question_type": "is there a",
                  "answer_type": "yes/no", "multiple_choice_answer": "yes",
                  "answers": [{"answer_id": 1, "answer": "yes", ...}, ...]}, ...]}
"""

from pathlib import Path
from typing import Any

from corpora.caption_params import CheckLevel
from corpora.json_files import finished, identifier, lists, picture_id, read_json, text
from corpora.picture_folder import PictureFolder
from corpora.pictures import PictureError
from corpora.records import Exclusion, Question, Report


def read_questions(
    path: str | Path,
    annotations_path: str | Path | None = None,
    images_dir: str | Path | None = None,
    check: CheckLevel = "header",
) -> tuple[list[Question], Report]:
    """The questions in the order of the file, with the answers of all annotators.

    With `annotations_path`, a question without a usable annotation is left out and reported;
    without, as in the test splits, questions have no answers. With `images_dir`, a question is
    kept only if its picture is there and passes `check`.

    Raises:
        CorpusError: not such a file, no such folder, or no question left.
    """
    (records,) = lists(path, read_json(path), "VQA questions", "questions")
    excluded: list[Exclusion] = []
    annotations = None
    if annotations_path is not None:
        annotations = _annotations(annotations_path, excluded)
    folder = None if images_dir is None else PictureFolder(images_dir, check)

    kept: dict[str, Question] = {}
    asked: set[str] = set()
    for place, record in enumerate(records):
        record = record if isinstance(record, dict) else {}
        id_ = identifier(record.get("question_id"))
        image_id = picture_id(record.get("image_id"))
        question = text(record.get("question"))
        row = id_ or f"questions[{place}]"
        if id_ is None or image_id is None or question is None:
            detail = "expected question_id, image_id and question"
            excluded.append(Exclusion(str(path), row, "missing field", detail))
            continue
        if id_ in asked:
            excluded.append(Exclusion(str(path), row, "duplicate id"))
            continue
        asked.add(id_)
        answered: dict[str, Any] = {}
        if annotations is not None:
            annotation = annotations.get(id_)
            if annotation is None:
                excluded.append(Exclusion(str(path), row, "question without annotation"))
                continue
            if picture_id(annotation.get("image_id")) != image_id:
                detail = f"{image_id} here, {annotation.get('image_id')} in the annotation"
                excluded.append(Exclusion(str(path), row, "different images", detail))
                continue
            answered = {
                "answers": annotation["texts"],
                "answer": text(annotation["multiple_choice_answer"]),
                "question_type": text(annotation.get("question_type")),
                "answer_type": text(annotation.get("answer_type")),
            }
        try:
            image = None if folder is None else folder.with_id(image_id)
        except PictureError as error:
            excluded.append(Exclusion(str(path), row, f"picture {error.kind}", str(error)))
            continue
        kept[id_] = Question(id_, image_id, image, question, **answered)
    for id_ in annotations or {}:
        if id_ not in asked:
            excluded.append(Exclusion(str(annotations_path), id_, "annotation without question"))
    return finished(path, list(kept.values()), excluded)


def _annotations(path: str | Path, excluded: list[Exclusion]) -> dict[str, dict]:
    """The usable annotations by question id, with the answers as `texts`."""
    (records,) = lists(path, read_json(path), "VQA annotations", "annotations")
    annotations: dict[str, dict] = {}
    for place, record in enumerate(records):
        record = record if isinstance(record, dict) else {}
        id_ = identifier(record.get("question_id"))
        answers = record.get("answers")
        texts = tuple(
            text(answer.get("answer")) if isinstance(answer, dict) else None
            for answer in (answers if isinstance(answers, list) else [])
        )
        row = id_ or f"annotations[{place}]"
        if (
            id_ is None
            or not texts
            or None in texts
            or not text(record.get("multiple_choice_answer"))
        ):
            detail = "expected question_id, answers and multiple_choice_answer"
            excluded.append(Exclusion(str(path), row, "missing field", detail))
        elif id_ in annotations:
            excluded.append(Exclusion(str(path), row, "duplicate id"))
        else:
            annotations[id_] = {**record, "texts": texts}
    return annotations
