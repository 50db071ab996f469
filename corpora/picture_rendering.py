"""A decoded picture of any kind as the 8-bit RGB picture that a person would see."""

from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from corpora.picture_errors import PictureError

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DECODING = {"AVIF": 14, "WEBP": 20, "JPEG2000": 25, "HEIF": 14, "JXL": 25}
"""Formats whose decoders hold several pictures themselves: bytes per pixel."""
MOST_BYTES = max(13, *_DECODING.values())
"""What no kind of picture takes more of for a pixel: see `bytes_per_pixel`."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB, transparency on white. Raises PictureError: its samples have no white."""
    white_level = _white_level(image)
    transparency = _transparency(image)
    image.load()
    if transparency is not None:
        image.info["transparency"] = transparency
    orientation = _orientation(image)

    if image.mode.startswith("I") or image.mode == "F":
        rgb = _by_strips(image, lambda strip: _from_deep_grey(strip, white_level))
    elif image.has_transparency_data:
        rgb = _by_strips(image, _on_white)
    elif image.mode == "RGB":
        return _upright(image._new(image.im), orientation)  # no second copy, as convert makes one
    else:
        rgb = image.convert("RGB")
    image.close()  # two whole pictures in memory are enough
    return _upright(rgb, orientation)


def _upright(rgb: Image.Image, orientation: int) -> Image.Image:
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info.clear()  # a left-over orientation would be applied again by whoever reads it
    return rgb


def _by_strips(image: Image.Image, render: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The picture rendered in strips, since rendering takes several copies."""
    rgb = Image.new("RGB", image.size)
    rows = max(2**18 // image.width, 1)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(render(image.crop(box)), box)
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def bytes_per_pixel(image: Image.Image) -> int:
    """How much memory `to_rgb` takes at most, as measured; of a picture that is not loaded yet."""
    if image.format in _DECODING:
        return _DECODING[image.format]
    if image.info.get("progressive"):
        return 13 if image.mode == "CMYK" else 10  # all coefficients, then the pixels
    if image.mode == "RGB" and "transparency" not in image.info:
        # Whether a PNG is upright is known, and asked, only when all of it has been read.
        return 8 if image.format == "PNG" or _orientation(image) in _UPRIGHT else 4
    return 10


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata of a good picture: shown as stored, as viewers do
        return 1


def _white_level(image: Image.Image) -> int | None:
    """The sample value of white in a greyscale picture deeper than 8 bits; negative when the
    scale runs from white to black; None when the file does not define one."""
    if image.mode == "F":
        return None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.mode == "I":
            return None  # signed, or 32 bits
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        inverted = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return (1 - 2**bits) if inverted else 2**bits - 1
    return 65535  # PNG, JPEG 2000; Pillow scales PGM to this


def _transparency(image: Image.Image) -> int | tuple[int, ...] | None:
    """PNG's transparent colour in the units of the decoded samples, where Pillow keeps the
    file's: greys of 2 and 4 bits, and colours of 16 bits."""
    value = image.info.get("transparency")
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return None
    raw_mode = image.tile[0].args
    if isinstance(value, int) and raw_mode in ("L;2", "L;4"):
        return value * {"L;2": 85, "L;4": 17}[raw_mode]
    if isinstance(value, tuple) and raw_mode == "RGB;16B":
        return tuple(sample >> 8 for sample in value)
    return None


def _from_deep_grey(image: Image.Image, white_level: int | None) -> Image.Image:
    if white_level is None:
        raise PictureError("unsupported", f"samples of mode {image.mode} have no defined white")
    samples = np.asarray(image).astype(np.int64)
    scale = abs(white_level)
    grey = (np.clip(samples, 0, scale) * 255 + scale // 2) // scale
    if white_level < 0:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
