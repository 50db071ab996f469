"""VIST, the visual storytelling set: story-in-sequence (SIS) JSON.

    {"images": [{"id": "1741642", ...}, ...],
     "annotations": [[{"story_id": "45530", "worker_arranged_photo_order": 0,
                       "photo_flickr_id": "1741642", "text": "...", "storylet_id": ...}], ...]}

Each annotation is one sentence, in a list of its own. Pictures are named by Flickr id.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from corpora.caption_params import CheckLevel
from corpora.json_files import finished, identifier, lists, read_json, text, whole_number
from corpora.picture_folder import PictureFolder
from corpora.pictures import PictureError
from corpora.records import Exclusion, Report, Story, StoryPicture

STORY_LENGTH = 5
_TIER = "story-in-sequence"


class _Sentence(NamedTuple):
    story: str
    order: int
    photo: str
    caption: str


def read_stories(
    path: str | Path, images_dir: str | Path | None = None, check: CheckLevel = "header"
) -> tuple[list[Story], Report]:
    """The stories of 5 pictures each, in the order of the file.

    With `images_dir`, a story is kept only if each of its pictures is there (PHOTO_ID.jpg, .png,
    .gif, ...) and passes `check`; without, pictures have no image. A sentence that cannot be
    used is reported by its place in the file, and its story by its id.

    Raises:
        CorpusError: not such a file, no such folder, or no story left.
    """
    content = read_json(path)
    images, annotations = lists(path, content, "VIST story-in-sequence", "images", "annotations")
    photos = {identifier(image.get("id")) for image in images if isinstance(image, dict)}
    folder = None if images_dir is None else PictureFolder(images_dir, check)

    stories: dict[str, list[_Sentence]] = {}
    excluded: list[Exclusion] = []
    for item in _sentences(str(path), annotations, photos):
        if isinstance(item, Exclusion):
            excluded.append(item)
        else:
            stories.setdefault(item.story, []).append(item)

    kept: list[Story] = []
    for id_, sentences in stories.items():
        story = _story(str(path), id_, sentences, folder)
        (kept if isinstance(story, Story) else excluded).append(story)  # type: ignore[arg-type]
    return finished(path, kept, excluded)


def _sentences(
    path: str, annotations: list[Any], photos: set[str | None]
) -> Iterator[_Sentence | Exclusion]:
    seen: set[str] = set()
    for place, annotation in enumerate(annotations):
        row = f"annotations[{place}]"
        if not (
            isinstance(annotation, list)
            and len(annotation) == 1
            and isinstance(annotation[0], dict)
        ):
            yield Exclusion(path, row, "malformed", "expected a list of one record")
            continue
        record = annotation[0]
        story = identifier(record.get("story_id"))
        photo = identifier(record.get("photo_flickr_id"))
        order = whole_number(record.get("worker_arranged_photo_order"))
        caption = text(record.get("text"))
        storylet = identifier(record.get("storylet_id"))
        if record.get("tier", _TIER) != _TIER:
            yield Exclusion(path, row, "wrong tier", f"{record['tier']}, expected {_TIER}")
        elif story is None or photo is None or order is None or caption is None:
            found = {
                "story_id": story,
                "photo_flickr_id": photo,
                "worker_arranged_photo_order": order,
                "text": caption,
            }
            missing = ", ".join(name for name, value in found.items() if value is None)
            yield Exclusion(path, row, "missing field", f"story {story}: {missing}")
        elif storylet is not None and storylet in seen:
            yield Exclusion(path, row, "duplicate id", f"storylet_id {storylet}")
        elif photo not in photos:
            yield Exclusion(path, row, "unknown photo", f"{photo} is not listed under images")
        else:
            if storylet is not None:
                seen.add(storylet)
            yield _Sentence(story, order, photo, caption)


def _story(
    path: str, id_: str, sentences: list[_Sentence], folder: PictureFolder | None
) -> Story | Exclusion:
    if len({sentence.order for sentence in sentences}) < len(sentences):
        return Exclusion(path, id_, "ambiguous order", "two sentences in the same place")
    if len(sentences) != STORY_LENGTH:
        return Exclusion(
            path, id_, "incomplete story", f"{len(sentences)} of {STORY_LENGTH} sentences"
        )
    pictures = []
    for sentence in sorted(sentences, key=lambda sentence: sentence.order):
        try:
            image = None if folder is None else folder.with_stem(sentence.photo)
        except PictureError as error:
            return Exclusion(path, id_, f"picture {error.kind}", str(error))
        pictures.append(StoryPicture(sentence.photo, image, sentence.caption))
    return Story(id_, tuple(pictures))
