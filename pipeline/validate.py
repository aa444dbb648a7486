"""Is this file a picture that every decoder will take, and if not, can it faithfully become one?

The size in the header is checked before anything is decoded (a JPEG of 631 bytes can ask for a
gigabyte), then the whole picture is decoded once. Baseline JPEGs in RGB or grey keep their bytes.
Everything else that decodes is transcoded to a baseline JPEG: hardware decoders take nothing else,
and an EXIF rotation is applied because no reader of shards would apply it.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# The formats whose decoders are switched on: others (EPS runs a program) are refused unread.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
EXIF_ORIENTATION = 0x0112
JPEG_SIDE_LIMIT_PX = 65_535


class RefusedError(Exception):
    """A file that is no usable picture; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is too much, checked before a picture is decoded."""

    max_pixels: int = 128_000_000
    """Width times height."""
    max_bytes: int = 256_000_000
    """Of one file."""
    min_side_px: int = 1
    """Shorter side."""
    quality: int = 95
    """JPEG quality where a picture must be transcoded; chroma is never subsampled then."""


@dataclass(frozen=True)
class AcceptedPicture:
    """A JPEG, its size, and what was changed ("" where the bytes are the file's own)."""

    picture: bytes
    width: int
    height: int
    change: str


def accept_picture(data: bytes, limits: Limits) -> AcceptedPicture:
    """The picture to store for a file's bytes.

    Raises:
        RefusedError: if it is broken, too large, or no picture.
    """
    if not data:
        raise RefusedError("empty file")
    if len(data) > limits.max_bytes:
        raise RefusedError(f"{len(data)} bytes, the limit is {limits.max_bytes}")
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of sizes for which this module has its own limit.
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = None  # ours is checked between the header and the decoding
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(*image.size, limits)
            image.load()
            return _accept_decoded(image, data, limits)
        except RefusedError:
            raise
        except UnidentifiedImageError:
            raise RefusedError("not a picture in a known format") from None
        except MemoryError:
            raise RefusedError("decoding needs more memory than there is") from None
        except Exception as error:  # Pillow's decoders raise a dozen kinds for broken input
            raise RefusedError(f"{type(error).__name__}: {error}") from error


def check_size(width: int, height: int, limits: Limits) -> None:
    """Compare a picture's size, as its header gives it, with the limits.

    Raises:
        RefusedError: if it is too large or too small.
    """
    if width * height > limits.max_pixels:
        raise RefusedError(f"{width}x{height} pixels, the limit is {limits.max_pixels} in all")
    if min(width, height) < limits.min_side_px:
        raise RefusedError(f"{width}x{height} pixels, the limit is {limits.min_side_px} a side")
    if max(width, height) > JPEG_SIDE_LIMIT_PX:
        raise RefusedError(f"{width}x{height} pixels, a JPEG has at most {JPEG_SIDE_LIMIT_PX}")


def _accept_decoded(image: Image.Image, data: bytes, limits: Limits) -> AcceptedPicture:
    reason = _why_transcode(image)
    if not reason:
        return AcceptedPicture(data, *image.size, "")
    rgb = as_rgb(ImageOps.exif_transpose(image))
    output = io.BytesIO()
    rgb.save(output, "JPEG", quality=limits.quality, subsampling="4:4:4")
    return AcceptedPicture(output.getvalue(), *rgb.size, reason)


def _why_transcode(image: Image.Image) -> str:
    if image.format != "JPEG":
        return f"was {image.format}"
    if image.mode not in ("RGB", "L"):
        return f"was {image.mode}"
    if image.info.get("progressive"):
        return "was progressive"
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        return "was rotated by EXIF"
    return ""


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB or grey: 16-bit is scaled, transparency lies over white, the first frame counts."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scaled_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    top = 65_535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
    return Image.fromarray(np.clip(values * 255 / top, 0, 255).astype(np.uint8), "L")
