"""Every kind of image file becomes RGB or a short reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from siglit.data.decode_image import BadImage, decode_image

LIMIT = 1_000_000


def encode(image, fmt="PNG", **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def noise(mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_rgb_png_keeps_every_pixel():
    image = noise()
    decoded = decode_image(encode(image), LIMIT)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize(
    ("draft", "size"), [(None, (1201, 640)), (321, (1201, 640)), (320, (601, 320)), (224, (601, 320)), (64, (151, 80))]
)
def test_a_draft_scales_jpegs_as_far_as_both_sides_stay_large_enough(draft, size):
    data = encode(noise(size=(1201, 640)), "JPEG")
    assert decode_image(data, 10**6, draft).size == size
    assert decode_image(encode(noise("CMYK", (640, 640)), "JPEG"), 10**6, 224).mode == "RGB"


def test_a_draft_leaves_other_formats_and_the_limit_of_pixels_alone():
    image = noise(size=(640, 640))
    assert np.array_equal(np.asarray(decode_image(encode(image), 10**6, 64)), np.asarray(image))
    with pytest.raises(BadImage, match="max_pixels"):
        decode_image(encode(image, "JPEG"), 640 * 640 - 1, 64)


@pytest.mark.parametrize(
    ("mode", "fmt"), [("CMYK", "JPEG"), ("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("1", "PNG")]
)
def test_modes_convert_as_pil_does(mode, fmt):
    data = encode(noise(mode), fmt)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(data, LIMIT)), np.asarray(expected))


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_palette_with_transparency_gives_the_palette_colors_without_a_warning(transparency):
    image = noise().quantize(16)
    decoded = decode_image(encode(image, transparency=transparency), LIMIT)
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_transparent_color_of_a_gray_png_is_harmless():
    image = noise("L")
    decoded = decode_image(encode(image, transparency=7), LIMIT)
    assert np.array_equal(np.asarray(decoded)[..., 0], np.asarray(image))


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(fmt):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    decoded = decode_image(data, LIMIT)
    assert decoded.size == (8, 8)
    assert decoded.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(("mode", "fmt"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_16_bit_grayscale_is_scaled_not_saturated(mode, fmt):
    values = np.array([[0, 257, 25700, 65535]], dtype=np.int64)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (4, 1), values.astype(dtype).tobytes())
    grey = np.asarray(decode_image(encode(image, fmt), LIMIT))
    assert grey.tolist() == [[[0] * 3, [1] * 3, [100] * 3, [255] * 3]]


def test_32_bit_grayscale_is_scaled_by_its_own_range():
    image = Image.frombytes("I", (2, 1), np.array([[0, 2**31 - 1]], dtype="<i4").tobytes())
    assert np.asarray(decode_image(encode(image, "TIFF"), LIMIT))[0, :, 0].tolist() == [0, 255]


def test_exif_orientation_is_left_as_stored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(noise(), "JPEG", exif=exif), LIMIT).size == (40, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>404 Not Found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "header|not an image"),
    ],
)
def test_bytes_that_are_no_image_are_refused(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(fmt, share):
    data = encode(noise(size=(200, 150)), fmt)
    with pytest.raises(BadImage):
        decode_image(data[: int(len(data) * share)], LIMIT)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "PPM"])
def test_damaged_bytes_give_an_image_or_a_reason_and_nothing_else(fmt):
    """No decoder exception and no warning (an error here) leaks, wherever the damage lies."""
    data, random = bytearray(encode(noise(), fmt)), np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, min(len(data), 600), 4):
            damaged[place] = random.integers(256)
        try:
            assert decode_image(bytes(damaged), LIMIT).mode == "RGB"
        except BadImage:
            continue


def test_size_is_checked_from_the_header_alone():
    """The file has no pixels at all, so decoding it would have failed for another reason."""
    with pytest.raises(BadImage, match=r"1001 x 1000 pixels, more than max_pixels = 1000000"):
        decode_image(png_header(1001, 1000), LIMIT)
    assert decode_image(encode(noise(size=(1000, 1000))), LIMIT).size == (1000, 1000)


@pytest.mark.parametrize("side", [10_000, 40_000])
def test_pil_bomb_checks_neither_warn_nor_raise(side):
    """10,000² makes PIL warn (an error here), 40,000² makes it raise DecompressionBombError."""
    with pytest.raises(BadImage, match="pixels"):
        decode_image(png_header(side, side), LIMIT)


def test_pil_keeps_its_settings(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    decode_image(encode(noise()), LIMIT)
    assert Image.MAX_IMAGE_PIXELS == 12345
