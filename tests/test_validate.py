import io
import re
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.program import InputError
from pipeline.validate import Limits, RefusedError, StoredForm, accept_picture

LIMITS = Limits()
FINE = {"quality": 95, "subsampling": "4:4:4"}  # loses a few levels of noise


def reopened(accepted):
    image = Image.open(io.BytesIO(accepted.picture))
    image.load()
    return image


def levels_apart(one, other):
    """Mean absolute difference of two pictures of one size and mode."""
    return np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()


def accept(data, limits=LIMITS, **form):
    return accept_picture(data, limits, StoredForm(**form))


def reason_of(data, limits=LIMITS):
    with pytest.raises(RefusedError) as refused:
        accept(data, limits)
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
    accepted = accept(data)
    assert accepted.picture is data
    assert (accepted.width, accepted.height, accepted.change) == (80, 60, "")


def test_a_baseline_jpeg_is_kept_without_pillow(scene, encode, monkeypatch):
    data = encode(scene)
    monkeypatch.setattr(Image, "open", pytest.fail)
    assert accept(data).picture is data


def test_a_jpeg_in_which_libjpeg_sees_another_size_is_transcoded(scene, encode, monkeypatch):
    data = encode(scene, **FINE)
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda _: (61, 80, "YCbCr", "444"))
    assert accept(data).change == "was damaged: 80x61 pixels, by another header"


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_other_formats_become_baseline_jpegs(scene, encode, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    accepted = accept(encode(scene, file_format, **options))
    image = reopened(accepted)
    assert (image.format, image.size, accepted.change) == ("JPEG", (80, 60), f"was {file_format}")
    assert not image.info.get("progressive")
    assert levels_apart(image, scene) < (12 if file_format == "GIF" else 3)  # 256 colours


def test_a_transcoded_picture_has_full_colour_resolution(scene, encode):
    image = reopened(accept(encode(scene, "PNG")))
    assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_a_progressive_jpeg_becomes_baseline(scene, encode):
    accepted = accept(encode(scene, progressive=True, **FINE))
    assert accepted.change == "was progressive"
    assert not reopened(accepted).info.get("progressive")
    assert levels_apart(reopened(accepted), scene) < 6


def test_a_cmyk_jpeg_becomes_rgb(scene, encode):
    accepted = accept(encode(scene.convert("CMYK"), quality=95))
    assert (accepted.change, reopened(accepted).mode) == ("was CMYK", "RGB")
    assert levels_apart(reopened(accepted), scene) < 6


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotation_in_exif_is_applied_and_taken_out(scene, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    accepted = accept(encode(scene, exif=exif, **FINE))
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
    assert accept(data).picture == data


def test_transparent_pixels_show_white(encode):
    half = np.zeros((32, 32, 4), np.uint8)
    half[:, 16:] = (200, 0, 0, 255)
    image = reopened(accept(encode(Image.fromarray(half), "PNG")))
    assert image.mode == "RGB"
    assert min(image.getpixel((4, 16))) > 250 and image.getpixel((28, 16))[0] > 190
    assert max(image.getpixel((28, 16))[1:]) < 10


def test_a_transparent_palette_colour_shows_white(encode):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    accepted = accept(encode(image, "PNG", transparency=1))
    assert min(reopened(accepted).getpixel((4, 4))) > 250


def test_16_bits_are_scaled_to_8(encode):
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16)[None].repeat(16, axis=0)
    image = reopened(accept(encode(Image.fromarray(ramp), "PNG")))
    assert image.mode == "L"
    assert levels_apart(image, np.arange(256)[None].repeat(16, axis=0)) < 1


def test_of_an_animation_the_first_frame_is_taken(encode):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert reopened(accept(data)).getpixel((8, 8))[0] > 240


def test_the_same_file_gives_the_same_bytes(scene, encode):
    data = encode(scene, "PNG")
    assert accept(data) == accept(data)


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
        (lying_png(12_000, 11_000), "too many pixels: 12000x11000, the limit is 128000000 in all"),
        (lying_png(70_000, 10), "too long: 70000x10 pixels, the limit is 65500 a side"),
    ],
    ids=["empty", "lfs pointer", "web page", "program", "bomb", "too long"],
)
def test_what_is_no_picture_is_refused_with_its_reason(data, reason):
    assert re.match(reason, reason_of(data))


def test_a_bomb_is_refused_before_anything_is_decoded():
    # The same header with an allowed size fails later, in its data.
    assert "60000x60000" in reason_of(lying_png(60_000, 60_000))
    assert "pixels" not in reason_of(lying_png(60, 60))


def test_the_limit_can_be_raised_above_pillows_own():
    assert "pixels" not in reason_of(lying_png(60_000, 3_000), Limits(max_pixels=200_000_000))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_pixels": 4799}, "too many pixels: 80x60, the limit is 4799 in all"),
        ({"max_bytes": 100}, r"too many bytes: \d+, the limit is 100"),
        ({"min_side_px": 61}, "too small: 80x60 pixels, the limit is 61 a side"),
        ({"max_side_px": 79}, "too long: 80x60 pixels, the limit is 79 a side"),
        ({"max_aspect": 1.3}, "too elongated: 80x60, the limit is 1.3 to 1"),
    ],
)
def test_limits_refuse_with_the_size_and_the_limit(scene, encode, limits, reason):
    assert re.fullmatch(reason, reason_of(encode(scene), Limits(**limits)))


