"""Opens any picture that a data set may hold as the 8-bit RGB picture that a person would see.

EXIF orientation is applied, transparency is laid on white, 16-bit samples are scaled (not
clipped), of several frames the first is taken. What cannot be shown whole is refused with a
reason; nothing is ever repaired or replaced.

CMYK is converted by the formula, without its ICC profile, as CLIP's own preprocessing did.
"""

import hashlib
import importlib
import io
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from corpora import arrow_files, tar_shards
from corpora.caption_params import MAX_PIXELS
from corpora.picture_errors import PictureError
from corpora.picture_rendering import MOST_BYTES, bytes_per_pixel, to_rgb
from corpora.references import is_url, split_reference

MAX_BYTES = 512 * 2**20
_PLAIN_BYTES = 4
"""Of a pixel of a picture that is RGB in its file, the least of all kinds."""
PICTURE_SUFFIXES = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff avif avifs jp2 j2k jpx jpf "  # noqa: SIM905
    "ppm pgm pbm pnm ico heic heif hif jxl".split()
)
"""Of files that are taken for pictures, in lower case; what they hold, their content says."""

# An explicit list: Pillow would otherwise also try formats that start other programs (EPS).
_FORMATS = (
    JpegImagePlugin.JpegImageFile.format,  # and MPO, of which the first picture is taken
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
    GifImagePlugin.GifImageFile.format,
    BmpImagePlugin.BmpImageFile.format,
    TiffImagePlugin.TiffImageFile.format,
    PpmImagePlugin.PpmImageFile.format,
    AvifImagePlugin.AvifImageFile.format,
    Jpeg2KImagePlugin.Jpeg2KImageFile.format,
    IcoImagePlugin.IcoImageFile.format,
)
# Formats that an extra of this project opens: what begins their files, its name, the module whose
# import or `register_heif_opener` makes Pillow know it, and the extra.
_PLUGINS = (
    (
        re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL),
        "HEIF",
        "pillow_heif",
        "heic",
    ),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"), "JXL", "pillow_jxl", "jxl"),
)


class PictureStat(NamedTuple):
    """Size in bytes, and a text that changes when the file is written anew."""

    size: int
    version: str


