"""Pictures as the bytes of a file, and as data URIs that a page or an answer holds in itself."""

from __future__ import annotations

import base64
import io

from PIL import Image

from pipeline.frozen.provenance import png_chunks


def as_png(picture: Image.Image) -> bytes:
    """The pixels without loss: no name, format or metadata of where they come from. Of a picture
    that was generated in this process, how it was made."""
    return _file(picture, "PNG", compress_level=1)


def data_uri(content: bytes, kind: str) -> str:
    """A file as a data URI; `kind` is the image type, such as png."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(picture: Image.Image) -> str:
    """The picture itself, without loss."""
    return data_uri(_file(picture, "PNG"), "png")


def preview_uri(picture: Image.Image, largest: int, lossless: int = 128) -> str:
    """The picture where no side has more than `lossless` pixels, else a JPEG of at most `largest`
    a side."""
    shown = picture.convert("RGB")
    if max(shown.size) <= lossless:
        return picture_uri(shown)
    shown.thumbnail((largest, largest))
    return data_uri(_file(shown, "JPEG", quality=88), "jpeg")


def _file(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, pnginfo=png_chunks(picture), **options)
    return buffer.getvalue()
