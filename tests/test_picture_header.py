import io
import struct
import tarfile
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.picture_header import BadHeaderError, may_be_rotated, read_header

KINDS = [
    ("JPEG", "RGB", {}, ("jpeg", 3, 8, False)),
    ("JPEG", "L", {}, ("jpeg", 1, 8, False)),
    ("JPEG", "CMYK", {"progressive": True}, ("jpeg", 4, 8, True)),
    ("PNG", "RGB", {}, ("png", 3, 8, False)),
    ("PNG", "LA", {}, ("png", 2, 8, False)),
    ("PNG", "P", {}, ("png", 3, 8, False)),
    ("PNG", "1", {}, ("png", 1, 1, False)),
    ("PNG", "I;16", {}, ("png", 1, 16, False)),
    ("WEBP", "RGB", {"quality": 70}, ("webp", 3, 8, False)),
    ("WEBP", "RGBA", {"lossless": True}, ("webp", 4, 8, False)),
    ("WEBP", "RGBA", {"quality": 70}, ("webp", 4, 8, False)),
    ("GIF", "P", {}, ("gif", 3, 8, False)),
    ("BMP", "RGB", {}, ("bmp", 3, 8, False)),
    ("BMP", "RGBA", {}, ("bmp", 4, 8, False)),
    ("TIFF", "RGB", {}, ("tiff", 3, 8, False)),
    ("TIFF", "L", {"big_endian": True}, ("tiff", 1, 8, False)),
    ("TIFF", "I;16", {}, ("tiff", 1, 16, False)),
]


def example(kind):
    """A picture of 291 x 83 pixels."""
    file_format, mode, options, _ = kind
    ramp = Image.linear_gradient("L").resize((291, 83))
    image = ramp.convert("RGB").convert(mode) if mode != "I;16" else None
    if image is None:
        image = Image.fromarray(np.asarray(ramp, dtype=np.uint16) * 256)
    elif "A" in mode:
        image.putalpha(ramp)  # one that WebP does not leave out
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


EXAMPLES = {str(kind): example(kind) for kind in KINDS}


def reason_of(data):
    with pytest.raises(BadHeaderError) as bad:
        read_header(data)
    return str(bad.value)


def jpeg_frame(width=291, height=83, marker=0xC0):
    return bytes([0xFF, marker]) + struct.pack(">HBHHB9x", 17, 8, height, width, 3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_header_says_what_the_picture_is(kind):
    found = read_header(EXAMPLES[str(kind)])
    assert (found.width, found.height) == (291, 83)
    assert (found.format, *found[3:6]) == kind[3]


@pytest.mark.parametrize("as_buffer", [bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_buffer_will_do(kind, as_buffer):
    data = EXAMPLES[str(kind)]
    assert read_header(as_buffer(data)) == read_header(data)


def test_a_view_of_a_picture_is_not_copied():
    data = np.zeros(50_000_000, np.uint8)
    picture = np.frombuffer(EXAMPLES[str(KINDS[0])], np.uint8)
    data[: len(picture)] = picture
    tracemalloc.start()
    read_header(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000


@pytest.mark.parametrize("pack", ["messy.tar", "imagenet_samples.tar", "voc_mini.tar"])
def test_every_real_picture_has_the_size_that_pillow_finds(test_data, pack, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    seen = []
    with tarfile.open(test_data / pack) as tar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata
        for member in tar:
            data = tar.extractfile(member).read() if member.isfile() else b""
            try:
                size = Image.open(io.BytesIO(data), formats=formats).size
            except Exception:  # a dozen kinds, for no picture or a broken one
                continue
            if max(size) < 2**31:  # one BMP has a width of -127 pixels, for Pillow 4294967169
                seen.append((member.name, read_header(data)[1:3] == size))
    assert len(seen) > 100 and [name for name, same in seen if not same] == []


@given(st.binary(max_size=200), st.sampled_from([b"", *{data[:12] for data in EXAMPLES.values()}]))
def test_any_bytes_are_a_header_or_a_bad_one(data, start):
    check(start + data)


@given(st.sampled_from(list(EXAMPLES.values())), st.data())
def test_a_damaged_picture_has_a_header_or_a_bad_one(picture, data):
    damaged = bytearray(picture)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(700, len(picture)) - 1))] = data.draw(
            st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xC0, 0xD8, 0xFF])
        )
    check(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


def check(data):
    """Either sides of at least a pixel or the one exception; anything else fails the test."""
    try:
        found = read_header(data)
    except BadHeaderError as error:
        assert str(error)
    else:
        assert min(found.width, found.height, found.channels + 1) >= 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_header_that_is_cut_off_is_bad_until_it_is_whole(kind):
    data = EXAMPLES[str(kind)]
    whole = [n for n in range(len(data) + 1) if not is_bad(data[:n])]
    assert whole == list(range(whole[0], len(data) + 1)) and whole[0] >= 10
    assert all(read_header(data[:n]) == read_header(data) for n in whole)


def is_bad(data):
    try:
        read_header(data)
    except BadHeaderError:
        return True
    return False


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not a picture in a known format"),
        (b"BMW 3 series, a text about cars", "not a picture in a known format"),
        (b"\xff\xd8", "cut off in its header"),
        (b"\xff\xd8\xff\xd9", "JPEG without a frame header"),
        (b"\xff\xd8\xff\xe0\0\1" + bytes(99), "JPEG with a segment of 1 bytes"),
        (b"\xff\xd8" + jpeg_frame(0, 0), "its header says 0x0 pixels"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\0\x01\0\x01\x02" + bytes(9), r"JPEG with a damaged frame"),
        (EXAMPLES[str(KINDS[3])].replace(b"IHDR", b"IDAT"), "PNG with a damaged header"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(14), "WebP with a damaged header"),
        (b"GIF89a\1\0\1\0\0\0\0;", "GIF without a frame"),
        (b"II*\0\x08\0\0\0\0\0", "its header says 0x0 pixels"),
    ],
)
def test_a_bad_header_has_a_reason(data, reason):
    assert reason_of(data).startswith(reason)


