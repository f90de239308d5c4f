import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from okavango.modalities.content import Limits
from okavango.modalities.encoders import encode
from okavango.modalities.image import ImageEncoder, cut, decode_image, tiling, upright_size
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tower import measure_tower
from okavango.platform.errors import MediaError

LIMITS = Limits()


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def png_header_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and ends there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    picture = noise()
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode_image(encoded(picture, kind, **options), LIMITS)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(picture))


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_lossy_formats_keep_colour_and_size(kind: str) -> None:
    found = decode_image(encoded(Image.new("RGB", (40, 30), (200, 30, 60)), kind), LIMITS)
    assert (found.mode, found.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(found).astype(int) - (200, 30, 60)).max() <= 4


def test_the_first_frame_of_a_moving_picture_counts() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decode_image(data, LIMITS).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA-like"])
def test_transparency_is_shown_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "PA-like":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        data = encoded(palette, transparency=0)
    else:
        data = encoded(picture.convert(mode))
    found = decode_image(data, LIMITS)
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_half_transparent_red_is_pink() -> None:
    found = decode_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), LIMITS)
    assert found.getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    found = decode_image(encoded(Image.fromarray(values)), LIMITS)
    assert [found.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palettes_become_rgb(mode: str) -> None:
    found = decode_image(encoded(Image.new("L", (4, 4), 255).convert(mode)), LIMITS)
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_becomes_rgb() -> None:
    found = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), LIMITS)
    red, green, blue = found.getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to see it upright
    found = decode_image(encoded(picture, "PNG", exif=exif), LIMITS)
    assert found.size == (16, 32)
    assert found.getpixel((15, 0)) == (0, 0, 0)
    assert found.getpixel((0, 0)) == (255, 255, 255)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert decode_image(data, LIMITS).size == (40, 30)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (b"\x00", "not a PNG"),
        (b"hello, this is no picture at all", "not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        (encoded(noise(), "TIFF"), "not a PNG"),
        (encoded(noise())[:20], "damaged"),
        (png_header_of(0, 5), "damaged|0 ×"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(MediaError, match=text):
        decode_image(data, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_refused(kind: str, share: float) -> None:
    data = encoded(noise(200, 200), kind)
    with pytest.raises(MediaError, match=r"truncated or damaged|header"):
        decode_image(data[: int(len(data) * share)], LIMITS)


def test_too_many_bytes_are_refused_by_number() -> None:
    data = encoded(noise())
    with pytest.raises(MediaError, match=f"{len(data):,} bytes, over the limit of 1,000"):
        decode_image(data, Limits(media_bytes=1000))


@pytest.mark.parametrize("side", [7_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(MediaError, match=r"over the limit|too many pixels"):
        decode_image(png_header_of(side, side), LIMITS)


def test_a_sliver_is_refused() -> None:
    with pytest.raises(MediaError, match="sliver"):
        decode_image(encoded(Image.new("L", (5000, 2))), LIMITS)


def test_decoding_needs_no_model_library(tmp_path: Path) -> None:
    (tmp_path / "clear.png").write_bytes(encoded(noise(mode="RGBA")))
    code = (
        "import sys, pathlib; from okavango.modalities.image import decode_image;"
        "decode_image(pathlib.Path(sys.argv[1]).read_bytes());"
        "print({'numpy', 'open_clip', 'timm', 'torch'} & set(sys.modules))"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "clear.png")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((224, 224), 6, (1, 1)),  # no larger than what the encoder sees
        ((100, 50), 6, (1, 1)),
        ((1000, 1000), 6, (2, 2)),
        ((1000, 1000), 1, (1, 1)),
        ((1200, 400), 6, (1, 3)),
        ((400, 1200), 6, (3, 1)),
        ((1200, 800), 6, (2, 3)),
        ((4000, 100), 4, (1, 4)),
        ((300, 200), 6, (1, 2)),
    ],
)
def test_a_large_picture_is_cut_into_nearly_square_tiles(
    size: tuple[int, int], most: int, expected: tuple[int, int]
) -> None:
    assert tiling(size, 224, most) == expected


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 16))
def test_tiles_are_within_their_number_and_cover_the_picture(size: tuple[int, int], most: int) -> None:
    rows, columns = tiling(size, 224, most)
    assert 1 <= rows * columns <= most
    if max(size) <= 1000:
        pieces = cut(Image.new("L", size), rows, columns)[-rows * columns :]
        assert sum(piece.width * piece.height for piece in pieces) == size[0] * size[1]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_tells_the_size_that_decoding_gives(orientation: int) -> None:
    image = Image.new("RGB", (90, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    data = buffer.getvalue()
    assert upright_size(data, Limits()) == decode_image(data).size


def test_a_picture_in_tiles_takes_their_positions(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "tiny")
    spec = measure_tower(base.encoders["image"].path, tiles=4)
    assert spec.digest != base.encoders["image"].digest
    encoder = ImageEncoder.load(spec)
    for size, pieces in (((32, 32), 1), ((64, 64), 5), ((96, 32), 4)):
        picture = Image.effect_noise(size, 90).convert("RGB")
        (features,) = encode(encoder, [picture])
        assert len(features) == pieces * 16
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        assert ImageEncoder.layout(spec, buffer.getvalue(), Limits()) == (len(features),)
        whole = encode(ImageEncoder.load(base.encoders["image"]), [picture])[0]
        torch.testing.assert_close(features[:16], whole, rtol=1e-4, atol=1e-4)
