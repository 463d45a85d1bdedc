"""Decodes one image file to an 8-bit RGB image, or gives a short reason why it cannot be used.

Knows nothing of listings, transforms or towers. Pixels stay as stored: EXIF orientation is not applied, which is what
CLIP and open_clip do, so an embedding does not depend on the program that made it. Alpha is dropped as
`Image.convert("RGB")` does.
"""

import io
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
# Raster formats only: PIL would also hand EPS to Ghostscript, which runs the file as a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# `warnings.catch_warnings` swaps process-wide filters; two threads inside at once could leave the wrong ones behind.
_HEADER_LOCK = threading.Lock()


class BadImage(ValueError):  # noqa: N818 - it describes the image, not our failure
    """The bytes are not an image this project can use; the text is the short reason."""


def decode_image(data: bytes, max_pixels: int, draft: int | None = None) -> Image.Image:
    """Decode the first frame of an image file to RGB.

    Grayscale deeper than 8 bits is scaled to 0…255 (PIL alone would saturate it). No global setting of PIL is changed,
    so its own limit (twice `Image.MAX_IMAGE_PIXELS`, 179 million pixels by default) holds besides `max_pixels`.

    Args:
        data: the whole file.
        max_pixels: largest width × height accepted; compared with the header, before any pixel is decoded.
        draft: decode JPEGs at the smallest of 1, 1/2, 1/4 and 1/8 of their size that leaves both sides at least this
            many pixels; None: in full. libjpeg then computes that much less.

    Returns:
        An image of mode RGB, (height, width) as stored, or smaller by the scale that `draft` allows.

    Raises:
        BadImage: no bytes, not an image, cut off or broken, or too many pixels.
    """
    if len(data) == 0:
        raise BadImage("zero bytes")
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
        try:
            if draft is not None and image.format == "JPEG":
                image.draft(image.mode, (draft, draft))
            image.load()
            return _to_rgb(image)
        except MemoryError:
            raise
        # OSError, SyntaxError, struct.error, EOFError, zlib.error, …: it depends on where in the file a decoder is.
        except Exception as error:
            raise BadImage(f"truncated or broken: {_first_line(error)}") from error


def _open(data: bytes) -> Image.Image:
    """Read the header; PIL's warnings about size, EXIF or missing plugins are not passed on."""
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Image.open(io.BytesIO(data), formats=known)
        except Image.DecompressionBombError as error:
            raise BadImage(f"more pixels than PIL's limit: {_first_line(error)}") from error
        except UnidentifiedImageError as error:
            raise BadImage(f"not an image ({len(data)} bytes)") from error
        except MemoryError:
            raise
        # A known format whose header breaks off: each plugin raises something else.
        except Exception as error:
            raise BadImage(f"broken header: {_first_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _scale_to_8_bits(image).convert("RGB")
    # A transparent color changes no RGB value, but PIL warns about some of its forms while converting.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map 0…65535 to 0…255; mode I holds 16-bit files too, so only larger values mean a 31-bit range."""
    gray = np.asarray(image).astype(np.int64).clip(min=0)
    white = 65535 if gray.max() <= 65535 else 2**31 - 1
    return Image.fromarray(((gray * 255 + white // 2) // white).astype(np.uint8))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