def test_a_jpeg_may_have_junk_and_padding_between_its_segments():
    assert read_header(b"\xff\xd8\xff" + b"\xff" * 30 + jpeg_frame()[1:]).width == 291
    junk = bytes(5000) + b"\xff\0" + b"\xff\xd0" + bytes(7)
    segment = b"\xff\xe1\0\4\xff\xc0"  # whose content looks like a frame
    assert read_header(b"\xff\xd8" + b"\xff\xfe\0\2" + junk + segment + jpeg_frame()).width == 291


@pytest.mark.parametrize(
    "picture",
    [
        b"\xff\xd8" + b"\xff" * 30_000_000,
        b"\xff\xd8\xff\xe0\0\2" + b"\xff\xe0\0\2" * 8_000_000,
        b"\xff\xd8\xff" + b"\xff\xd0" * 15_000_000,
        b"\xff\xd8\xff\xe0\0\2" + bytes(30_000_000),
        b"GIF89a\1\0\1\0\0\0\0" + b"!\xf9\0" * 10_000_000,
        b"GIF89a\1\0\1\0\0\0\0!\xf9" + b"\1x" * 15_000_000,
        b"MM\0*\0\0\0\x08\xff\xff" + bytes(1_000_000),
    ],
    ids=["padding", "segments", "markers", "junk", "extensions", "blocks", "entries"],
)
def test_bytes_made_to_keep_a_parser_busy_are_given_up_soon(picture):
    started = time.process_time()
    assert is_bad(picture)
    assert time.process_time() - started < 0.5


def test_a_gif_frame_may_reach_past_the_screen():
    data = (
        b"GIF89a" + struct.pack("<HHBBB", 10, 20, 0, 0, 0) + b"," + struct.pack("<4H", 3, 1, 9, 9)
    )
    assert read_header(data)[1:3] == (12, 20)


@pytest.mark.parametrize("size", [(16_383, 1), (1, 16_381), (10_007, 2)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_long_side_is_read_in_full(encode, file_format, size):
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert read_header(encode(Image.new("RGB", size), file_format, **options))[1:3] == size


def test_only_jpegs_of_the_simplest_process_are_called_baseline(draw_photo, encode):
    data = encode(draw_photo(1))
    frame = data.index(b"\xff\xc0")
    others = [data[: frame + 1] + bytes([marker]) + data[frame + 2 :] for marker in (0xC1, 0xC9)]
    progressive = encode(draw_photo(1), progressive=True)
    headers = [read_header(picture) for picture in (data, *others, progressive)]
    assert [header.baseline for header in headers] == [True, False, False, False]
    assert not read_header(encode(draw_photo(1), "PNG")).baseline


def test_a_jpeg_with_metadata_may_be_rotated(draw_photo, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    profile = b"p" * 200_000  # three segments in front of the metadata
    plain = encode(draw_photo(1), icc_profile=profile)
    assert not may_be_rotated(plain)
    assert may_be_rotated(encode(draw_photo(1), icc_profile=profile, exif=exif))
    assert may_be_rotated(encode(draw_photo(1), xmp=xmp))
    # What cannot be followed to the scan is looked at more closely.
    assert all(may_be_rotated(plain[:end]) for end in (3, 20, 1000))
    assert may_be_rotated(plain[:2] + b"junk" + plain[2:])
