"""The checked documents: their pictures as rows of the caption table, and one JSON line each.

    {"id": "12", "parts": ["it rained .", 6120, "we went home .", 6121]}

A number is a row of the caption table, whose split is `documents`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpora.caption_params import CaptionParams
from corpora.caption_table import DOCUMENTS
from corpora.documents import InterleavedDocument, Picture, read_documents
from corpora.records import CorpusError, Exclusion
from corpora.source_rows import CaptionSource, Record
from gill_files import written_whole

Parts = tuple[str | int, ...]
"""Texts and rows of the caption table."""


class DocumentPictures(CaptionSource):
    """The pictures of documents as captioned pictures, each pair of picture and caption once.

    A picture that cannot be used is left out of its document.

    Raises:
        CorpusError: no such file, or not of a known form.
    """

    def __init__(self, params: CaptionParams, path: str, images_dir: str | None = None) -> None:
        super().__init__(params)
        self.files = [path]
        self.root = images_dir or os.path.dirname(path) or "."
        self._documents: list[InterleavedDocument] = []
        self._excluded: list[Exclusion] = []
        for item in read_documents(path, images_dir, params.check, params.max_caption_chars):
            if isinstance(item, Exclusion):
                self._excluded.append(item)
            else:
                self._documents.append(item)
        self._ids: dict[tuple[str, str], str] = {}
        self.rows: dict[str, int] = {}
        """Row of the caption table by id, of the pictures that were kept: filled by the check."""

    def fraction(self) -> float:
        """The file was read at the beginning."""
        return 1.0

    def records(self) -> Iterator[Record | Exclusion]:
        """The documents that cannot be used, then the pictures of the others."""
        yield from self._excluded
        for number, document in enumerate(self._documents, 1):
            row = int(document.row) if document.row.isdecimal() else number
            for part in document.parts:
                if isinstance(part, Picture) and (part.image, part.caption) not in self._ids:
                    id_ = f"{DOCUMENTS}/{len(self._ids)}"
                    self._ids[part.image, part.caption] = id_
                    yield Record(document.file, row, part.image, [part.caption], id_, None)

    def write(self, path: Path) -> Iterator[Exclusion]:
        """Write the documents, once their pictures were judged; gives those without any left."""
        kept: list[tuple[str, Parts]] = []
        for document in self._documents:
            parts = tuple(self._with_rows(document))
            if any(isinstance(part, int) for part in parts):
                kept.append((document.row, parts))
            else:
                detail = "none of its pictures can be used"
                yield Exclusion(document.file, document.row, "document without pictures", detail)
        write_document_table(path, kept)

    def _with_rows(self, document: InterleavedDocument) -> list[str | int]:
        parts: list[str | int] = []
        for part in document.parts:
            if isinstance(part, Picture):
                row = self.rows.get(self._ids[part.image, part.caption])
                if row is not None:
                    parts.append(row)
            elif parts and isinstance(last := parts[-1], str):  # a picture between them is gone
                parts[-1] = f"{last} {part}"
            else:
                parts.append(part)
        return parts


def write_document_table(path: Path, documents: Iterable[tuple[str, Parts]]) -> None:
    """Write documents with their ids, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for id_, parts in documents:
            file.write(json.dumps({"id": id_, "parts": parts}, ensure_ascii=False) + "\n")


def read_document_table(path: Path) -> list[Parts]:
    """The parts of every document. Raises CorpusError where there is no such file."""
    try:
        with path.open(encoding="utf-8") as file:
            return [tuple(json.loads(line)["parts"]) for line in file]
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: no such file: run `stages prepare-captions`") from error
