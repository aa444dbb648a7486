"""What is refused before a decoder sees it."""

import re

import pytest

from pipeline.data_config import DataConfig
from pipeline.header_check import checked_picture
from pipeline.program import InputError
from pipeline.shard_format import index_bytes, read_index
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.validate import Limits


@pytest.fixture
def one_picture(pack_set, clean_pictures, with_size, tmp_path):
    """A set of one sample of 64 x 48 pixels; ``one_picture(header=..., index=...)`` lies."""

    def make(picture=clean_pictures[0], header=(64, 48), index=(64, 48)):
        if picture is clean_pictures[0]:
            picture = with_size(picture, *header)
        folder = pack_set(tmp_path / "one", [picture], (1,))
        path = folder / "shard-000000.index"
        records = read_index(path).copy()
        records["width"], records["height"] = index
        path.write_bytes(index_bytes(records))
        return ShardStore(folder)

    return make


def reason_of(store, limits=Limits()):  # noqa: B008 (frozen)
    with pytest.raises(BadSampleError) as bad:
        checked_picture(store, 0, 0, limits)
    return str(bad.value)


def test_a_sound_picture_comes_with_its_size(one_picture, clean_pictures):
    found = checked_picture(one_picture(), 0, 0, Limits())
    assert found.picture.tobytes() == clean_pictures[0]
    assert (found.width, found.height) == (64, 48)


@pytest.mark.parametrize(
    ("header", "index"), [((64, 48), (48, 64)), ((65, 48), (64, 48)), ((64, 40), (64, 48))]
)
def test_a_header_that_differs_from_the_index_is_refused(one_picture, header, index):
    reason = reason_of(one_picture(header=header, index=index))
    assert reason == "another size: its header says {}x{} pixels, its index {}x{}".format(
        *header, *index
    )


def test_the_size_that_an_index_does_not_know_is_the_headers(one_picture):
    found = checked_picture(one_picture(header=(33, 44), index=(0, 0)), 0, 0, Limits())
    assert (found.width, found.height) == (33, 44)


@pytest.mark.parametrize("index", [(0, 0), (60_000, 60_000)])
def test_a_header_above_the_limit_is_refused_though_the_index_agrees(one_picture, index):
    store = one_picture(header=(60_000, 60_000), index=index)
    assert reason_of(store) == "too many pixels: 60000x60000, the limit is 128000000 in all"


def test_pixels_at_the_limit_pass_and_one_more_does_not(one_picture):
    store = one_picture()
    assert checked_picture(store, 0, 0, Limits(max_pixels=64 * 48)).width == 64
    assert "the limit is 3071" in reason_of(store, Limits(max_pixels=64 * 48 - 1))


def test_too_many_bytes_are_refused_unread(one_picture, clean_pictures, monkeypatch):
    store, size = one_picture(), len(clean_pictures[0])
    assert checked_picture(store, 0, 0, Limits(max_bytes=size)).width == 64
    monkeypatch.setattr(store, "picture", None)
    assert (
        reason_of(store, Limits(max_bytes=size - 1))
        == f"too many bytes: {size}, the limit is {size - 1}"
    )


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (b"<html>404</html>", "not a picture in a known format"),
        (b"\xff\xd8", "damaged header: cut off in its header"),
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n", "damaged header: cut off in its header"),
    ],
)
def test_bytes_without_a_header_are_refused_with_the_parsers_reason(one_picture, picture, reason):
    assert reason_of(one_picture(picture, index=(0, 0))) == reason


def test_a_jpeg_that_keeps_a_decoder_busy_is_refused(one_picture, draw_photo, encode):
    picture = encode(draw_photo(1, 64, 48), progressive=True)
    assert checked_picture(one_picture(picture), 0, 0, Limits()).width == 64
    scan = picture[picture.rindex(b"\xff\xda") : -2]
    store = one_picture(picture[:-2] + scan * 100 + picture[-2:])
    assert re.match(r"too many scans: 1\d\d, the limit is 100", reason_of(store))


def test_a_limit_of_no_pixels_is_an_input_error():
    with pytest.raises(InputError, match=r"--data\.max-pixels 0"):
        DataConfig(max_pixels=0)
