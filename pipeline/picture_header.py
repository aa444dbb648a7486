"""Format and size of a picture from its first bytes, without decoding it.

A decoder believes the header: 631 bytes of JPEG that claim 16000 x 16000 pixels cost 768 MB. So
the size is looked up here, and judged, before any decoder sees the bytes. Nothing is read past the
end and no loop is longer than ``STEP_LIMIT``, whatever the bytes say. The cost is one to four
microseconds a picture.

Sources: ISO/IEC 10918-1 B.1-B.2 (JPEG), RFC 2083 (PNG), RFC 9649 (WebP), GIF89a, TIFF 6.0.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]

# Segments of a JPEG or blocks of a GIF in front of the size. An ICC profile or an EXIF record of
# many segments has some hundred; bytes made to keep a parser busy have millions.
STEP_LIMIT = 4096
JUNK_BYTES = 4096  # looked through in one step

UNKNOWN = "not a picture in a known format"
EMPTY = "empty file"

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type; a palette holds RGB
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}

# SOF0 to SOF15: C4, C8 and CC between them are tables, an extension and arithmetic conditioning.
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_BASELINE = 0xC0
JPEG_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
JPEG_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
JPEG_END, JPEG_SCAN, JPEG_METADATA = 0xD9, 0xDA, 0xE1

TIFF_TAGS = {256: 0, 257: 0, 258: 1, 277: 1}  # width, height, bits, samples and their defaults
TIFF_ENTRY = {b"II": "<HHII", b"MM": ">HHII"}  # tag, type, count, value or its place

_u16 = struct.Struct(">H").unpack_from
_jpeg_frame = struct.Struct(">HBHHB").unpack_from
_png_header = struct.Struct(">I4sIIBBBBB").unpack_from
_webp_chunk = struct.Struct("<4sI4s4s").unpack_from
_gif_screen = struct.Struct("<HHB").unpack_from
_gif_frame = struct.Struct("<HHHH").unpack_from


class BadHeaderError(ValueError):
    """Bytes whose size cannot be known; the message is the reason."""


class PictureHeader(NamedTuple):
    """What a picture says of itself, before EXIF rotation. Nothing in it has been proven."""

    format: str
    """``jpeg``, ``png``, ``webp``, ``gif``, ``bmp`` or ``tiff``."""
    width: int
    """Pixels, at least 1."""
    height: int
    """Likewise."""
    channels: int
    """As stored: 1 grey, 2 grey and alpha, 3 colour (also as a palette), 4 CMYK or with alpha."""
    bits: int
    """Of one channel of one pixel."""
    progressive: bool
    """A progressive JPEG or an interlaced PNG."""
    baseline: bool = False
    """A JPEG that the simplest decoders take: Huffman codes, sequential, 8 bits (SOF0)."""


def read_header(data: Buffer) -> PictureHeader:
    """What the first bytes of ``data`` say; looks at no more of it than it must.

    Args:
        data: the file's bytes; a view of them is not copied.

    Raises:
        BadHeaderError: if they are no picture of a known format, or are cut off, or contradict the
            format, or give a side of 0 pixels.
    """
    view = memoryview(data)  # type: ignore[arg-type]  # an array is a buffer, its stubs forget it
    parse = _PARSERS.get(bytes(view[:2]))
    if parse is None:
        raise BadHeaderError(UNKNOWN if view else EMPTY)
    try:
        header = parse(view)
    except (struct.error, IndexError):
        raise BadHeaderError("cut off in its header") from None
    if header.width < 1 or header.height < 1:
        raise BadHeaderError(f"its header says {header.width}x{header.height} pixels")
    return header


def _jpeg(view: memoryview) -> PictureHeader:
    if view[2] != 0xFF:
        raise BadHeaderError(UNKNOWN)
    place = 2
    for _ in range(STEP_LIMIT):
        if view[place] != 0xFF:  # bytes between segments: decoders skip them with a warning
            junk = bytes(view[place : place + JUNK_BYTES]).find(b"\xff")
            place += junk if junk >= 0 else JUNK_BYTES
            continue
        marker = view[place + 1]
        if marker in JPEG_FRAMES:
            length, bits, height, width, channels = _jpeg_frame(view, place + 2)
            if length != 8 + 3 * channels or channels not in (1, 3, 4):
                raise BadHeaderError(f"JPEG with a damaged frame header ({channels} channels)")
            progressive, baseline = marker in JPEG_PROGRESSIVE, marker == JPEG_BASELINE
            return PictureHeader("jpeg", width, height, channels, bits, progressive, baseline)
        if marker in (JPEG_SCAN, JPEG_END):
            raise BadHeaderError("JPEG without a frame header")
        if marker == 0xFF:  # padding in front of a marker
            place += 1
        elif marker == 0 or marker in JPEG_STANDALONE:
            place += 2
        else:
            (length,) = _u16(view, place + 2)
            if length < 2:
                raise BadHeaderError(f"JPEG with a segment of {length} bytes")
            place += 2 + length
    raise BadHeaderError(f"JPEG without a frame header in its first {STEP_LIMIT} segments")


def may_be_rotated(data: Buffer) -> bool:
    """Whether a JPEG has metadata (EXIF, XMP) in front of its scan that could ask for a rotation.

    Two microseconds for a no, which is true of most; a yes needs a look at the metadata.
    """
    view = memoryview(data)  # type: ignore[arg-type]
    place = 2
    try:
        for _ in range(STEP_LIMIT):
            if view[place] != 0xFF or view[place + 1] in (JPEG_METADATA, 0, 0xFF):
                break
            if view[place + 1] == JPEG_SCAN:
                return False
            place += 2 + _u16(view, place + 2)[0]
    except (struct.error, IndexError):
        pass
    return True


def _png(view: memoryview) -> PictureHeader:
    if bytes(view[:8]) != PNG_SIGNATURE:
        raise BadHeaderError(UNKNOWN)
    length, kind, width, height, bits, colour, *_, interlaced = _png_header(view, 8)
    if (length, kind) != (13, b"IHDR") or bits not in PNG_DEPTHS.get(colour, ()):
        raise BadHeaderError("PNG with a damaged header")
    return PictureHeader("png", width, height, PNG_CHANNELS[colour], bits, interlaced == 1)


def _webp(view: memoryview) -> PictureHeader:
    riff, _, webp, chunk = _webp_chunk(view)
    if (riff, webp) != (b"RIFF", b"WEBP"):
        raise BadHeaderError(UNKNOWN)
    body = bytes(view[20:30])
    if chunk == b"VP8X":
        width = 1 + int.from_bytes(body[4:7], "little")
        height = 1 + int.from_bytes(body[7:10], "little")
        if len(body) < 10:
            raise IndexError
        return PictureHeader("webp", width, height, 4 if body[0] & 0x10 else 3, 8, False)
    if chunk == b"VP8L":
        if body[0] != 0x2F:
            raise BadHeaderError("WebP with a damaged header")
        (packed,) = struct.unpack_from("<I", body, 1)
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
        return PictureHeader("webp", width, height, 4 if packed >> 28 & 1 else 3, 8, False)
    if chunk != b"VP8 " or body[0] & 1 or body[3:6] != b"\x9d\x01\x2a":  # bit 0: no key frame
        raise BadHeaderError("WebP with a damaged header")
    width, height = struct.unpack_from("<HH", body, 6)  # two bits of each are for scaling
    return PictureHeader("webp", width & 0x3FFF, height & 0x3FFF, 3, 8, False)


def _gif(view: memoryview) -> PictureHeader:
    if bytes(view[:6]) not in (b"GIF87a", b"GIF89a"):
        raise BadHeaderError(UNKNOWN)
    width, height, flags = _gif_screen(view, 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False
    for _ in range(STEP_LIMIT):
        byte = view[place]
        if in_extension:  # blocks of up to 255 bytes, the last one empty
            place += 1 + byte
            in_extension = byte > 0
        elif byte == 0x21:
            place += 2
            in_extension = True
        elif byte == 0x2C:  # the first frame, which may reach past the screen
            left, top, frame_width, frame_height = _gif_frame(view, place + 1)
            right, bottom = left + frame_width, top + frame_height
            return PictureHeader("gif", max(width, right), max(height, bottom), 3, 8, False)
        elif byte == 0x3B:
            break
        else:
            place += 1
    raise BadHeaderError("GIF without a frame")


def _bmp(view: memoryview) -> PictureHeader:
    (header_bytes,) = struct.unpack_from("<I", view, 14)
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", view, 18)
    elif 16 <= header_bytes <= 124:
        width, height, _, bits = struct.unpack_from("<iiHH", view, 18)
    else:
        raise BadHeaderError(UNKNOWN)
    channels = 4 if bits == 32 else 3
    if bits not in (1, 2, 4, 8, 16, 24, 32):
        raise BadHeaderError(f"BMP with {bits} bits per pixel")
    # A negative height: the first row is the upper one.
    return PictureHeader("bmp", width, abs(height), channels, min(bits, 8), False)


def _tiff(view: memoryview) -> PictureHeader:
    order = TIFF_ENTRY[bytes(view[:2])]
    version, place = struct.unpack_from(order[0] + "HI", view, 2)
    if version != 42:  # 43: more than 4 GB
        raise BadHeaderError(UNKNOWN)
    (count,) = struct.unpack_from(order[0] + "H", view, place)
    found: dict[int, int] = {}
    for entry in range(place + 2, place + 2 + 12 * min(count, STEP_LIMIT), 12):
        tag, kind, values, value = struct.unpack_from(order, view, entry)
        if tag not in TIFF_TAGS or tag in found:  # libtiff, too, takes the first of a tag
            continue
        if kind == 3:  # of 16 bits: two fit in the entry, more lie elsewhere
            at = entry + 8 if values <= 2 else value
            (value,) = struct.unpack_from(order[0] + "H", view, at)
        if kind in (3, 4):
            found[tag] = value
    width, height, bits, channels = (found.get(tag, TIFF_TAGS[tag]) for tag in TIFF_TAGS)
    return PictureHeader("tiff", width, height, channels, bits, False)


_PARSERS: dict[bytes, Callable[[memoryview], PictureHeader]] = {
    b"\xff\xd8": _jpeg,
    b"\x89P": _png,
    b"RI": _webp,
    b"GI": _gif,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
}
