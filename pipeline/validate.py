"""Is this file a picture that every decoder will take, and if not, can it faithfully become one?

The size in the header is checked before anything is decoded (a JPEG of 631 bytes can ask for a
gigabyte), then the whole picture is decoded once. Baseline JPEGs in YCbCr or grey whose decoder
has nothing to complain about keep their bytes. Everything else that decodes is transcoded to a
baseline JPEG: hardware decoders take nothing else, and an EXIF rotation is applied because no
reader of shards would apply it.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.picture_header import (
    EMPTY,
    UNKNOWN,
    BadHeaderError,
    Buffer,
    PictureHeader,
    may_be_rotated,
    read_header,
)
from pipeline.program import InputError
from pipeline.transcode import EXIF_ORIENTATION, as_8_bit, transcode

# Only the decoder of the format that the header names is asked, so that none is tried in vain and
# those that run programs (EPS) never. The others are formats that picture_header does not know;
# Pillow reads their sizes without decoding.
FORMATS = {name: (name.upper(),) for name in ("jpeg", "png", "webp", "gif", "tiff", "bmp")}
OTHER_FORMATS = ("PPM", "JPEG2000", "AVIF", "ICO", "PSD")
JPEG_SIDE_LIMIT_PX = 65_500  # of libjpeg
# A progressive JPEG has about ten scans; one of thousands keeps a decoder busy for minutes.
SCAN_LIMIT = 100


class RefusedError(Exception):
    """A file that is no usable picture; the message is "kind" or "kind: details"."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is too much, checked before a picture is decoded."""

    max_pixels: int = 128_000_000
    """Width times height."""
    max_bytes: int = 256_000_000
    """Of one file."""
    min_side_px: int = 1
    """Of the shorter side."""
    max_side_px: int = JPEG_SIDE_LIMIT_PX
    """Of the longer side; a JPEG has at most 65,500."""
    max_aspect: float = 0.0
    """Longer over shorter side. 0: any."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes", "min_side_px", "max_side_px"):
            _at_least(1, name, getattr(self, name))
        if self.max_side_px > JPEG_SIDE_LIMIT_PX:
            raise InputError(
                f"--max-side-px {self.max_side_px}: a JPEG has at most {JPEG_SIDE_LIMIT_PX}"
            )
        if self.max_aspect and not self.max_aspect >= 1:
            raise InputError(f"--max-aspect {self.max_aspect}: give 0 or a number of at least 1")


@dataclass(frozen=True, kw_only=True)
class StoredForm:
    """How pictures are stored."""

    resize: int = 0
    """Shorter side in pixels of what is larger. 0: pictures keep their size."""
    quality: int = 95
    """JPEG quality where a picture is transcoded; chroma is never subsampled then."""
    validate: bool = True
    """Decode JPEGs that could keep their bytes. Without it only their headers are looked at."""

    def __post_init__(self) -> None:
        _at_least(0, "resize", self.resize)
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: give a number from 1 to 100")


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} {value}: give a number of at least {least}")


@dataclass(frozen=True)
class AcceptedPicture:
    """A JPEG, its size, and what was changed ("" where the bytes are the file's own)."""

    picture: bytes
    width: int
    height: int
    change: str


def accept_picture(data: bytes, limits: Limits, form: StoredForm) -> AcceptedPicture:
    """The picture to store for a file's bytes.

    Raises:
        RefusedError: if it is broken, beyond the limits, or no picture.
    """
    if not data:
        raise RefusedError(EMPTY)
    check_bytes(len(data), limits)
    header = _header(data)
    if header:
        check_size(header.width, header.height, limits)
        check_scans(header, data)
        if _is_kept(header, data, form):
            return AcceptedPicture(data, header.width, header.height, "")
    with _reasons_of_pillow(header, limits):
        formats = FORMATS[header.format] if header else OTHER_FORMATS
        image = Image.open(io.BytesIO(data), formats=formats)
        check_size(*image.size, limits)
        size = _stored_size(*image.size, form)
        changes = _why_transcode(image, header, data, form.validate and size == image.size)
        if size != image.size:
            changes.append(f"resized: {image.width}x{image.height} to {size[0]}x{size[1]}")
            image.draft(None, (2 * size[0], 2 * size[1]))  # a JPEG's decoder can halve at once
        if not changes:
            return AcceptedPicture(data, *image.size, "")
        image.load()
        bits = header.bits if header else 8
        picture, size, note = transcode(image, bits, size, form.quality)
        return AcceptedPicture(picture, *size, "; ".join([*changes, *note]))


def decode_grey(data: bytes, limits: Limits, side_px: int) -> Image.Image:
    """A picture in grey for looking at its coarse shapes; a JPEG at about ``side_px`` only.

    Raises:
        RefusedError: if it is broken, beyond the limits, or no picture.
    """
    header = _header(data)
    if header:
        check_size(header.width, header.height, limits)
        check_scans(header, data)
    with _reasons_of_pillow(header, limits):
        formats = FORMATS[header.format] if header else OTHER_FORMATS
        image = Image.open(io.BytesIO(data), formats=formats)
        check_size(*image.size, limits)
        image.draft("L", (side_px, side_px))
        image.load()
        grey, _ = as_8_bit(image, header.bits if header else 8)
        return grey.convert("L")


def check_bytes(count: int, limits: Limits) -> None:
    """Compare a file's size with the limit.

    Raises:
        RefusedError: if it is too large.
    """
    if count > limits.max_bytes:
        raise RefusedError(f"too many bytes: {count}, the limit is {limits.max_bytes}")


def check_size(width: int, height: int, limits: Limits) -> None:
    """Compare a picture's size, as its header gives it, with the limits.

    Raises:
        RefusedError: if it is too large, too small or too long.
    """
    size = f"{width}x{height}"
    if width * height > limits.max_pixels:
        raise RefusedError(f"too many pixels: {size}, the limit is {limits.max_pixels} in all")
    if max(width, height) > limits.max_side_px:
        raise RefusedError(f"too long: {size} pixels, the limit is {limits.max_side_px} a side")
    if min(width, height) < limits.min_side_px:
        raise RefusedError(f"too small: {size} pixels, the limit is {limits.min_side_px} a side")
    if limits.max_aspect and max(width, height) > limits.max_aspect * min(width, height):
        raise RefusedError(f"too elongated: {size}, the limit is {limits.max_aspect:g} to 1")


def _header(data: bytes) -> PictureHeader | None:
    try:
        return read_header(data)
    except BadHeaderError as error:
        if str(error) == UNKNOWN:
            return None
        raise RefusedError(f"damaged header: {error}") from None


def check_scans(header: PictureHeader, data: Buffer) -> None:
    """Compare the scans of a progressive JPEG with the limit; other pictures pass unread.

    Raises:
        RefusedError: if there are too many.
    """
    if header.format == "jpeg" and header.progressive:
        scans = bytes(data).count(b"\xff\xda")  # coded data has no such bytes
        if scans > SCAN_LIMIT:
            raise RefusedError(f"too many scans: {scans}, the limit is {SCAN_LIMIT}")


@contextmanager
def _reasons_of_pillow(header: PictureHeader | None, limits: Limits) -> Iterator[None]:
    """What Pillow raises, which is of a dozen kinds, as a RefusedError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        # Pictures inside pictures (ICO, the frames of a GIF) are beyond our look at the header.
        Image.MAX_IMAGE_PIXELS = limits.max_pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except RefusedError:
            raise
        except UnidentifiedImageError:
            raise RefusedError("damaged header" if header else UNKNOWN) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise RefusedError(f"too many pixels: {error}") from None
        except MemoryError:
            raise RefusedError("too much memory: more than there is") from None
        except Exception as error:
            kind = "truncated" if "truncated" in str(error).lower() else "damaged"
            raise RefusedError(f"{kind}: {error or type(error).__name__}") from error


def _stored_size(width: int, height: int, form: StoredForm) -> tuple[int, int]:
    shorter = min(width, height)
    if not 0 < form.resize < shorter:
        return width, height
    scale = form.resize / shorter
    return round(width * scale), round(height * scale)


def _is_kept(header: PictureHeader, data: bytes, form: StoredForm) -> bool:
    """Whether nothing speaks against a JPEG's bytes, found without Pillow: most are such."""
    size = (header.width, header.height)
    plain = header.format == "jpeg" and header.baseline and header.channels != 4
    if not plain or may_be_rotated(data) or _stored_size(*size, form) != size:
        return False
    return not _damage(data, header, form.validate)


def _why_transcode(
    image: Image.Image, header: PictureHeader | None, data: bytes, decode: bool
) -> list[str]:
    reason = ""
    if header is None or header.format != "jpeg":
        reason = f"was {image.format}"
    elif image.mode not in ("RGB", "L"):
        reason = f"was {image.mode}"
    elif header.progressive:
        reason = "was progressive"
    elif not header.baseline:
        reason = "was not baseline"
    elif image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        reason = "was rotated by EXIF"
    else:
        reason = _damage(data, header, decode)
    return [reason] if reason else []


def _damage(data: bytes, header: PictureHeader, decode: bool) -> str:
    """What libjpeg says of a baseline JPEG that not every decoder would take as it is.

    Pillow stays silent where libjpeg only warns, of a scan that breaks off or is out of step. What
    comes out then is another picture in every decoder, and an error in some.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray"):
            return f"was {colours} in its JPEG"
        if (width, height) != (header.width, header.height):
            return f"was damaged: {width}x{height} pixels, by another header"
        if decode:
            simplejpeg.decode_jpeg(data, colours if colours == "Gray" else "RGB")
    except ValueError as error:
        return f"was damaged: {error}"
    return ""
