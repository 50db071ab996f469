"""VisDial 1.0: dialogues about COCO pictures, and their dense annotations.

    {"version": "1.0", "split": "val2018",
     "data": {"questions": ["is it red", ...], "answers": ["no", ...],
              "dialogs": [{"image_id": 239030, "caption": "...",
                           "dialog": [{"question": 39348, "answer": 30761, "gt_index": 45,
                                       "answer_options": [...]}, ...]}, ...]}}

Questions and answers are indices into the two lists. Questions carry no question mark.
Dense annotations: [{"image_id": 239030, "round_id": 6, "gt_relevance": [0.0, ...]}, ...], with
rounds counted from 1 ("relevance" in the file of the train split).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from corpora.caption_params import CheckLevel
from corpora.json_files import finished, lists, picture_id, read_json, text, whole_number
from corpora.picture_folder import PictureFolder
from corpora.pictures import PictureError
from corpora.records import CorpusError, Dialogue, Exclusion, Report, Round

VERSION = "1.0"


class _DialogueError(ValueError):
    """Why a dialogue cannot be used: reason and detail."""


def read_dialogues(
    path: str | Path,
    dense_path: str | Path | None = None,
    images_dir: str | Path | None = None,
    check: CheckLevel = "header",
) -> tuple[list[Dialogue], Report]:
    """The dialogues in the order of the file; each with all its rounds, or reported and left out.

    With `images_dir`, a dialogue is kept only if its picture is there (a file whose name ends
    in the image id: VisualDialog_val2018_000000239030.jpg) and passes `check`. With
    `dense_path`, the annotated round of a dialogue has its `relevance`; an annotation that fits
    no dialogue is reported. The test split has rounds without an answer: they are reported.

    Raises:
        CorpusError: not VisDial 1.0, no such folder, or no dialogue left.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise CorpusError(f"{path}: expected VisDial version {VERSION!r}, found {found!r}")
    questions, answers, records = lists(
        path, content.get("data"), "VisDial 1.0", "questions", "answers", "dialogs"
    )
    questions, answers = [text(one) for one in questions], [text(one) for one in answers]
    folder = None if images_dir is None else PictureFolder(images_dir, check)

    dialogues: dict[str, Dialogue] = {}
    excluded: list[Exclusion] = []
    for place, record in enumerate(records):
        id_ = picture_id(record.get("image_id")) if isinstance(record, dict) else None
        row = id_ or f"dialogs[{place}]"
        try:
            if id_ is None:
                raise _DialogueError("missing field", "image_id")
            if id_ in dialogues:
                raise _DialogueError("duplicate id", "an earlier dialogue is about this picture")
            dialogues[id_] = _dialogue(id_, record, questions, answers, folder)
        except _DialogueError as error:
            excluded.append(Exclusion(str(path), row, *error.args))
        except PictureError as error:
            excluded.append(Exclusion(str(path), row, f"picture {error.kind}", str(error)))
    if dense_path is not None:
        excluded += _add_relevance(dialogues, dense_path)
    return finished(path, list(dialogues.values()), excluded)


def _dialogue(
    id_: str, record: dict, questions: list, answers: list, folder: PictureFolder | None
) -> Dialogue:
    caption = text(record.get("caption"))
    if caption is None:
        raise _DialogueError("missing field", "caption")
    rounds = record.get("dialog")
    if not isinstance(rounds, list) or not rounds:
        raise _DialogueError("missing field", "dialog")
    image = None if folder is None else folder.with_id(id_)
    return Dialogue(
        id_,
        image,
        caption,
        tuple(_round(place, one, questions, answers) for place, one in enumerate(rounds, 1)),
    )


def _round(place: int, record: Any, questions: list, answers: list) -> Round:
    if not isinstance(record, dict):
        raise _DialogueError("malformed", f"round {place} is not a record")

    def looked_up(name: str, index: Any, texts: list) -> str:
        if index is None:
            raise _DialogueError("missing field", f"round {place}: {name}")
        known = whole_number(index)
        found = texts[known] if known is not None and 0 <= known < len(texts) else None
        if found is None:
            raise _DialogueError("bad index", f"round {place}: {name} {index!r}")
        return found

    question = looked_up("question", record.get("question"), questions)
    answer = looked_up("answer", record.get("answer"), answers)
    options = record.get("answer_options", [])
    if not isinstance(options, list):
        raise _DialogueError("malformed", f"round {place}: answer_options is not a list")
    candidates = tuple(looked_up("answer option", option, answers) for option in options)
    gt_index = whole_number(record.get("gt_index")) if candidates else None
    if candidates:
        if gt_index is None:
            raise _DialogueError("missing field", f"round {place}: gt_index")
        if not 0 <= gt_index < len(candidates) or candidates[gt_index] != answer:
            raise _DialogueError(
                "bad index", f"round {place}: gt_index {gt_index} is not the answer"
            )
    return Round(question, answer, candidates, gt_index)


def _add_relevance(dialogues: dict[str, Dialogue], path: str | Path) -> list[Exclusion]:
    annotations = read_json(path)
    if not isinstance(annotations, list):
        raise CorpusError(f"{path}: not a file of dense annotations: it is not a list")
    excluded = []
    for place, annotation in enumerate(annotations):
        record = annotation if isinstance(annotation, dict) else {}
        id_ = picture_id(record.get("image_id"))
        row = id_ or f"[{place}]"
        dialogue = dialogues.get(id_ or "")
        number = whole_number(record.get("round_id"))
        relevance = record.get("gt_relevance", record.get("relevance"))
        if dialogue is None:
            excluded.append(Exclusion(str(path), row, "unknown dialogue"))
        elif number is None or not 1 <= number <= len(dialogue.rounds):
            excluded.append(Exclusion(str(path), row, "bad index", f"round_id {number}"))
        elif not (
            isinstance(relevance, list)
            and len(relevance) == len(dialogue.rounds[number - 1].candidates)
            and all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in relevance)
        ):
            excluded.append(
                Exclusion(str(path), row, "bad relevance", "expected [0, 1] per answer option")
            )
        else:
            rounds = list(dialogue.rounds)
            numbers = tuple(float(value) for value in relevance)
            rounds[number - 1] = replace(rounds[number - 1], relevance=numbers)
            dialogues[dialogue.id] = replace(dialogue, rounds=tuple(rounds))
    return excluded
