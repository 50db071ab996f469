"""Which held-out rows are measured during training, and which of their pictures show the same."""

from __future__ import annotations

import json
import os

import numpy as np

from corpora.caption_table import CaptionTable
from gill.artifacts import Artifacts
from settings.params import Params


def one_row_per_picture(table: CaptionTable, rows: np.ndarray) -> np.ndarray:
    """Those of `rows`, in order, whose picture no earlier one has: int64."""
    _, first = np.unique(np.array(table.pictures(rows), "V16"), return_index=True)
    return rows[np.sort(first)]


def contents_of(
    table: CaptionTable, rows: np.ndarray, params: Params, artifacts: Artifacts
) -> np.ndarray:
    """int64 [n]: equal for rows whose pictures show the same, so that either answers the other.

    On the miniature world that is the scene: 600 held-out pictures show 28 of them, and no text
    tells two pictures of one scene apart. On other tables it is the picture.
    """
    if not params.is_miniature:
        return np.unique(np.array(table.pictures(rows), "V16"), return_inverse=True)[1]
    truth = json.loads((artifacts.miniature / "truth.json").read_text(encoding="utf-8"))
    images = [os.path.relpath(image, table.root) for image in table.images(rows)]
    scenes = [" ".join(truth["pictures"][image]) for image in images]
    return np.unique(scenes, return_inverse=True)[1]