def open_picture(reference: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture behind a path, a tar member (`shard.tar#member`), or the bytes of a file.

    Returns an upright 8-bit RGB `PIL.Image.Image` without metadata. Safe to call from several
    threads. It takes less than 200 MB besides the file: of kinds that take more than 4 bytes for a
    pixel fewer pixels are let in than `max_pixels`, unless that is raised.

    Raises:
        PictureError: with the kind, the detail and the reference.
    """
    data = reference if isinstance(reference, bytes) else read_picture(reference)
    try:
        return _decode(data, max_pixels)
    except PictureError as error:
        name = f"{len(data)} bytes" if isinstance(reference, bytes) else str(reference)
        raise PictureError(error.kind, error.detail, name) from error.__cause__


def read_picture(reference: str | Path) -> bytes:
    """The undecoded bytes of a picture file, tar member or cell. Raises PictureError."""
    size = stat_picture(reference).size
    if size > MAX_BYTES:
        raise PictureError("too large", f"{size} bytes, at most {MAX_BYTES}", str(reference))
    try:
        member = split_reference(str(reference))
        if member is None:
            return Path(reference).read_bytes()
        file, place = member
        if not file.lower().endswith(".tar"):
            return arrow_files.read_cell(file, place)
        location = tar_shards.locate(file, place)
        assert location is not None, "stat_picture has just found it"
        return tar_shards.read(file, location)
    except OSError as error:
        raise PictureError("unreadable", error.strerror or str(error), str(reference)) from error


def stat_picture(reference: str | Path) -> PictureStat:
    """Size and version of a picture file, tar member or cell. Raises PictureError."""
    text = str(reference)
    if is_url(text):
        raise PictureError("url", "an address; pictures are never downloaded", text)
    member = split_reference(text)
    try:
        if member is None:
            status = os.stat(text)
            if not stat.S_ISREG(status.st_mode):
                raise PictureError("unreadable", "not a regular file", text)
            return PictureStat(status.st_size, f"{status.st_size}:{status.st_mtime_ns}")
        file, place = member
        if not file.lower().endswith(".tar"):
            status = os.stat(file)
            version = f"{status.st_size}:{status.st_mtime_ns}:{place}"
            return PictureStat(len(arrow_files.read_cell(file, place)), version)
        location = tar_shards.locate(file, place)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PictureError("missing", "no such file", text) from error
    except (OSError, ValueError) as error:  # ShardError, an over-long name, a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError("unreadable", reason, text) from error
    if location is None:
        raise PictureError("missing", f"{file} has no member {place}", text)
    return PictureStat(location.size, f"{location.version}:{location.offset}:{location.size}")


def check_picture(
    reference: str | Path,
    check: Literal["decode", "header", "exists"],
    max_pixels: int,
    status: PictureStat | None = None,
) -> bytes:
    """Checks that a picture can be opened and returns its identity (16 bytes).

    "decode" reads and decodes all of it; its identity is a hash of its bytes. "header" opens the
    file without decoding and "exists" only looks it up; both identify it by size and time of
    last change, `status` where that is known. Raises PictureError.
    """
    if check == "decode":
        data = read_picture(reference)
        try:
            _decode(data, max_pixels, smallest=True)
        except PictureError as error:
            raise PictureError(error.kind, error.detail, str(reference)) from error
        return hashlib.blake2b(data, digest_size=16).digest()
    status = status or stat_picture(reference)
    if status.size == 0:
        raise PictureError("empty", "0 bytes", str(reference))
    if check == "header":
        name = str(reference)
        try:
            if split_reference(name) is None:
                with open(name, "rb") as file:
                    _open(file, max_pixels)
            else:
                _open(io.BytesIO(read_picture(name)), max_pixels)
        except PictureError as error:
            raise PictureError(error.kind, error.detail, name) from error
        except OSError as error:
            raise PictureError("unreadable", error.strerror or str(error), name) from error
    return hashlib.blake2b(status.version.encode(), digest_size=16).digest()


def _open(source: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        image: Image.Image = Image.open(source, formats=_FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        image = _open_by_plugin(source, error)
    except Exception as error:  # plugins raise whatever their parsers stumble over
        raise _explained(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError("too large", f"{width} x {height} pixels, at most {max_pixels}")
    memory = _PLAIN_BYTES * max(max_pixels, MAX_PIXELS)
    # Which kind it is takes time, and decides nothing for most pictures.
    if width * height * MOST_BYTES > memory and width * height * bytes_per_pixel(image) > memory:
        most = memory // bytes_per_pixel(image)
        kind = f"{image.format} in {image.mode}"
        raise PictureError("too large", f"{width} x {height} pixels, at most {most} of {kind}")
    if width < 1 or height < 1:
        raise PictureError("empty", f"{width} x {height} pixels")
    return image


def _open_by_plugin(source: BinaryIO, error: UnidentifiedImageError) -> Image.Image:
    """A picture in a format that Pillow knows only by a package of its own."""
    source.seek(0)
    start = source.read(16)
    for magic, name, module, extra in _PLUGINS:
        if not magic.match(start):
            continue
        try:
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
            return Image.open(source, formats=(name,))
        except ImportError:
            detail = f"{name} needs pip install 'gill[{extra}]'"
            raise PictureError("unsupported", detail) from error
        except MemoryError:
            raise
        except Exception as other:  # plugins raise whatever their parsers stumble over
            raise _explained(other) from other
    raise _explained(error) from error


def _decode(data: bytes, max_pixels: int, *, smallest: bool = False) -> Image.Image:
    """`smallest` lets JPEG skip most of the inverse transform: every byte is still decoded."""
    if not data:
        raise PictureError("empty", "0 bytes")
    with _open(io.BytesIO(data), max_pixels) as image:
        try:
            if smallest:
                image.draft(None, (1, 1))
            return to_rgb(image)
        except (MemoryError, PictureError):
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            raise _explained(error) from error


def _explained(error: Exception) -> PictureError:
    detail = str(error) or type(error).__name__
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return PictureError("too large", detail)
    if isinstance(error, UnidentifiedImageError):
        return PictureError("unreadable", "not a picture in a known format, or damaged")
    if "too large" in detail.lower():
        return PictureError("too large", detail)
    if isinstance(error, EOFError) or re.search(
        r"truncated|unexpected end|not enough image data", detail, re.IGNORECASE
    ):
        return PictureError("truncated", detail)
    return PictureError("unreadable", detail)