def test_limits_let_pass_what_reaches_them(scene, encode):
    limits = Limits(max_pixels=4800, min_side_px=60, max_side_px=80, max_aspect=4 / 3)
    assert accept(encode(scene), limits).width == 80


def test_a_picture_inside_a_picture_is_under_the_limit_too(encode):
    inner = encode(Image.new("RGB", (300, 300)), "PNG")
    directory = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)  # says 16 x 16
    icon = struct.pack("<HHH", 0, 1, 1) + directory + inner
    assert accept(icon).change == "was ICO"
    assert reason_of(icon, Limits(max_pixels=80_000)).startswith("too many pixels: ")


def test_the_quality_of_transcoding_can_be_chosen(scene, encode):
    data = encode(scene, "PNG")
    sizes = [len(accept(data, quality=q).picture) for q in (50, 95)]
    assert sizes[0] < sizes[1] / 2


def test_a_jpeg_whose_scan_is_damaged_is_transcoded_and_says_so(scene, encode):
    data = bytearray(encode(scene, quality=95))
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    accepted = accept(bytes(data))
    assert re.match("was damaged: Corrupt JPEG data", accepted.change)
    # Pillow decodes both, and to the same picture within what the quality loses.
    assert levels_apart(reopened(accepted), Image.open(io.BytesIO(data))) < 6
    assert accept(accepted.picture).change == ""


def test_without_validation_only_the_header_is_looked_at(scene, encode):
    data = encode(scene)
    cut = data[: len(data) // 2]
    assert accept(cut, validate=False).picture == cut and reason_of(cut)
    assert accept(encode(scene, "PNG"), validate=False).change == "was PNG"
    assert accept(encode(scene, progressive=True), validate=False).change == "was progressive"
    assert "truncated" in _reason_without_validation(encode(scene, "PNG")[:3000])


def _reason_without_validation(data):
    with pytest.raises(RefusedError) as refused:
        accept(data, validate=False)
    return str(refused.value)


def test_a_jpeg_in_rgb_is_transcoded_because_some_decoders_take_it_for_ycbcr(scene, encode):
    accepted = accept(encode(scene, keep_rgb=True, **FINE))
    assert accepted.change == "was RGB in its JPEG"
    assert levels_apart(reopened(accepted), scene) < 6


def test_a_jpeg_of_too_many_scans_is_refused_undecoded(scene, encode):
    data = encode(scene, progressive=True)
    assert reason_of(data + b"\xff\xda" * 100).startswith("too many scans: 1")


@pytest.mark.parametrize(
    ("size", "stored"), [((400, 200), (100, 50)), ((200, 400), (50, 100)), ((60, 50), (60, 50))]
)
def test_larger_pictures_are_resized_to_the_shorter_side(draw_photo, encode, size, stored):
    data = encode(draw_photo(2, *size), **FINE)
    accepted = accept(data, resize=50)
    assert (accepted.width, accepted.height) == reopened(accepted).size == stored
    words = f"resized: {size[0]}x{size[1]} to {stored[0]}x{stored[1]}"
    assert accepted.change == ("" if size == stored else words)
    assert (accepted.picture == data) == (size == stored)
    whole = Image.open(io.BytesIO(data)).resize(stored, Image.Resampling.LANCZOS)
    assert levels_apart(reopened(accepted), whole) < 4  # the decoder's own halving is as good


def test_a_picture_can_be_turned_and_resized_at_once(scene, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    accepted = accept(encode(scene, exif=exif), resize=30)
    assert accepted.change == "was rotated by EXIF; resized: 80x60 to 40x30"
    assert (accepted.width, accepted.height) == reopened(accepted).size == (30, 40)


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (Limits, {"max_pixels": 0}, "--max-pixels 0: give a number of at least 1"),
        (Limits, {"max_side_px": 70_000}, "--max-side-px 70000: a JPEG has at most 65500"),
        (Limits, {"max_aspect": 0.5}, "--max-aspect 0.5: give 0 or"),
        (StoredForm, {"quality": 0}, "--quality 0: give a number from 1 to 100"),
        (StoredForm, {"quality": 101}, "--quality 101: give a number from 1 to 100"),
        (StoredForm, {"resize": -1}, "--resize -1: give a number of at least 0"),
    ],
)
def test_a_setting_out_of_range_is_an_input_error(kind, setting, message):
    with pytest.raises(InputError, match=message):
        kind(**setting)


def test_a_setting_at_the_end_of_its_range_is_taken():
    for quality in (1, 100):
        assert StoredForm(quality=quality).quality == quality
    assert Limits(max_side_px=65_500, max_aspect=1.0).max_aspect == 1
