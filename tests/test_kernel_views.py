"""The compiled kernels against Pillow and torchvision: equal in every bit.

Pillow's wheels for other processors than x86-64 may fuse a product and a sum, which rounds
differently now and then; there a level may be one off.
"""

import ast
import gc
import io
import platform
import tarfile
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pipeline import compiled
from pipeline.blur_kernel import blur, blur_boxes
from pipeline.colour_kernels import BRIGHTNESS, CONTRAST, GREY, HUE, SATURATION, recolour
from pipeline.kernel_views import (
    ArrayPool,
    KernelEngine,
    decoded_rgb,
    kernel_inputs,
    level_tables,
)
from pipeline.picture_header import BadHeaderError, read_header
from pipeline.resize_kernel import PILLOW_REORDERS, resize
from pipeline.torch_views import DecodeError, decode, make_views
from pipeline.view_recipe import PAIRS, ViewRecipe, ViewRequest, draw_view

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = ("blur_kernel", "colour_kernels", "resize_kernel")
MOST_OFF = 0 if platform.machine() in ("x86_64", "AMD64") else 1
NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LEVELS = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves the views in levels
PLAIN = ViewRecipe(crop_area=(0.2, 1.0))
JITTERS = {
    "brightness": (0.4, 0.0, 0.0, 0.0),
    "contrast": (0.0, 0.4, 0.0, 0.0),
    "saturation": (0.0, 0.0, 0.4, 0.0),
    "hue": (0.0, 0.0, 0.0, 0.4),
    "jitter": (0.9, 0.9, 0.9, 0.5),
}
RECIPES = {
    "crop and flip": PLAIN,
    **{name: replace(PLAIN, jitter_probability=1.0, jitter=s) for name, s in JITTERS.items()},
    "grey": replace(PLAIN, grey_probability=1.0),
    "blur": replace(PLAIN, blur_probability=1.0),
    "wide blur": replace(PLAIN, blur_probability=1.0, blur_sigma_px=(2.0, 20.0)),
    "solarise": replace(PLAIN, solarise_probability=1.0),
    "moco-v1": PAIRS["moco-v1"][0],
    "moco-v2": PAIRS["moco-v2"][0],
    "moco-v3 query": PAIRS["moco-v3"][0],
    "moco-v3 key": PAIRS["moco-v3"][1],
    "cifar10": PAIRS["cifar10"][0],
    "marks": PAIRS["marks"][0],
}


