"""Pictures in data URIs, decoded again."""

import base64
import io

import pytest
from PIL import Image

from app.encoded_pictures import as_png, picture_uri, preview_uri


def decoded(uri: str) -> Image.Image:
    head, body = uri.split(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(body, validate=True)))
    assert head == f"data:image/{picture.format.lower()}"
    return picture


def test_a_png_holds_every_pixel_and_nothing_else():
    picture = Image.effect_noise((70, 50), 90).convert("RGB")
    picture.info["comment"] = b"from /home/somebody"
    for again in (Image.open(io.BytesIO(as_png(picture))), decoded(picture_uri(picture))):
        assert again.tobytes() == picture.tobytes()
        assert not again.info


@pytest.mark.parametrize(
    ("size", "shown", "kind"),
    [((100, 64), (100, 64), "PNG"), ((600, 300), (512, 256), "JPEG"), ((129, 8), (129, 8), "JPEG")],
)
def test_a_preview_is_small_and_a_jpeg_where_it_is_large(size, shown, kind):
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    again = decoded(preview_uri(picture, 512))
    assert (again.size, again.format) == (shown, kind)
    assert (decoded(preview_uri(picture, 64, lossless=0)).format, picture.size) == ("JPEG", size)
