"""Pictures: the manifest of real and hostile files, a PNG decoder that is not Pillow's as the
oracle, and hand-made files for what the manifest lacks."""

import csv
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from corpora.picture_rendering import bytes_per_pixel
from corpora.pictures import (
    MAX_PIXELS,
    PictureError,
    check_picture,
    open_picture,
    read_picture,
    stat_picture,
)

# Pillow complains about the damaged metadata of the hostile files.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")


@pytest.fixture(scope="module")
def robust(shared_data: Path) -> Path:
    folder = shared_data / "robust_images"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="module")
def manifest(robust: Path) -> list[dict[str, str]]:
    with open(robust / "manifest.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def pixels(reference: str | Path | bytes) -> np.ndarray:
    image = open_picture(reference)
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    assert not image.info
    return np.asarray(image).astype(int)


# ---- a PNG decoder of our own: the standard's text, none of Pillow's code -------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]
) -> bytes:
    """`rows` are packed samples, each row preceded by its filter type."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*one) for one in extra)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png_on_white(data: bytes) -> np.ndarray | None:
    """float [H, W, 3] in 0 .. 255; None for interlaced files."""
    chunks: dict[bytes, bytes] = {}
    place = 8
    while b"IEND" not in chunks:
        (size,) = struct.unpack(">I", data[place : place + 4])
        name = data[place + 4 : place + 8]
        chunks[name] = chunks.get(name, b"") + data[place + 8 : place + 8 + size]
        place += 12 + size
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if interlaced:
        return None
    bands = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    step = max(1, bands * depth // 8)
    stride = (width * bands * depth + 7) // 8
    raw = zlib.decompress(chunks[b"IDAT"])
    before = [0] * stride
    lines = []
    for y in range(height):
        kind, line = raw[y * (stride + 1)], list(raw[y * (stride + 1) + 1 :][:stride])
        for x in range(stride):
            a = line[x - step] if x >= step else 0
            b, c = before[x], before[x - step] if x >= step else 0
            if kind == 1:
                line[x] += a
            elif kind == 2:
                line[x] += b
            elif kind == 3:
                line[x] += (a + b) // 2
            elif kind == 4:
                nearest = sorted(
                    ((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))
                )
                line[x] += nearest[0][2]
            line[x] &= 255
        lines.append(line)
        before = line
    packed = np.array(lines, np.uint8)
    if depth == 16:
        samples = packed.astype(int).reshape(height, -1, 2) @ [256, 1]
    else:
        bits = np.unpackbits(packed, axis=1).reshape(height, -1, depth)
        samples = bits.astype(int) @ (1 << np.arange(depth)[::-1])
    samples = samples[:, : width * bands].reshape(height, width, bands)
    white = 2**depth - 1
    transparent = chunks.get(b"tRNS")
    if colour == 3:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3).astype(float)
        alphas = np.full(len(palette), 255.0)
        if transparent:
            alphas[: len(transparent)] = np.frombuffer(transparent, np.uint8)
        rgb, alpha = palette[samples[..., 0]], alphas[samples[..., 0]] / 255
    else:
        bands_of_colour = 3 if colour in (2, 6) else 1
        rgb = samples[..., :bands_of_colour] * 255 / white
        alpha = samples[..., -1] / white if colour in (4, 6) else np.ones((height, width))
        if transparent:
            key = struct.unpack(f">{bands_of_colour}H", transparent)
            alpha = 1.0 - (samples == key).all(-1)
    on_white = alpha[..., None] * rgb + (1 - alpha[..., None]) * 255
    return np.broadcast_to(on_white, (height, width, 3))


# ---- the manifest ---------------------------------------------------------------------------


def expected_to_open(row: dict[str, str]) -> bool:
    return row["pillow_open"] == "ok" and row["pillow_load_convert_rgb"] == "ok"


def test_every_file_of_the_manifest_opens_or_is_refused_with_a_reason(
    robust: Path, manifest: list[dict[str, str]]
) -> None:
    assert len(manifest) == 105
    refused: dict[str, str] = {}
    for row in manifest:
        path = robust / row["file"]
        try:
            checked: str = check_picture(path, "decode", MAX_PIXELS).hex()
        except PictureError as error:
            checked = error.kind
        if expected_to_open(row):
            shape = pixels(path).shape
            stored = tuple(map(int, row["size"].split("x")))
            turned = row["exif_orientation"] in ("5", "6", "7", "8")
            assert shape == ((stored[0], stored[1], 3) if turned else (stored[1], stored[0], 3))
            assert len(checked) == 32
        else:
            with pytest.raises(PictureError) as caught:
                open_picture(path)
            refused[path.name] = caught.value.kind
            assert caught.value.reference == str(path)
            assert checked == caught.value.kind, "the check and the opening disagree"
    assert refused == {
        "truncated_jpeg.jpg": "truncated",
        "truncated_image.png": "truncated",
        "truncated_end_chunk.png": "truncated",
        "ultrahdr.jpg": "truncated",
        "broken.png": "unreadable",
        "broken_data_stream.png": "unreadable",
        "unknown_compression_method.png": "unreadable",
        "zero_width.gif": "unreadable",
        "negative_size.ppm": "unreadable",
        "seek_too_large.tif": "unreadable",
        "chunk_no_fctl.png": "unreadable",
        "syntax_num_frames_zero.png": "unreadable",
        "crash-2020-10-test.tif": "unreadable",
        "decompression_bomb.gif": "too large",
        "decompression_bomb.ico": "too large",
        "png_decompression_dos.png": "too large",
        "reallybig.bmp": "too large",
        "badwidth.bmp": "too large",
    }


def test_png_files_against_a_decoder_that_is_not_pillow(
    robust: Path, manifest: list[dict[str, str]]
) -> None:
    compared = 0
    for row in manifest:
        if row["format"] != "PNG" or row["exif_orientation"] not in ("None", "1"):
            continue
        if max(map(int, row["size"].split("x"))) > 300 or not expected_to_open(row):
            continue
        expected = png_on_white((robust / row["file"]).read_bytes())
        if expected is not None:
            error = np.abs(pixels(robust / row["file"]) - expected).max()
            assert error <= 1, f"{row['file']}: off by {error}"
            compared += 1
    assert compared >= 20


def test_exif_examples_look_alike_once_upright(robust: Path) -> None:
    folder = robust / "exif_orientation_examples"
    upright = pixels(folder / "Landscape_1.jpg")
    assert upright.shape == (1200, 1800, 3)
    for orientation in range(2, 9):
        turned = pixels(folder / f"Landscape_{orientation}.jpg")
        assert turned.shape == upright.shape
        assert np.abs(turned - upright).mean() < 5
    assert np.abs(upright[:, ::-1] - upright).mean() > 20, "the test could not tell a mirror image"

    hopper = pixels(robust / "pillow/plain/hopper.jpg")
    for suffix, orientations in ((".jpg", range(2, 9)), (".webp", (2, 6, 8))):
        for orientation in orientations:
            kind = "exif_orientation_" + ("jpeg" if suffix == ".jpg" else "webp")
            name = f"pillow/{kind}/hopper_orientation_{orientation}{suffix}"
            assert np.abs(pixels(robust / name) - hopper).mean() < 8, name


def test_colours_against_the_same_picture_in_another_form(robust: Path) -> None:
    def apart(one: str, other: str) -> float:
        return float(
            np.abs(pixels(robust / "pillow" / one) - pixels(robust / "pillow" / other)).mean()
        )

    # Adobe CMYK is stored inverted; taken as it stands it would be the negative, 200 away.
    assert apart("cmyk_jpeg/pil_sample_cmyk.jpg", "other_format/pil_sample_rgb.jpg") < 12
    assert apart("sixteen_bit/hopper_16bit.pgm", "grey/hopper_gray.jpg") < 3
    assert apart("palette_alpha/transparent.png", "palette_alpha/transparent.webp") < 3
    assert apart("palette_alpha/transparent.png", "palette_alpha/transparent.gif") < 2
    assert apart("plain/hopper.png", "plain/hopper.jpg") < 4
    assert apart("plain/hopper.png", "plain/hopper.gif") < 12
    assert apart("plain/hopper.png", "other_format/hopper.bmp") == 0
    assert apart("plain/hopper.png", "other_format/hopper.tif") == 0


def test_the_first_frame_of_an_animation(robust: Path) -> None:
    red = np.broadcast_to([255, 0, 0], (64, 128, 3))
    assert (pixels(robust / "pillow/animated/delay.png") == red).all()
    assert (pixels(robust / "pillow/sixteen_bit/mode_16bit.png") == red).all()
    assert pixels(robust / "pillow/multi_picture/frozenpond.mpo").shape == (480, 640, 3)


# ---- made by hand ---------------------------------------------------------------------------


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = [0, 128, 257, 0x7FFF, 0x8000, 65534, 65535]
    data = png(7, 1, 16, 0, b"\0" + struct.pack(">7H", *values))
    expected = [round(value * 255 / 65535) for value in values]
    assert pixels(data)[0].tolist() == [[value] * 3 for value in expected]
    assert expected == [0, 0, 1, 127, 128, 255, 255]


@pytest.mark.parametrize("bits", [2, 4])
def test_transparent_grey_of_few_bits_is_white(bits: int) -> None:
    """The key counts in the file's units, 0 .. 2^bits - 1."""
    byte = 0b00011011 if bits == 2 else 0x01
    data = png(8 // bits, 1, bits, 0, bytes([0, byte]), (b"tRNS", struct.pack(">H", 1)))
    expected = png_on_white(data)
    assert expected is not None
    assert expected[0, 1].tolist() == [255, 255, 255], "the oracle itself"
    np.testing.assert_array_equal(pixels(data), expected)


def test_transparent_colour_of_16_bits_is_white() -> None:
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0)
    data = png(2, 1, 16, 2, b"\0" + row, (b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    assert pixels(data)[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_half_transparent_palette_is_blended_with_white() -> None:
    palette = (b"PLTE", bytes([0, 0, 0, 255, 0, 0]))
    data = png(2, 1, 8, 3, bytes([0, 0, 1]), palette, (b"tRNS", bytes([0, 128])))
    assert pixels(data)[0].tolist() == [[255, 255, 255], [255, 127, 127]]


def test_ascii_pgm_with_an_odd_white_level() -> None:
    assert pixels(b"P2 3 1 1000 0 500 1000")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("bits", "inverted"), [(16, False), (16, True)])
def test_16_bit_tiff_in_both_directions(bits: int, inverted: bool) -> None:
    """A TIFF by hand: PhotometricInterpretation 0 means that 0 is white."""
    samples = struct.pack("<3H", 0, 0x8000, 0xFFFF)
    tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: int(not inverted), 273: 8, 277: 1, 278: 1}
    tags[279] = len(samples)
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = struct.pack("<2sHI", b"II", 42, 14) + samples
    data += struct.pack("<H", len(tags)) + directory + b"\0\0\0\0"
    assert pixels(data)[0, :, 0].tolist() == ([255, 127, 0] if inverted else [0, 128, 255])


def test_float_and_signed_samples_have_no_white() -> None:
    for mode in ("F", "I"):
        with pytest.raises(PictureError) as caught:
            open_picture(saved(Image.new(mode, (2, 2)), "TIFF"))
        assert caught.value.kind == "unsupported"


def test_orientation_is_applied_once() -> None:
    """Whoever reads the picture again, or saves it, must not find the orientation."""
    stored = Image.new("RGB", (2, 1))
    stored.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_picture(saved(stored, "PNG", exif=exif))
    assert image.size == (1, 2)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert not image.getexif()
    assert b"eXIf" not in saved(image, "PNG")


def test_damaged_metadata_of_a_good_picture_is_ignored() -> None:
    data = saved(Image.new("RGB", (4, 2), "blue"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert pixels(data).shape == (2, 4, 3)


def test_lab_and_extreme_aspect() -> None:
    lab = ImageCms.applyTransform(
        Image.new("RGB", (3, 3), (200, 30, 60)),
        ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        ),
    )
    assert lab is not None
    assert np.abs(pixels(saved(lab, "TIFF")) - [200, 30, 60]).max() <= 3
    assert pixels(saved(Image.new("L", (20_000, 1), 7), "PNG")).shape == (1, 20_000, 3)


def test_limits_are_refused_before_decoding() -> None:
    data = saved(Image.new("L", (100, 50)), "PNG")
    assert open_picture(data, max_pixels=5000).size == (100, 50)
    with pytest.raises(PictureError, match="100 x 50 pixels, at most 4999") as caught:
        open_picture(data, max_pixels=4999)
    assert caught.value.kind == "too large"

    # 120 megapixels: Pillow itself would only warn. There are no pixel data behind the header.
    bomb = png(12_000, 10_000, 8, 0, b"")
    with pytest.raises(PictureError) as caught:
        open_picture(bomb)
    assert caught.value.kind == "too large"


@pytest.mark.parametrize("check", ["decode", "header", "exists"])
def test_what_is_not_a_picture_file(tmp_path: Path, check: str) -> None:
    def kind(reference: str | Path) -> str:
        with pytest.raises(PictureError) as caught:
            check_picture(reference, check, MAX_PIXELS)  # type: ignore[arg-type]
        with pytest.raises(PictureError) as opened:
            open_picture(reference)
        assert opened.value.kind == caught.value.kind
        return caught.value.kind

    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert kind(tmp_path / "no.jpg") == "missing"
    assert kind(tmp_path / "empty.jpg") == "empty"
    assert kind(tmp_path / "empty.jpg/a.jpg") == "missing"
    assert kind(tmp_path) == "unreadable"
    assert kind(tmp_path / "pipe.jpg") == "unreadable"  # and does not wait for a writer
    assert kind(str(tmp_path / ("x" * 300))) == "unreadable"
    assert kind("nul\0byte.jpg") == "unreadable"
    assert kind("https://example.org/a.jpg") == "url"
    assert kind("data:image/png;base64,AAAA") == "url"


def test_each_check_sees_what_it_says(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = saved(Image.fromarray(noise), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("<html>gone</html>")
    assert check_picture(tmp_path / "text.jpg", "exists", MAX_PIXELS)
    assert check_picture(tmp_path / "cut.jpg", "header", MAX_PIXELS)
    with pytest.raises(PictureError, match="not a picture"):
        check_picture(tmp_path / "text.jpg", "header", MAX_PIXELS)
    with pytest.raises(PictureError) as caught:
        check_picture(tmp_path / "cut.jpg", "decode", MAX_PIXELS)
    assert caught.value.kind == "truncated"


def test_identity_is_the_content_when_decoded_and_the_file_otherwise(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    one.write_bytes(saved(Image.new("RGB", (4, 4), "red"), "PNG"))
    two.write_bytes(one.read_bytes())
    os.utime(two, ns=(1, 1))
    identities = {
        check: {check_picture(path, check, MAX_PIXELS) for path in (one, two)}  # type: ignore[arg-type]
        for check in ("decode", "header", "exists")
    }
    assert len(identities["decode"]) == 1
    assert len(identities["header"]) == len(identities["exists"]) == 2
    assert {len(identity) for some in identities.values() for identity in some} == {16}
    assert stat_picture(one).size == len(read_picture(one)) == one.stat().st_size


def test_no_picture_starts_another_program() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    with pytest.raises(PictureError, match="not a picture in a known format"):
        open_picture(eps)


def test_png_text_bomb_stays_closed() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(PictureError) as caught:
        open_picture(saved(Image.new("L", (2, 2)), "PNG", pnginfo=info))
    assert caught.value.kind == "too large"


def test_members_of_a_tar_shard(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    red = saved(Image.new("RGB", (3, 2), "red"), "PNG")
    with tarfile.open(shard, "w") as archive:
        for name, data in (("a/é#1.png", red), ("a/empty.png", b""), ("a/text.png", b"no")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert pixels(f"{shard}#a/é#1.png").tolist() == [[[255, 0, 0]] * 3] * 2
    assert check_picture(f"{shard}#a/é#1.png", "header", MAX_PIXELS)
    for name, kind in (("no.png", "missing"), ("empty.png", "empty"), ("text.png", "unreadable")):
        with pytest.raises(PictureError) as caught:
            open_picture(f"{shard}#a/{name}")
        assert caught.value.kind == kind
    for path, kind in ((tmp_path / "1.tar", "missing"), (tmp_path / "bad.tar", "unreadable")):
        (tmp_path / "bad.tar").write_bytes(b"not a tar file" * 100)
        with pytest.raises(PictureError) as caught:
            open_picture(f"{path}#a.png")
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("start", "extra"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "heic"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "heic"),
        (b"\xff\x0a" + b"\0" * 20, "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 8, "jxl"),
    ],
)
def test_formats_of_an_extra_name_it_where_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, extra: str
) -> None:
    monkeypatch.setattr("corpora.pictures.importlib.import_module", _absent)
    (tmp_path / "photo.jpg").write_bytes(start + b"\0" * 100)
    for reference in (str(tmp_path / "photo.jpg"), start + b"\0" * 100):
        with pytest.raises(PictureError, match=rf"gill\[{extra}\]") as caught:
            open_picture(reference)
        assert caught.value.kind == "unsupported"


def _absent(name: str) -> None:
    raise ImportError(name)


def test_a_picture_is_what_it_holds_not_what_it_is_called(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    for name in ("noext", "photo.jfif", "photo.JPG", "photo.heic"):
        shutil.copy(tmp_path / "a.png", tmp_path / name)
        assert open_picture(tmp_path / name).size == (3, 2)


_PEAK = """
import sys
from corpora.pictures import open_picture

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

file = sys.stdin.buffer.read()
before = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as counters:
    counters.write("5")
picture = open_picture(file)
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
        ("RGBA", "PNG", {"compress_level": 1}),
        ("I;16", "PNG", {"compress_level": 1}),
        ("RGBA", "WEBP", {"lossless": True, "quality": 0, "method": 0}),
        ("RGBA", "JPEG2000", {"quality_mode": "rates", "quality_layers": [40]}),
        ("RGBA", "AVIF", {"quality": 30, "speed": 10}),
    ],
)
def test_a_picture_takes_no_more_memory_than_it_was_let_in_for(
    mode: str, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in a process of its own; the largest that is let in takes 4 x 48 MB so."""
    size = (2000, 1000)
    coarse = np.random.default_rng(0).integers(0, 256, (50, 100, 4), dtype=np.uint8)
    colours = np.asarray(Image.fromarray(coarse).resize(size))
    if mode == "I;16":
        picture = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(np.ascontiguousarray(colours[..., : len(mode)]), mode)
    file = saved(picture, kind, **options)
    ran = subprocess.run([sys.executable, "-c", _PEAK], input=file, capture_output=True, check=True)
    with Image.open(io.BytesIO(file)) as opened:
        expected = bytes_per_pixel(opened)
    assert float(ran.stdout) < 2_000_000 * expected + 2**23  # the libraries are in it
    monkeypatch.setattr("corpora.pictures.MAX_PIXELS", 2_000_000)
    if expected > 4:
        with pytest.raises(PictureError, match=f"at most {8_000_000 // expected} of {kind} in"):
            open_picture(file, max_pixels=2_000_000)
    assert open_picture(file, max_pixels=500_000 * expected).size == size
