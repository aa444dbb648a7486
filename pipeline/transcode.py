"""From any decoded picture to a baseline JPEG: 8 bits, RGB or grey, upright, perhaps smaller.

Works through strips of rows, so that beside the decoded picture (4 bytes a pixel at most) no more
than the 8-bit result is in memory.
"""

import io

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112
# What undoes each orientation. Exif 2.3, section 4.6.4, tag 274.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP_PIXELS = 1 << 20
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def transcode(
    image: Image.Image, bits: int, size: tuple[int, int], quality: int
) -> tuple[bytes, tuple[int, int], list[str]]:
    """A baseline JPEG of a decoded picture, with full colour resolution and no metadata.

    Args:
        image: decoded.
        bits: of a channel, from the header; it tells how bright a value of 9 to 16 bits is.
        size: width and height that it shall have before it is turned upright.
        quality: of the JPEG, 1 to 100.

    Returns:
        The bytes, their width and height, and notes of what was done to values that
        fit no range.
    """
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    plain, note = as_8_bit(image, bits)
    if plain.size != size:
        plain = plain.resize(size, Image.Resampling.LANCZOS)
    if orientation in UPRIGHT:
        plain = plain.transpose(UPRIGHT[orientation])
    output = io.BytesIO()
    plain.save(output, "JPEG", quality=quality, subsampling="4:4:4")
    return output.getvalue(), plain.size, note


def as_8_bit(image: Image.Image, bits: int = 16) -> tuple[Image.Image, list[str]]:
    """8-bit RGB or grey, transparency over white; and notes where values had to be stretched."""
    transparent = "transparency" in image.info
    if image.mode in ("L", "RGB") and not transparent:
        return image, []
    deep = image.mode.startswith("I") or image.mode == "F"
    low, high, note = value_range(image, bits) if deep else (0.0, 255.0, [])
    is_grey = deep or (image.mode == "1" and not transparent)
    plain = Image.new("L" if is_grey else "RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        plain.paste(_scaled(strip, low, high) if deep else _over_white(strip), (0, top))
    return plain, note


def _over_white(strip: Image.Image) -> Image.Image:
    if strip.mode not in ALPHA_MODES and "transparency" not in strip.info:
        return strip.convert("L" if strip.mode == "1" else "RGB")
    rgba = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def value_range(image: Image.Image, bits: int) -> tuple[float, float, list[str]]:
    """Which values are black and white in a picture of more than 8 bits.

    Integers fill the range of their bits; floats are taken for 0 to 1, 0 to 255 or 0 to 65,535,
    the smallest that holds them all. What fits none is stretched from its lowest to its highest
    value, which a note says.

    Raises:
        ValueError: if a value is infinite or no number.
    """
    low, high = np.inf, -np.inf
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not np.isfinite([low, high]).all():
        raise ValueError("values that are no numbers")
    integer_top = 2.0**bits - 1 if 8 < bits <= 16 else 65_535.0
    for top_value in (1.0, 255.0, 65_535.0) if image.mode == "F" else (integer_top, 65_535.0):
        if low >= 0 and high <= top_value:
            return 0.0, top_value, []
    return low, high, [f"values from {low:g} to {high:g}, stretched"]


def _scaled(strip: Image.Image, low: float, high: float) -> Image.Image:
    values = np.asarray(strip, dtype=np.float32)
    scaled = (values - low) * (255 / max(high - low, 1e-30))
    grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    hidden = strip.info.get("transparency")
    if isinstance(hidden, int):  # one grey value is transparent
        grey[values == hidden] = 255
    return Image.fromarray(grey, "L")
