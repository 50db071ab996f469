"""An invisible watermark in generated pictures, by the library that Stable Diffusion's own scripts
use (`invisible-watermark`, extra `watermark`)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.frozen.backbones import BackboneError

MESSAGE = b"GILL"
# Measured on smooth noise of 512x512: its bits come back from a JPEG of quality 80, those of
# the library's default not always from a PNG.
_METHOD = "dwtDctSvd"
_SMALLEST = 256


class Watermark:
    """Writes `MESSAGE` into the pixels, where it is not seen; it survives a PNG and a good JPEG.

    Args:
        size: (width, height) of the pictures.

    Raises BackboneError without the library, or for pictures too small to hold it.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        try:
            from imwatermark import WatermarkEncoder
        except ImportError:
            raise BackboneError(
                "backbones.watermark: the library is missing: pip install '.[watermark]'"
            ) from None
        if min(size) < _SMALLEST:
            raise BackboneError(
                f"backbones.watermark: pictures of {size[0]}x{size[1]} cannot hold one, which "
                f"takes {_SMALLEST}x{_SMALLEST}"
            )
        self._encoder = WatermarkEncoder()
        self._encoder.set_watermark("bytes", MESSAGE)

    def write(self, picture: Image.Image) -> Image.Image:
        """A copy with the watermark."""
        # The library's channels are OpenCV's: blue first.
        pixels = np.asarray(picture.convert("RGB"))[..., ::-1]
        written = self._encoder.encode(np.ascontiguousarray(pixels), _METHOD)
        return Image.fromarray(np.ascontiguousarray(written[..., ::-1]))


def read_watermark(picture: Image.Image) -> bytes:
    """The bytes that lie where `Watermark` writes; `MESSAGE` in its own pictures."""
    from imwatermark import WatermarkDecoder

    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[..., ::-1])
    return WatermarkDecoder("bytes", 8 * len(MESSAGE)).decode(pixels, _METHOD)
