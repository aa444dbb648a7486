import io

import numpy as np
import pytest
from PIL import Image

from pipeline.transcode import STRIP_PIXELS, as_8_bit, transcode


def plain(image, bits=16):
    return as_8_bit(image, bits)[0]


def floats(*values):
    return Image.fromarray(np.array([values], dtype=np.float32))


def test_half_transparent_pixels_are_mixed_with_white():
    pixel = plain(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert pixel == pytest.approx((127, 127, 127), abs=1)


def test_black_and_white_becomes_grey():
    assert plain(Image.new("1", (2, 2), 1)).mode == "L"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 0.5, 1.0), [0, 128, 255]),
        ((0.0, 17.0, 226.0), [0, 17, 226]),
        ((0.0, 32_768.0, 65_535.0), [0, 128, 255]),
    ],
)
def test_floats_are_taken_for_the_smallest_usual_range_that_holds_them(values, expected):
    image, note = as_8_bit(floats(*values))
    assert np.asarray(image).tolist() == [expected] and note == []


def test_values_of_no_usual_range_are_stretched_with_a_note():
    image, note = as_8_bit(floats(-1.0, 0.0, 3.0))
    assert np.asarray(image).tolist() == [[0, 64, 255]]
    assert note == ["values from -1 to 3, stretched"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_an_error(value):
    with pytest.raises(ValueError, match="no numbers"):
        as_8_bit(floats(0.0, value))


@pytest.mark.parametrize(("bits", "white"), [(12, 4095), (16, 65_535), (10, 1023)])
def test_white_is_the_largest_value_of_the_bits(bits, white):
    image = Image.fromarray(np.array([[0, white // 2, white]], dtype=np.uint16))
    assert np.asarray(plain(image, bits)).tolist() == [[0, 127, 255]]


def test_a_transparent_grey_of_16_bits_shows_white():
    image = Image.fromarray(np.array([[0, 4660, 65_535]], dtype=np.uint16))
    image.info["transparency"] = 4660
    assert np.asarray(plain(image)).tolist() == [[0, 255, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "I;16", "LA"])
def test_strips_give_what_the_whole_picture_would(draw_photo, mode, monkeypatch):
    image = draw_photo(3, 70, 50)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    whole = np.asarray(plain(image))
    assert STRIP_PIXELS > 70 * 50
    monkeypatch.setattr("pipeline.transcode.STRIP_PIXELS", 500)
    assert (np.asarray(plain(image)) == whole).all()


def test_the_jpeg_is_baseline_with_full_colour_resolution_and_no_metadata(draw_photo):
    image = draw_photo(1)
    image.getexif()[0x010E] = "a description"
    image.info["icc_profile"] = b"a profile"
    data, size, notes = transcode(image, 8, image.size, 95)
    stored = Image.open(io.BytesIO(data))
    assert (stored.size, notes) == (size, []) and not stored.info.get("progressive")
    assert [layer[1:3] for layer in stored.layer] == [(1, 1)] * 3
    assert not stored.getexif() and "icc_profile" not in stored.info
