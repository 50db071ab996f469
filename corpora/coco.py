"""COCO captions: captions_train2014.json, captions_val2017.json and their like.

{"images": [{"id": 493652, "file_name": "000000493652.jpg", ...}, ...],
 "annotations": [{"id": 88366, "image_id": 125870, "caption": "..."}, ...]}
"""

from pathlib import Path

from corpora.caption_params import CheckLevel
from corpora.json_files import finished, identifier, lists, picture_id, read_json, text
from corpora.picture_folder import PictureFolder
from corpora.pictures import PictureError
from corpora.records import CaptionedImage, Exclusion, Report


def read_captioned_images(
    path: str | Path, images_dir: str | Path | None = None, check: CheckLevel = "header"
) -> tuple[list[CaptionedImage], Report]:
    """The images with their captions, in the order of the file's `images`.

    With `images_dir`, an image is kept only if its picture is there and passes `check`. The 2014
    annotations also fit a folder of the 2017 release, whose pictures have shorter names. White
    space in captions is collapsed.

    Raises:
        CorpusError: not a captions file, no such folder, or no image left.
    """
    images, annotations = lists(path, read_json(path), "COCO captions", "images", "annotations")
    folder = None if images_dir is None else PictureFolder(images_dir, check)
    excluded: list[Exclusion] = []

    captions: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for place, record in enumerate(images):
        record = record if isinstance(record, dict) else {}
        id_, name = picture_id(record.get("id")), text(record.get("file_name"))
        if id_ is None or name is None:
            detail = "expected id and file_name"
            excluded.append(Exclusion(str(path), f"images[{place}]", "missing field", detail))
        elif id_ in captions:
            excluded.append(Exclusion(str(path), f"images[{place}]", "duplicate id", id_))
        else:
            captions[id_], names[id_] = [], name

    seen: set[str] = set()
    for place, record in enumerate(annotations):
        row = f"annotations[{place}]"
        record = record if isinstance(record, dict) else {}
        image_id = picture_id(record.get("image_id"))
        annotation_id = identifier(record.get("id"))
        caption = text(record.get("caption"))
        if image_id is None or annotation_id is None or "caption" not in record:
            detail = "expected id, image_id and caption"
            excluded.append(Exclusion(str(path), row, "missing field", detail))
        elif caption is None:
            excluded.append(Exclusion(str(path), row, "no caption", f"image {image_id}"))
        elif image_id not in captions:
            detail = f"{image_id} is not listed under images"
            excluded.append(Exclusion(str(path), row, "unknown image", detail))
        elif annotation_id in seen:
            excluded.append(Exclusion(str(path), row, "duplicate id", annotation_id))
        else:
            seen.add(annotation_id)
            captions[image_id].append(caption)

    kept: list[CaptionedImage] = []
    for id_, texts in captions.items():
        try:
            if not texts:
                excluded.append(Exclusion(str(path), id_, "image without captions"))
                continue
            image = None if folder is None else folder.with_coco_name(names[id_], id_)
            kept.append(CaptionedImage(id_, image, tuple(texts)))
        except PictureError as error:
            excluded.append(Exclusion(str(path), id_, f"picture {error.kind}", str(error)))
    return finished(path, kept, excluded)
