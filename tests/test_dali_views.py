"""DALI's views against torchvision's: one table of how far apart they may be.

Levels are of 0-255, the mean over all pixels of 24 pictures at 96 px. "drawn" pictures are made by
``draw_photo`` of conftest.py and far more colourful than photographs, "real" ones are ImageNet's.
Measured with DALI 2.4.0, torchvision 0.29.2 and Pillow 13.0.0 on a CPU. What is below one level is
rounding; hue is a rotation here and HSV there (see pipeline/colour_map.py), which every recipe
with hue inherits.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.torch_views import DecodeError, make_views
from pipeline.view_recipe import PAIRS, ViewRecipe, ViewRequest, draw_view

pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")

from pipeline import dali_views

LEVELS = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves the views in levels
CPU = torch.device("cpu")
PLAIN = ViewRecipe(crop_area=(0.2, 1.0))
RECIPES = {
    "crop and flip": PLAIN,
    "brightness": replace(PLAIN, jitter_probability=1.0, jitter=(0.4, 0.0, 0.0, 0.0)),
    "contrast": replace(PLAIN, jitter_probability=1.0, jitter=(0.0, 0.4, 0.0, 0.0)),
    "saturation": replace(PLAIN, jitter_probability=1.0, jitter=(0.0, 0.0, 0.4, 0.0)),
    "hue 0.1": replace(PLAIN, jitter_probability=1.0, jitter=(0.0, 0.0, 0.0, 0.1)),
    "hue 0.4": replace(PLAIN, jitter_probability=1.0, jitter=(0.0, 0.0, 0.0, 0.4)),
    "jitter, no hue": replace(PLAIN, jitter_probability=1.0, jitter=(0.4, 0.4, 0.4, 0.0)),
    "grey": replace(PLAIN, grey_probability=1.0),
    "blur": replace(PLAIN, blur_probability=1.0),
    "solarise": replace(PLAIN, solarise_probability=1.0),
    "moco-v1": PAIRS["moco-v1"][0],
    "moco-v2": PAIRS["moco-v2"][0],
    "moco-v3 query": PAIRS["moco-v3"][0],
    "moco-v3 key": PAIRS["moco-v3"][1],
    "cifar10": PAIRS["cifar10"][0],
    "marks": PAIRS["marks"][0],
}
# Mean difference in levels of (drawn pictures, real pictures), as measured. A test fails above
# 1.3 times these.
MEASURED = {
    "crop and flip": (0.16, 0.14),
    "brightness": (0.52, 0.54),
    "contrast": (0.55, 0.57),
    "saturation": (0.55, 0.50),
    "hue 0.1": (7.39, 2.57),
    "hue 0.4": (13.03, 4.18),
    "jitter, no hue": (2.01, 1.69),
    "grey": (0.15, 0.14),
    "blur": (0.40, 0.53),
    "solarise": (0.16, 0.14),
    "moco-v1": (8.27, 3.16),
    "moco-v2": (6.47, 3.36),
    "moco-v3 query": (6.28, 3.45),
    "moco-v3 key": (6.60, 3.43),
    "cifar10": (6.72, 3.35),
    "marks": (1.15, 1.36),
}


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def sizes_of(pictures):
    return np.array([Image.open(io.BytesIO(picture.data)).size for picture in pictures])


def request_of(pictures, recipes, rows=None, seed=3):
    """The views of samples 0, 1, ... or of some of them."""
    rows = np.arange(len(pictures)) if rows is None else np.array(rows)
    sizes = sizes_of(pictures)[rows]
    views = tuple(draw_view(recipe, sizes, (seed, 0, v), rows) for v, recipe in enumerate(recipes))
    return ViewRequest([pictures[row] for row in rows], views)


def engine_of(next_request, recipes, batch, image_px=96, device=CPU, half=False):
    return dali_views.DaliEngine(
        next_request,
        recipes,
        batch=batch,
        image_px=image_px,
        normalisation=LEVELS,
        device=device,
        half=half,
        threads=1,
    )


def dali_pair(request, recipes, **options):
    engine = engine_of(lambda: request, recipes, len(request.pictures), **options)
    views = engine.take()
    engine.close()
    return views


@pytest.fixture(scope="module", params=["drawn", "real"])
def photos(request, draw_photo):
    """24 JPEGs, and which of the two limits holds for them."""
    if request.param == "drawn":
        drawn = [draw_photo(n, 200 + 10 * n, 400 - 12 * n) for n in range(24)]
        return [encoded(image) for image in drawn], 0
    real = request.getfixturevalue("real_pictures")
    return [np.frombuffer(data, np.uint8) for data in real[:24]], 1


@pytest.fixture(scope="module")
def pictures(draw_photo):
    """Eight small JPEGs of different shapes, one grey."""
    images = [draw_photo(n, 60 + 9 * n, 90 - 5 * n) for n in range(8)]
    return [encoded(image) for image in [*images[:7], images[7].convert("L")]]


@pytest.mark.parametrize("name", RECIPES)
def test_a_dali_view_is_a_torchvision_view_within_its_limit(name, photos):
    pictures, column = photos
    request = request_of(pictures, [RECIPES[name]])
    (dali,) = dali_pair(request, [RECIPES[name]])
    (torchvision,) = make_views(request, 96, *LEVELS)
    difference = (dali - torchvision).abs().mean().item()
    assert difference < 1.3 * MEASURED[name][column]


def decoded(picture):
    """One picture as the graph decodes it, ``[H, W, 3]``."""
    inputs = [[picture]]
    arguments = dali_views.pipeline_arguments(1, 1, CPU, prefetch=1)
    pipeline = dali_views.decode_graph(source=lambda: inputs, device="cpu", **arguments)
    pipeline.build()
    return np.array(pipeline.run()[0].at(0))


def test_decoding_is_bit_equal_to_pillows(photos):
    for picture in photos[0]:
        expected = Image.open(io.BytesIO(picture.data)).convert("RGB")
        assert (decoded(picture) == np.asarray(expected)).all()


def test_the_rotation_in_exif_is_ignored_when_decoding(draw_photo, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(draw_photo(0, 90, 60), exif=exif)
    assert decoded(np.frombuffer(data, np.uint8)).shape == (60, 90, 3)


def test_a_dali_view_fits_its_own_torchvision_view_and_no_other(photos):
    # What a limit cannot show: no view is turned, shifted, or that of another sample.
    request = request_of(photos[0], [PLAIN])
    (dali,) = dali_pair(request, [PLAIN])
    (torchvision,) = make_views(request, 96, *LEVELS)
    distance = (dali[:, None] - torchvision[None]).abs().mean(dim=(2, 3, 4))
    assert distance.diagonal().max() < 1 < (distance + 99 * torch.eye(24)).min()
    shifted = (dali[..., 1:] - torchvision[..., :-1]).abs().mean(dim=(1, 2, 3))
    mirrored = (dali - torchvision.flip(3)).abs().mean(dim=(1, 2, 3))
    assert (shifted > 2 * distance.diagonal()).all() and (mirrored > 5).all()


@pytest.mark.parametrize("name", ["moco-v1", "moco-v2", "moco-v3", "cifar10"])
def test_views_do_not_depend_on_the_batch_or_on_neighbours(name, pictures):
    recipes = PAIRS[name]
    whole = dali_pair(request_of(pictures, recipes), recipes)
    for rows in ([2], [7, 0, 5], [4, 4]):
        part = dali_pair(request_of(pictures, recipes, rows), recipes)
        for one, other in zip(part, whole, strict=True):
            assert torch.equal(one, other[rows])


def test_one_decode_serves_both_views_as_two_decodes_would(pictures):
    recipes = PAIRS["moco-v3"]
    pair = request_of(pictures, recipes)
    for number, view in enumerate(dali_pair(pair, recipes)):
        alone = ViewRequest(pair.pictures, pair.views[number : number + 1])
        assert torch.equal(dali_pair(alone, recipes[number : number + 1])[0], view)


def test_nothing_is_done_to_samples_that_drew_nothing(pictures):
    recipe = replace(PAIRS["moco-v3"][1], jitter_probability=0.5, blur_probability=0.5)
    request = request_of(pictures * 4, [recipe])
    view = request.views[0]
    still = ~(view.jitter | view.grey | view.solarise | (view.sigma_px > 0))
    assert 0 < still.sum() < 32
    (done,), (plain,) = dali_pair(request, [recipe]), dali_pair(request, [PLAIN])
    assert torch.equal(done[still], plain[still])


def test_views_come_normalised_and_in_the_promised_layout(pictures):
    request = request_of(pictures, [PLAIN])
    (levels,) = dali_pair(request, [PLAIN], image_px=40)
    engine = dali_views.DaliEngine(
        lambda: request,
        [PLAIN],
        batch=8,
        image_px=40,
        normalisation=((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)),
        device=CPU,
        half=True,
        threads=1,
    )
    (view,) = engine.take()
    engine.close()
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]]).view(2, 1, 3, 1, 1)
    assert view.shape == (8, 3, 40, 40) and view.dtype == torch.float16
    assert torch.allclose(view.float(), (levels / 255 - mean) / std, atol=2e-3)


def test_a_batch_keeps_its_values_while_later_ones_are_made(pictures):
    seeds = iter(range(100))
    engine = engine_of(lambda: request_of(pictures, [PLAIN], seed=next(seeds)), [PLAIN], 8)
    (first,) = engine.take()
    kept = first.clone()
    for _ in range(6):
        engine.take()
    assert torch.equal(first, kept)
    engine.close()


def test_the_engine_gives_the_views_of_its_requests_in_their_order(pictures):
    seeds = iter(range(100))
    engine = engine_of(lambda: request_of(pictures, [PLAIN], seed=next(seeds)), [PLAIN], 8)
    for seed in range(5):
        (expected,) = dali_pair(request_of(pictures, [PLAIN], seed=seed), [PLAIN])
        assert torch.equal(engine.take()[0], expected)
    engine.close()


def test_a_request_made_again_outside_the_stream_gives_the_same_views(pictures):
    request = request_of(pictures, PAIRS["moco-v2"])
    engine = engine_of(lambda: request, PAIRS["moco-v2"], 8)
    for one, other in zip(engine.take(), engine.make(request), strict=True):
        assert torch.equal(one, other)
    engine.close()


def broken(pictures, row):
    garbage = np.frombuffer(b"\xff\xd8 not a picture at all", np.uint8)
    return [*pictures[:row], garbage, *pictures[row + 1 :]]


def test_the_engine_goes_on_behind_a_broken_batch(pictures):
    requests = [request_of(pictures, [PLAIN], seed=seed) for seed in range(8)]
    requests[1] = ViewRequest(broken(pictures, 3), requests[1].views)
    source = iter(requests)
    engine = engine_of(lambda: next(source), [PLAIN], 8)
    engine.take()
    with pytest.raises(DecodeError):
        engine.take()
    for seed in (2, 3):
        assert torch.equal(engine.take()[0], dali_pair(requests[seed], [PLAIN])[0])
    engine.close()


def test_only_the_broken_picture_of_a_batch_is_called_undecodable(pictures):
    engine = engine_of(lambda: None, [PLAIN], 8)
    problems = engine.undecodable(broken(pictures, 3))
    assert list(problems) == [3] and problems[3] and "\n" not in problems[3]
    assert engine.undecodable(pictures) == {}
    engine.close()


def test_an_error_of_the_source_reaches_the_consumer_every_time():
    def fail():
        raise ValueError("no more shards")

    engine = engine_of(fail, [PLAIN], 8)
    for _ in range(3):
        with pytest.raises(ValueError, match="no more shards"):
            engine.take()
    engine.close()


def test_an_engine_may_be_closed_twice(pictures):
    engine = engine_of(lambda: request_of(pictures, [PLAIN]), [PLAIN], 8)
    engine.close()
    engine.close()


def test_a_recipe_has_inputs_only_for_what_it_may_do():
    crop = ["roi_start", "roi_end"]
    assert dali_views.fields_of(PLAIN) == crop
    assert dali_views.fields_of(PAIRS["moco-v1"][0]) == [*crop, "recolours", "own", "mean"]
    assert dali_views.fields_of(PAIRS["moco-v3"][1])[5:] == ["blurs", "sigma", "solarises"]


def test_a_flip_is_a_window_with_its_sides_swapped():
    view = draw_view(PAIRS["moco-v2"][0], np.full((50, 2), 99), (0, 0, 0), np.arange(50))
    inputs = dali_views.view_inputs(view)
    is_swapped = inputs["roi_start"][:, 1] > inputs["roi_end"][:, 1]
    assert (is_swapped == view.flip).all()
    assert (inputs["roi_end"][:, 0] > inputs["roi_start"][:, 0]).all()


@pytest.mark.parametrize("name", PAIRS)
def test_the_gpu_graph_can_be_defined_where_there_is_no_gpu(name):
    graph = dali_views.pair_graph(
        source=lambda: None,
        recipes=PAIRS[name],
        image_px=224,
        normalisation=LEVELS,
        device="gpu",
        half=True,
        batch_size=4,
        num_threads=1,
        device_id=0,
    )
    assert [output.device for output in graph._graph_out] == ["gpu", "gpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["moco-v1", "moco-v2", "moco-v3", "cifar10"])
def test_gpu_views_are_cpu_views_within_two_levels(name, photos):
    request = request_of(photos[0], PAIRS[name])
    on_cpu = dali_pair(request, PAIRS[name])
    on_gpu = dali_pair(request, PAIRS[name], device=torch.device("cuda", 0))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other.is_cuda and other.shape == one.shape
        assert (one - other.cpu()).abs().mean() < 2  # nvJPEG decodes a little differently
