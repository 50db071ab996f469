"""Pictures of answers, as what a client can show: data URIs, names that expire, Markdown."""

from __future__ import annotations

import asyncio
from typing import Any

from PIL import Image

from app.encoded_pictures import as_png, data_uri
from app.page.kept_pictures import KeptPictures
from app.serving.requests import PictureForm
from pipeline.talking.answers import GeneratedImage, RetrievedImage


class PictureNames:
    """Names the pictures of one answer."""

    def __init__(self, kept: KeptPictures, base_url: str, form: PictureForm) -> None:
        self._kept, self._base_url, self._form = kept, base_url, form

    async def url(self, picture: Image.Image) -> str:
        """Where the picture is."""
        data = await asyncio.to_thread(as_png, picture)
        if self._form == "data":
            return data_uri(data, "png")
        return f"{self._base_url}v1/pictures/{self._kept.keep(data)}.png"

    def markdown(self, picture: RetrievedImage | GeneratedImage, url: str) -> str:
        """The picture within text; nothing where it is not to be there."""
        if self._form != "markdown":
            return ""
        kind = "retrieved" if isinstance(picture, RetrievedImage) else "generated"
        return f" ![{kind} picture]({url})"


def about(picture: RetrievedImage | GeneratedImage) -> dict[str, Any]:
    """Where a picture comes from."""
    told: dict[str, Any] = {"p_generate": picture.generate_probability}
    if isinstance(picture, RetrievedImage):
        told |= {"kind": "retrieved", "score": picture.score, "source": picture.source}
        return told | {"caption": picture.caption, "row": picture.row}
    told |= {"kind": "generated", "seed": picture.seed, "steps": picture.steps}
    return told | {"guidance": picture.guidance, "scheduler": picture.scheduler}
