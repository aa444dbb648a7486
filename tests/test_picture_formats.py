"""Foreign shards hold more than baseline JPEGs: both engines decode them, to the same pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.torch_views import decode

dali_views = pytest.importorskip("pipeline.dali_views", reason="DALI has wheels for Linux only")
CPU = torch.device("cpu")
GREY_16 = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 56), dtype=np.uint16))


def with_alpha(image):
    pixels = np.array(image.convert("RGBA"))
    pixels[..., 3] = np.linspace(0, 255, pixels.shape[1])
    return Image.fromarray(pixels)


# Name: what is done to a photo before it is saved, the format, its options.
CASES = {
    "jpeg": (None, "JPEG", {}),
    "jpeg grey": (lambda p: p.convert("L"), "JPEG", {}),
    "jpeg progressive": (None, "JPEG", {"progressive": True}),
    "jpeg cmyk": (lambda p: p.convert("CMYK"), "JPEG", {}),
    "png": (None, "PNG", {}),
    "png grey": (lambda p: p.convert("L"), "PNG", {}),
    "png alpha": (with_alpha, "PNG", {}),
    "png grey alpha": (lambda p: with_alpha(p).convert("LA"), "PNG", {}),
    "png palette": (lambda p: p.quantize(64), "PNG", {}),
    "png 1 bit": (lambda p: p.convert("1"), "PNG", {}),
    "png 16 bit": (lambda _: GREY_16, "PNG", {}),
    "webp": (None, "WEBP", {}),
    "webp lossless": (None, "WEBP", {"lossless": True}),
    "webp alpha": (with_alpha, "WEBP", {"lossless": True}),
    "bmp": (None, "BMP", {}),
    "tiff": (None, "TIFF", {}),
    "tiff 16 bit": (lambda _: GREY_16, "TIFF", {}),
}


def decoded_by_dali(picture):
    inputs = [[picture]]
    pipeline = dali_views.decode_graph(
        source=lambda: inputs, device="cpu", **dali_views.pipeline_arguments(1, 1, CPU, prefetch=1)
    )
    pipeline.build()
    return np.array(pipeline.run()[0].as_tensor())[0]


@pytest.mark.parametrize("rotated", [False, True], ids=["", "with an EXIF rotation"])
@pytest.mark.parametrize("case", CASES)
def test_both_engines_decode_a_format_to_the_same_pixels(draw_photo, encode, case, rotated):
    change, file_format, options = CASES[case]
    image = change(draw_photo(1, 56, 40)) if change else draw_photo(1, 56, 40)
    if rotated:
        if file_format in ("BMP", "TIFF"):
            pytest.skip("BMP has no EXIF; Pillow turns TIFFs itself")
        if case == "webp lossless":
            pytest.skip("DALI 2.4 does not decode it, so it counts as a bad sample")
        exif = Image.Exif()
        exif[0x112] = 6
        options = options | {"exif": exif.tobytes()}
    picture = np.frombuffer(encode(image, file_format, **options), np.uint8)
    plain = np.asarray(decode(picture))
    assert plain.shape == (40, 56, 3)
    assert np.array_equal(decoded_by_dali(picture), plain)


def test_sixteen_bits_are_scaled_and_not_cut(encode):
    picture = np.frombuffer(encode(GREY_16, "PNG"), np.uint8)
    expected = np.rint(np.asarray(GREY_16) / 257)
    assert np.array_equal(np.asarray(decode(picture))[..., 0], expected)


def test_a_gif_is_what_dali_does_not_decode(draw_photo, encode):
    picture = np.frombuffer(encode(draw_photo(1), "GIF"), np.uint8)
    assert "a format that DALI does not decode" in dali_views.undecodable([picture], CPU)[0]
    assert Image.open(io.BytesIO(picture.tobytes())).format == "GIF"