def as_bytes(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def request_of(pictures, recipes, seed=0):
    sizes = np.array([Image.open(io.BytesIO(picture.data)).size for picture in pictures])
    rows = np.arange(len(pictures))
    views = tuple(draw_view(recipe, sizes, (seed, 0, v), rows) for v, recipe in enumerate(recipes))
    return ViewRequest(pictures, views)


def engine_of(next_request, side=48, normalisation=LEVELS, half=False):
    return KernelEngine(
        next_request,
        image_px=side,
        normalisation=normalisation,
        device=torch.device("cpu"),
        half=half,
        threads=2,
    )


@pytest.fixture(scope="module")
def pictures(draw_photo):
    """24 pictures of many shapes: JPEGs, one of them grey, and a PNG."""
    images = [draw_photo(n, 60 + 23 * (n % 9), 300 - 11 * n) for n in range(24)]
    return [
        as_bytes(images[0].convert("L")),
        as_bytes(images[1], "PNG"),
        *[as_bytes(image, quality=92) for image in images[2:]],
    ]


@pytest.fixture
def make():
    """``make(request, side)`` gives an engine's views of one request."""
    engines = []

    def views(request, side=48):
        engines.append(engine_of(lambda: None, side))
        return engines[-1].make(request)

    yield views
    for engine in engines:
        engine.close()


def off(one, other):
    """How many levels apart two results are at most."""
    one, other = np.asarray(one), np.asarray(other)
    kind = np.int16 if one.dtype == np.uint8 else np.float32
    return np.abs(one.astype(kind) - other.astype(kind)).max()


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_is_torchvisions_bit_for_bit(name, pictures, make):
    for side, seed in ((96, 1), (47, 2)):
        request = request_of(pictures, [RECIPES[name]], seed)
        assert off(make(request, side)[0], make_views(request, side, *LEVELS)[0]) <= MOST_OFF


@pytest.mark.parametrize("name", ["moco-v1", "moco-v2", "moco-v3", "cifar10"])
def test_both_views_of_photographs_are_torchvisions_bit_for_bit(name, real_pictures, make):
    photos = [np.frombuffer(data, np.uint8) for data in real_pictures]
    request = request_of(photos, PAIRS[name])
    for one, other in zip(make(request, 224), make_views(request, 224, *LEVELS), strict=True):
        assert off(one, other) <= MOST_OFF


def test_normalised_views_are_torchvisions_bit_for_bit(pictures):
    request = request_of(pictures, PAIRS["moco-v3"])
    engine = engine_of(lambda: request, normalisation=NORMALISATION)
    for one, other in zip(engine.take(), make_views(request, 48, *NORMALISATION), strict=True):
        assert one.dtype == torch.float32 and one.is_contiguous()
        assert torch.equal(one, other) or MOST_OFF
    engine.close()


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    side=st.integers(1, 60),
    mirror=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_window_of_any_shape_is_resized_as_by_pillow(size, side, mirror, seed):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    x, y = int(rng.integers(size[0])), int(rng.integers(size[1]))
    w, h = int(rng.integers(1, size[0] - x + 1)), int(rng.integers(1, size[1] - y + 1))
    view = np.empty((side, 3, side), np.uint8)
    lines = picture.reshape(size[1], -1)
    resize(lines, np.array([x, y, w, h]), mirror, PILLOW_REORDERS, view)
    expected = TF.resized_crop(Image.fromarray(picture), y, x, h, w, [side, side])
    expected = TF.hflip(expected) if mirror else expected
    assert off(view.transpose(0, 2, 1), expected) == 0


def recoloured(pixels_HW3, step, strength):
    view = np.ascontiguousarray(pixels_HW3.transpose(0, 2, 1))
    recolour(view, np.array([step], np.int8), np.array([strength], np.float32))
    return view.transpose(0, 2, 1)


def all_colours():
    """The 2^24 colours as 16 pictures."""
    for red in range(0, 256, 16):
        number = (np.arange(1 << 20) + (red << 16)).reshape(1 << 10, 1 << 10)
        yield np.stack([number >> 16, number >> 8, number], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "turn", [0.1, *(pytest.param(t, marks=pytest.mark.slow) for t in (-0.37, 0.004))]
)
def test_hue_is_torchvisions_for_every_colour(turn):
    for colours in all_colours():
        turned = recoloured(colours, HUE, int(turn * 255) & 255)
        assert off(turned, TF.adjust_hue(Image.fromarray(colours), turn)) == 0


@pytest.mark.parametrize(
    ("step", "adjust"),
    [
        (BRIGHTNESS, TF.adjust_brightness),
        (CONTRAST, TF.adjust_contrast),
        (SATURATION, TF.adjust_saturation),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.61, 1.0, 1.39, 3.0])
def test_a_jitter_is_torchvisions_for_a_million_colours(step, adjust, factor):
    colours = list(all_colours())[9]
    expected = adjust(Image.fromarray(colours), factor)
    assert off(recoloured(colours, step, factor), expected) <= MOST_OFF


def test_grey_is_torchvisions_for_every_colour():
    for colours in all_colours():
        expected = TF.rgb_to_grayscale(Image.fromarray(colours), 3)
        assert off(recoloured(colours, GREY, 0), expected) == 0


@given(sigma=st.floats(0.01, 30), side=st.integers(1, 40))
def test_blur_is_pillows_for_any_width(sigma, side):
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    view = np.ascontiguousarray(pixels.transpose(0, 2, 1))
    blur(view, blur_boxes(np.array([sigma]))[0])
    expected = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma))
    assert off(view.transpose(0, 2, 1), expected) <= MOST_OFF


def test_an_operation_without_strength_is_left_out_as_by_color_jitter():
    view = draw_view(PAIRS["marks"][0], np.full((200, 2), 99), (0, 0, 0), np.arange(200))
    steps = kernel_inputs(view).steps_N6
    assert set(steps[view.jitter].ravel()) == {0, BRIGHTNESS, CONTRAST}
    assert not steps[~view.jitter].any()


def test_grey_comes_first_in_moco_v1_and_last_in_v2():
    sizes, rows = np.full((200, 2), 99), np.arange(200)
    for name, place in (("moco-v1", 0), ("moco-v2", 5)):
        view = draw_view(PAIRS[name][0], sizes, (0, 0, 0), rows)
        steps = kernel_inputs(view).steps_N6
        assert ((steps[:, place] == GREY) == view.grey).all() and view.grey.any()
        assert not (np.delete(steps, place, axis=1) == GREY).any()


def test_a_table_has_the_solarised_levels_behind_the_plain_ones():
    plain, solarised = level_tables(*LEVELS)
    assert np.allclose(plain, np.arange(256), atol=1e-3)
    inverted = [level if level < 128 else 255 - level for level in range(256)]
    assert (solarised == plain[:, inverted]).all()


def outcome(decode_one, picture):
    try:
        return np.asarray(decode_one(picture))
    except DecodeError as error:
        return str(error)


