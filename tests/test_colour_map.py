from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.colour_map import colour_maps, hue_rotation
from pipeline.view_recipe import PAIRS, ViewRecipe, draw_view

GREY = np.array([0.299, 0.587, 0.114])
RECIPE = ViewRecipe(
    crop_area=(0.2, 1.0),
    jitter_probability=0.8,
    jitter=(0.4, 0.4, 0.4, 0.4),
    grey_probability=0.3,
)


def step_by_step(pixels_P3, view, row):
    """The operations one after the other in floats, without rounding or clipping."""

    def to_grey(x):
        return np.repeat((x @ GREY)[:, None], 3, axis=1)

    x = to_grey(pixels_P3) if view.grey[row] and view.grey_first else pixels_P3
    for operation in view.jitter_order[row]:
        f = view.factors[row, operation]
        if operation == 0:
            x = f * x
        elif operation == 1:
            x = f * x + (1 - f) * (x @ GREY).mean()
        elif operation == 2:
            x = f * x + (1 - f) * to_grey(x)
        else:
            x = turned_about_grey(x, 2 * np.pi * f)
    return to_grey(x) if view.grey[row] and not view.grey_first else x


def turned_about_grey(x, angle):
    """Rodrigues' formula, written out for the axis (1, 1, 1)."""
    axis = np.ones(3) / 3**0.5
    along = (x @ axis)[:, None] * axis
    return x * np.cos(angle) + np.cross(axis, x) * np.sin(angle) + along * (1 - np.cos(angle))


def views_of(recipe, seed, count=30):
    return draw_view(recipe, np.full((count, 2), 64), (seed, 0, 0), np.arange(count))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), grey_first=st.booleans())
def test_one_linear_map_equals_the_operations_in_their_order(seed, grey_first):
    pixels_P3 = np.random.default_rng(seed).uniform(0, 255, (40, 3))
    view = views_of(replace(RECIPE, grey_first=grey_first), seed)
    _, own_N33, mean_N33 = colour_maps(view)
    for row in range(len(own_N33)):
        mapped = pixels_P3 @ own_N33[row].T + pixels_P3.mean(axis=0) @ mean_N33[row].T
        assert mapped == pytest.approx(step_by_step(pixels_P3, view, row), abs=1e-3)


def test_nothing_changes_where_nothing_was_drawn():
    view = views_of(RECIPE, 0, 500)
    changes, own_N33, mean_N33 = colour_maps(view)
    still = ~view.jitter & ~view.grey
    assert still.any() and (changes == ~still).all()
    assert (own_N33[still] == np.eye(3)).all() and (mean_N33[still] == 0).all()


def test_a_map_is_marked_as_a_change_wherever_it_is_one():
    view = views_of(PAIRS["moco-v1"][0], 1, 100)
    changes, own_N33, _ = colour_maps(view)
    assert changes.all() and not (own_N33 == np.eye(3)).all(axis=(1, 2)).any()


@pytest.mark.parametrize("turns", [0.0, 0.1, -0.4, 0.5])
def test_turning_the_hue_leaves_grey_grey(turns):
    rotation = hue_rotation(np.array([[[turns]]]))[0]
    assert rotation @ np.ones(3) == pytest.approx(np.ones(3))
    assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12)


def test_a_third_of_the_hue_circle_sends_red_to_green_to_blue_as_in_hsv():
    rotation = hue_rotation(np.array([[[1 / 3]]]))[0]
    assert rotation @ [1, 0, 0] == pytest.approx([0, 1, 0], abs=1e-12)
    assert rotation @ [0, 1, 0] == pytest.approx([0, 0, 1], abs=1e-12)


def test_grey_first_and_grey_last_differ_only_by_what_hue_does_to_grey():
    view = views_of(replace(RECIPE, jitter=(0.4, 0.4, 0.4, 0.0), grey_probability=1.0), 2)
    _, last_N33, _ = colour_maps(view)
    _, first_N33, _ = colour_maps(replace(view, grey_first=True))
    assert last_N33 == pytest.approx(first_N33, abs=1e-6)  # linear in grey: these commute
