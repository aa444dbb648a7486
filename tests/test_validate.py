import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.validate import Limits, RefusedError, accept_picture, as_rgb

LIMITS = Limits()
FINE = {"quality": 95, "subsampling": "4:4:4"}  # loses a few levels of noise


def reopened(accepted):
    image = Image.open(io.BytesIO(accepted.picture))
    image.load()
    return image


def levels_apart(one, other):
    """Mean absolute difference of two pictures of one size and mode."""
    return np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()


def reason_of(data, limits=LIMITS):
    with pytest.raises(RefusedError) as refused:
        accept_picture(data, limits)
    return str(refused.value)


def lying_png(width, height):
    """A PNG whose header claims a size and that has next to no data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDAT1234"


@pytest.fixture
def scene(draw_photo):
    return draw_photo(1, 80, 60)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_baseline_jpeg_keeps_its_bytes(scene, encode, mode):
    data = encode(scene.convert(mode))
    accepted = accept_picture(data, LIMITS)
    assert accepted.picture is data
    assert (accepted.width, accepted.height, accepted.change) == (80, 60, "")


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_other_formats_become_baseline_jpegs(scene, encode, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    accepted = accept_picture(encode(scene, file_format, **options), LIMITS)
    image = reopened(accepted)
    assert (image.format, image.size, accepted.change) == ("JPEG", (80, 60), f"was {file_format}")
    assert not image.info.get("progressive")
    assert levels_apart(image, scene) < (12 if file_format == "GIF" else 3)  # 256 colours


def test_a_transcoded_picture_has_full_colour_resolution(scene, encode):
    image = reopened(accept_picture(encode(scene, "PNG"), LIMITS))
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_a_progressive_jpeg_becomes_baseline(scene, encode):
    accepted = accept_picture(encode(scene, progressive=True, **FINE), LIMITS)
    assert accepted.change == "was progressive"
    assert not reopened(accepted).info.get("progressive")
    assert levels_apart(reopened(accepted), scene) < 6


def test_a_cmyk_jpeg_becomes_rgb(scene, encode):
    accepted = accept_picture(encode(scene.convert("CMYK"), quality=95), LIMITS)
    assert (accepted.change, reopened(accepted).mode) == ("was CMYK", "RGB")
    assert levels_apart(reopened(accepted), scene) < 6


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotation_in_exif_is_applied_and_taken_out(scene, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    accepted = accept_picture(encode(scene, exif=exif, **FINE), LIMITS)
    image = reopened(accepted)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose that EXIF asks for
    upright = scene.transpose(Image.Transpose(undo[orientation]))
    assert accepted.change == "was rotated by EXIF" and image.getexif().get(0x0112) is None
    assert (accepted.width, accepted.height) == image.size == upright.size
    assert levels_apart(image, upright) < 6


def test_a_picture_that_exif_calls_upright_keeps_its_bytes(scene, encode):
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encode(scene, exif=exif)
    assert accept_picture(data, LIMITS).picture == data


def test_transparent_pixels_show_white(encode):
    half = np.zeros((32, 32, 4), np.uint8)
    half[:, 16:] = (200, 0, 0, 255)
    image = reopened(accept_picture(encode(Image.fromarray(half), "PNG"), LIMITS))
    assert image.mode == "RGB"
    assert min(image.getpixel((4, 16))) > 250 and image.getpixel((28, 16))[0] > 190
    assert max(image.getpixel((28, 16))[1:]) < 10


def test_half_transparent_pixels_are_mixed_with_white():
    pixel = as_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert pixel == pytest.approx((127, 127, 127), abs=1)


def test_a_transparent_palette_colour_shows_white(encode):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    accepted = accept_picture(encode(image, "PNG", transparency=1), LIMITS)
    assert min(reopened(accepted).getpixel((4, 4))) > 250


def test_16_bits_are_scaled_to_8(encode):
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16)[None].repeat(16, axis=0)
    image = reopened(accept_picture(encode(Image.fromarray(ramp), "PNG"), LIMITS))
    assert image.mode == "L"
    assert levels_apart(image, np.arange(256)[None].repeat(16, axis=0)) < 1


def test_floats_are_scaled_to_their_largest_value():
    values = Image.fromarray(np.array([[-1.0, 0.0, 2.0, 4.0]], dtype=np.float32))
    assert np.asarray(as_rgb(values)).tolist() == [[0, 0, 127, 255]]


def test_black_and_white_becomes_grey():
    assert as_rgb(Image.new("1", (2, 2), 1)).mode == "L"


def test_of_an_animation_the_first_frame_is_taken(encode):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert reopened(accept_picture(data, LIMITS)).getpixel((8, 8))[0] > 240


def test_the_same_file_gives_the_same_bytes(scene, encode):
    data = encode(scene, "PNG")
    assert accept_picture(data, LIMITS) == accept_picture(data, LIMITS)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.99])
def test_a_truncated_picture_is_refused(scene, encode, keep):
    for data in (encode(scene), encode(scene, "PNG"), encode(scene, progressive=True)):
        assert reason_of(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a picture in a known format"),
        (b"<html>404</html>", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
        (lying_png(12_000, 11_000), "12000x11000.* the limit is 128000000"),
        (lying_png(70_000, 10), "70000x10 .* at most 65535"),
    ],
    ids=["empty", "lfs pointer", "web page", "program", "bomb", "too long"],
)
def test_what_is_no_picture_is_refused_with_its_reason(data, reason):
    assert re.match(reason, reason_of(data))


def test_a_bomb_is_refused_before_anything_is_decoded():
    # The same header with an allowed size fails later, in its data.
    assert "60000x60000 pixels" in reason_of(lying_png(60_000, 60_000))
    assert "pixels" not in reason_of(lying_png(60, 60))


def test_the_limit_can_be_raised_above_pillows_own():
    assert "pixels" not in reason_of(lying_png(60_000, 3_000), Limits(max_pixels=200_000_000))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(max_pixels=4799), r"80x60.* the limit is 4799\b"),
        (Limits(max_bytes=100), r"\d+ bytes, the limit is 100\b"),
        (Limits(min_side_px=61), r"80x60.* the limit is 61\b"),
    ],
)
def test_limits_refuse_with_the_size_and_the_limit(scene, encode, limits, reason):
    assert re.match(reason, reason_of(encode(scene), limits))


def test_limits_let_pass_what_reaches_them(scene, encode):
    assert accept_picture(encode(scene), Limits(max_pixels=4800, min_side_px=60)).width == 80


def test_the_quality_of_transcoding_can_be_chosen(scene, encode):
    data = encode(scene, "PNG")
    sizes = [len(accept_picture(data, Limits(quality=q)).picture) for q in (50, 95)]
    assert sizes[0] < sizes[1] / 2
