from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.view_recipe import PAIRS, ViewParameters, ViewRecipe, draw_view

SAMPLES = 20_000
KEYS = (3, 0, 0)  # seed, epoch, view


@cache
def drawn(name, view=0):
    sizes = np.tile([[500, 375]], (SAMPLES, 1))
    return draw_view(PAIRS[name][view], sizes, KEYS, np.arange(SAMPLES))


def as_lists(parameters):
    return {name: np.asarray(value).tolist() for name, value in vars(parameters).items()}


def test_moco_v1_has_its_published_numbers():
    expected = ViewRecipe(
        crop_area=(0.2, 1.0),
        grey_first=True,
        grey_probability=0.2,
        jitter_probability=1.0,
        jitter=(0.4, 0.4, 0.4, 0.4),
        flip_probability=0.5,
    )
    assert PAIRS["moco-v1"] == (expected, expected)


def test_moco_v2_has_its_published_numbers():
    expected = ViewRecipe(
        crop_area=(0.2, 1.0),
        jitter_probability=0.8,
        jitter=(0.4, 0.4, 0.4, 0.1),
        grey_probability=0.2,
        blur_probability=0.5,
        blur_sigma_px=(0.1, 2.0),
        flip_probability=0.5,
    )
    assert PAIRS["moco-v2"] == (expected, expected)


def test_moco_v3_has_its_published_numbers():
    query = ViewRecipe(
        crop_area=(0.2, 1.0),
        jitter_probability=0.8,
        jitter=(0.4, 0.4, 0.2, 0.1),
        grey_probability=0.2,
        blur_probability=1.0,
        blur_sigma_px=(0.1, 2.0),
        flip_probability=0.5,
    )
    key = replace(query, blur_probability=0.1, solarise_probability=0.2)
    assert PAIRS["moco-v3"] == (query, key)


def test_cifar10_has_its_published_numbers():
    expected = ViewRecipe(
        crop_area=(0.08, 1.0),
        jitter_probability=0.8,
        jitter=(0.4, 0.4, 0.4, 0.1),
        grey_probability=0.2,
        flip_probability=0.5,
    )
    assert PAIRS["cifar10"] == (expected, expected)


def test_every_recipe_crops_within_torchvisions_aspects_unless_it_is_for_marks():
    aspects = {recipe.crop_aspect for name in PAIRS for recipe in PAIRS[name] if name != "marks"}
    assert aspects == {(3 / 4, 4 / 3)}


def test_views_have_their_frozen_values():
    # These literals must never change: they are what a run resumed tomorrow will see.
    sizes = np.array([[500, 375], [64, 64]])
    view = draw_view(PAIRS["moco-v2"][0], sizes, (1, 2, 0), np.array([10, 11]))
    assert view.crop_xywh_px.tolist() == [[178, 67, 226, 281], [8, 20, 38, 43]]
    assert view.jitter_order.tolist() == [[2, 3, 1, 0], [3, 0, 2, 1]]
    assert view.factors[1] == pytest.approx([1.16984148, 1.2278642, 0.63358599, -0.02185289])
    assert view.sigma_px == pytest.approx([1.22665851, 1.84557667])


def test_crops_reach_every_edge_of_the_picture():
    x, y, w, h = drawn("cifar10").crop_xywh_px.T
    assert x.min() == 0 and y.min() == 0 and (x + w).max() == 500 and (y + h).max() == 375
    middle = (x + w / 2).mean(), (y + h / 2).mean()
    assert middle == pytest.approx((250, 187.5), abs=2)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    name=st.sampled_from(sorted(PAIRS)),
    seed=st.integers(0, 99),
)
def test_crops_lie_inside_pictures_of_any_shape(width, height, name, seed):
    sizes = np.tile([[width, height]], (20, 1))
    x, y, w, h = draw_view(PAIRS[name][0], sizes, (seed, 0, 0), np.arange(20)).crop_xywh_px.T
    assert (x >= 0).all() and (y >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (x + w <= width).all() and (y + h <= height).all()


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((1, 4000), (0, 1999, 1, 1)),
        ((4000, 1), (1999, 0, 1, 1)),
        ((100, 9000), (0, 4433, 100, 133)),
        ((9000, 100), (4433, 0, 133, 100)),
    ],
)
def test_a_strip_gets_the_window_in_its_middle_that_is_nearest_to_it_in_shape(size, crop):
    view = draw_view(PAIRS["moco-v2"][0], np.array([size]), KEYS, np.array([0]))
    assert view.crop_xywh_px.tolist() == [list(crop)]


def test_draws_do_not_depend_on_each_other():
    view = drawn("moco-v3", 1)
    x, _, w, _ = view.crop_xywh_px.T
    columns = [view.flip, view.jitter, view.grey, view.sigma_px > 0, view.solarise, x, w]
    correlation = np.corrcoef(np.array([*columns, *view.factors.T], dtype=float))
    # x and w are bound: a wide window has little room.
    correlation[5, 6] = correlation[6, 5] = 0
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.03


def test_the_same_sample_gets_the_same_view_in_any_batch():
    sizes = np.stack([np.arange(50, 90), np.arange(90, 50, -1)], axis=1)
    whole = draw_view(PAIRS["moco-v2"][0], sizes, KEYS, np.arange(40))
    rows = np.array([31, 4, 17])
    part = draw_view(PAIRS["moco-v2"][0], sizes[rows], KEYS, rows)
    assert as_lists(part) == as_lists(whole.take(rows))


def test_take_picks_rows_of_every_field():
    view = drawn("moco-v2")
    taken = view.take(np.array([5, 2]))
    assert isinstance(taken, ViewParameters)
    for name, value in as_lists(taken).items():
        if name != "grey_first":
            assert value == [getattr(view, name)[5].tolist(), getattr(view, name)[2].tolist()]


@pytest.mark.parametrize("keys", [(4, 0, 0), (3, 1, 0), (3, 0, 1)], ids=["seed", "epoch", "view"])
def test_another_seed_epoch_or_view_gives_other_views(keys):
    sizes = np.tile([[500, 375]], (SAMPLES, 1))
    other = draw_view(PAIRS["moco-v2"][0], sizes, keys, np.arange(SAMPLES))
    one = drawn("moco-v2")
    assert (one.crop_xywh_px == other.crop_xywh_px).all(axis=1).mean() < 0.01
    assert (one.flip == other.flip).mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.corrcoef(one.factors[:, 0], other.factors[:, 0])[0, 1]) < 0.03
