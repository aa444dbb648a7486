"""What is drawn follows the distributions of each recipe: of the papers and of torchvision.

Goodness of fit is judged by Kolmogorov and Smirnov's distance, and by chi-square where values are
few. The draws are functions of fixed seeds, so a test passes or fails for ever: each would fail by
chance once in ten thousand seeds.
"""

from functools import cache
from itertools import permutations
from math import log, sqrt

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipeline.view_recipe import PAIRS, draw_view

SAMPLES = 100_000
CHANCE = 1e-4
SHAPES = {"photo": (500, 375), "square": (32, 32), "tall": (200, 640), "flat": (900, 280)}

# Source of the numbers: the papers, and where they are silent the authors' code.
AREA = {"moco-v1": 0.2, "moco-v2": 0.2, "moco-v3": 0.2, "cifar10": 0.08}
STRENGTHS = {  # brightness, contrast, saturation, hue
    ("moco-v1", 0): (0.4, 0.4, 0.4, 0.4),
    ("moco-v1", 1): (0.4, 0.4, 0.4, 0.4),
    ("moco-v2", 0): (0.4, 0.4, 0.4, 0.1),
    ("moco-v2", 1): (0.4, 0.4, 0.4, 0.1),
    ("moco-v3", 0): (0.4, 0.4, 0.2, 0.1),
    ("moco-v3", 1): (0.4, 0.4, 0.2, 0.1),
    ("cifar10", 0): (0.4, 0.4, 0.4, 0.1),
    ("cifar10", 1): (0.4, 0.4, 0.4, 0.1),
}
SHARES = {  # flip, jitter, grey, blur, solarise
    ("moco-v1", 0): (0.5, 1.0, 0.2, 0.0, 0.0),
    ("moco-v1", 1): (0.5, 1.0, 0.2, 0.0, 0.0),
    ("moco-v2", 0): (0.5, 0.8, 0.2, 0.5, 0.0),
    ("moco-v2", 1): (0.5, 0.8, 0.2, 0.5, 0.0),
    ("moco-v3", 0): (0.5, 0.8, 0.2, 1.0, 0.0),
    ("moco-v3", 1): (0.5, 0.8, 0.2, 0.1, 0.2),
    ("cifar10", 0): (0.5, 0.8, 0.2, 0.0, 0.0),
    ("cifar10", 1): (0.5, 0.8, 0.2, 0.0, 0.0),
}
BLURRED = [key for key, shares in SHARES.items() if shares[3]]
VIEWS = pytest.mark.parametrize(("name", "view"), STRENGTHS)


@cache
def drawn(name, view, shape="photo"):
    sizes = np.tile([SHAPES[shape]], (SAMPLES, 1))
    return draw_view(PAIRS[name][view], sizes, (7, 2, view), np.arange(SAMPLES))


@cache
def torchvisions_windows(shape, smallest, count=5000):
    """x, y, width and height of windows that torchvision draws, ``[count, 4]``."""
    torch.manual_seed(0)
    picture = torch.empty(SHAPES[shape][::-1])
    drawn = [
        RandomResizedCrop.get_params(picture, (smallest, 1.0), (3 / 4, 4 / 3)) for _ in range(count)
    ]
    y, x, h, w = np.array(drawn).T
    return np.stack([x, y, w, h], axis=1)


def furthest(samples, other=None):
    """Kolmogorov and Smirnov's distance from other samples, or from uniform ones in [0, 1].

    In units of what chance exceeds in ``CHANCE`` of all cases; for values with ties it exceeds it
    less often.
    """
    samples = np.sort(samples)
    count = len(samples)
    if other is None:
        steps = np.arange(count + 1) / count
        distance = max(np.abs(steps[1:] - samples).max(), np.abs(steps[:-1] - samples).max())
    else:
        values = np.unique(np.concatenate([samples, other]))
        ours = np.searchsorted(samples, values, side="right") / count
        theirs = np.searchsorted(np.sort(other), values, side="right") / len(other)
        distance = np.abs(ours - theirs).max()
        count = count * len(other) / (count + len(other))
    return distance / (sqrt(-log(CHANCE / 2) / 2) / sqrt(count))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", AREA)