def may_be_decoded(picture):
    try:
        header = read_header(picture)
    except BadHeaderError:
        return False
    return header.width * header.height < 10_000_000


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of odd metadata
def test_odd_and_broken_files_decode_as_by_pillow_or_fail_as_there(test_data):
    counts = {"decoded": 0, "refused": 0}
    with tarfile.open(test_data / "messy.tar") as tar:
        for member in tar:
            if not member.isfile():
                continue
            picture = np.frombuffer(tar.extractfile(member).read(), np.uint8)
            if not may_be_decoded(picture):  # as the loader does
                continue
            one, other = outcome(decoded_rgb, picture), outcome(decode, picture)
            assert type(one) is type(other), member.name
            assert np.array_equal(one, other), member.name
            counts["refused" if isinstance(one, str) else "decoded"] += 1
    assert min(counts.values()) > 20


def broken(pictures, row):
    garbage = np.frombuffer(b"\xff\xd8 not a picture at all", np.uint8)
    return [*pictures[:row], garbage, *pictures[row + 1 :]]


def test_the_engine_gives_the_views_of_its_requests_in_their_order(pictures):
    requests = [request_of(pictures, PAIRS["moco-v2"], seed) for seed in range(6)]
    source = iter(requests * 2)
    engine = engine_of(lambda: next(source))
    for request in requests:
        for one, other in zip(engine.take(), make_views(request, 48, *LEVELS), strict=True):
            assert off(one, other) <= MOST_OFF
    engine.close()


def test_the_engine_goes_on_behind_a_broken_batch_and_names_the_picture(pictures):
    requests = [request_of(pictures, [PLAIN], seed) for seed in range(6)]
    requests[1] = ViewRequest(broken(pictures, 13), requests[1].views)
    source = iter(requests)
    engine = engine_of(lambda: next(source))
    engine.take()
    with pytest.raises(DecodeError, match="not a picture in a known format"):
        engine.take()
    assert off(engine.take()[0], make_views(requests[2], 48, *LEVELS)[0]) == 0
    assert engine.undecodable(requests[1].pictures) == {13: "not a picture in a known format"}
    engine.close()


def test_a_window_outside_the_picture_is_an_error_and_no_stray_read(pictures, make):
    request = request_of(pictures, [PLAIN])
    request.views[0].crop_xywh_px[5] = [0, 0, 10_000, 10]
    with pytest.raises(DecodeError, match="a window ends at 10000x10"):
        make(request)


def test_a_batch_keeps_its_values_while_later_ones_are_made(pictures):
    seeds = iter(range(100))
    engine = engine_of(lambda: request_of(pictures, [PLAIN], next(seeds)))
    (first,) = engine.take()
    kept = first.clone()
    part = first[3]
    del first
    for _ in range(8):
        engine.take()
    assert torch.equal(part, kept[3])
    engine.close()


def test_memory_of_a_batch_is_used_again_once_nobody_has_it():
    pool = ArrayPool()
    first, second = pool.take((2, 3)), pool.take((2, 3))
    addresses = {first.ctypes.data, second.ctypes.data}
    assert len(addresses) == 2 and not any(address % 64 for address in addresses)
    tensor = torch.from_numpy(first)[1]
    del first
    assert pool.take((2, 3)).ctypes.data not in addresses  # a part of the first is still in use
    del tensor, second
    gc.collect()
    again = [pool.take((2, 3)) for _ in range(3)]
    assert addresses <= {array.ctypes.data for array in again}
    assert pool.take((2, 4)).shape == (2, 4)


def test_the_engine_gives_half_precision_on_request(pictures):
    engine = engine_of(lambda: request_of(pictures, [PLAIN]), half=True)
    assert engine.take()[0].dtype == torch.float16
    engine.close()


def test_an_error_of_the_source_reaches_the_consumer_every_time():
    def fail():
        raise ValueError("no more shards")

    engine = engine_of(fail)
    for _ in range(3):
        with pytest.raises(ValueError, match="no more shards"):
            engine.take()
    engine.close()
    engine.close()


def test_each_kernel_is_compiled_for_one_kind_of_arguments_only(pictures, make):
    # Another kind, a read-only array for one, would cost seconds in the middle of a run.
    before = [len(kernel.signatures) for kernel in (resize, recolour, blur)]
    make(request_of(pictures, PAIRS["moco-v3"]))
    assert [len(kernel.signatures) for kernel in (resize, recolour, blur)] == before


@pytest.mark.parametrize("name", KERNEL_FILES)
def test_a_file_of_kernels_uses_no_other_one(name):
    # Numba's cache would not notice that the other one has changed.
    tree = ast.parse((ROOT / "pipeline" / f"{name}.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {m for m in modules if m.startswith("pipeline")} == {"pipeline.compiled"}


def test_a_machine_without_a_place_for_the_cache_compiles_all_the_same(monkeypatch):
    njit = numba.njit

    def without_cache(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_cache)
    assert compiled.compiled(lambda n: n + 1)(2) == 3