def test_windows_are_distributed_as_torchvisions(name, shape):
    x, y, w, h = drawn(name, 0, shape).crop_xywh_px.T
    theirs_x, theirs_y, theirs_w, theirs_h = torchvisions_windows(shape, AREA[name]).T
    assert furthest(w * h, theirs_w * theirs_h) < 1
    assert furthest(w / h, theirs_w / theirs_h) < 1
    assert furthest(x + w / 2, theirs_x + theirs_w / 2) < 1
    assert furthest(y + h / 2, theirs_y + theirs_h / 2) < 1


@VIEWS
def test_areas_and_aspects_are_uniform_where_every_window_fits(name, view):
    # Windows of a strip that torchvision would only find in a picture of millions of pixels.
    sizes = np.full((SAMPLES, 2), 100_000)
    recipe = PAIRS[name][view]
    _, _, w, h = draw_view(recipe, sizes, (5, 0, view), np.arange(SAMPLES)).crop_xywh_px.T
    share = w * h / 1e10
    small = share < 0.7  # below 3/4 every aspect fits, so nothing was drawn again
    low = AREA[name]
    assert furthest((share[small] - low) / (0.7 - low)) < 1
    widest = log(4 / 3)
    assert furthest((np.log(w[small] / h[small]) + widest) / (2 * widest)) < 1


@VIEWS
def test_windows_lie_anywhere_with_the_same_chance(name, view):
    x, y, w, h = drawn(name, view).crop_xywh_px.T
    for start, room in ((x, 500 - w), (y, 375 - h)):
        wide = room >= 50
        rng = np.random.default_rng(0)  # spreads whole pixels, so that nothing is tied
        assert furthest((start[wide] + rng.random(wide.sum())) / (room[wide] + 1)) < 1


@VIEWS
def test_jitter_factors_are_uniform_in_their_ranges(name, view):
    parameters = drawn(name, view)
    for column, strength in enumerate(STRENGTHS[name, view]):
        middle = 0 if column == 3 else 1
        factors = parameters.factors[parameters.jitter, column]
        assert furthest((factors - middle + strength) / (2 * strength)) < 1
        assert (parameters.factors[~parameters.jitter, column] == middle).all()


@VIEWS
def test_the_four_jitter_operations_come_in_each_of_24_orders_equally_often(name, view):
    orders, counts = np.unique(drawn(name, view).jitter_order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == list(permutations(range(4)))
    expected = SAMPLES / 24
    # Chi-square with 23 degrees of freedom exceeds 56.6 once in ten thousand times.
    assert ((counts - expected) ** 2 / expected).sum() < 56.6


@pytest.mark.parametrize(("name", "view"), BLURRED)
def test_blur_widths_are_uniform_from_a_tenth_to_two_pixels(name, view):
    sigma = drawn(name, view).sigma_px
    assert furthest((sigma[sigma > 0] - 0.1) / 1.9) < 1


@VIEWS
def test_each_operation_happens_to_its_share_of_the_samples(name, view):
    parameters = drawn(name, view)
    happens = (
        parameters.flip,
        parameters.jitter,
        parameters.grey,
        parameters.sigma_px > 0,
        parameters.solarise,
    )
    for found, share in zip(happens, SHARES[name, view], strict=True):
        deviation = sqrt(share * (1 - share) / SAMPLES)
        assert abs(found.mean() - share) <= 3.9 * deviation


@pytest.mark.parametrize("name", AREA)
def test_query_and_key_are_drawn_apart(name):
    one, other = drawn(name, 0), drawn(name, 1)
    columns = [
        np.column_stack([view.crop_xywh_px, view.flip, view.grey, view.factors, view.jitter_order])
        for view in (one, other)
    ]
    together = np.corrcoef(np.hstack(columns).T.astype(float))
    across = together[: len(together) // 2, len(together) // 2 :]
    assert np.abs(across).max() < 5 / sqrt(SAMPLES)  # 144 of them
