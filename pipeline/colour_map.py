"""Colour jitter and greyscale as one linear map for each sample.

Brightness, contrast about the picture's own grey mean, saturation and greyscale are linear in the
picture x and its mean colour m, so any number of them in any order is ``A x + B m`` with two 3 x 3
matrices, worked out on the host. What this leaves out is that torchvision rounds and clips to
[0, 255] after each operation, this map once at the end.

Differs from torchvision: hue. It turns the colour circle in HSV, which is not linear; here colours
are turned about the grey axis, which is the linear map nearest to it on uniformly drawn colours.
(DALI's own hue turns in YIQ and is further away.) ``tests/test_dali_views.py`` has the figures.

Letters in names: N samples.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.view_recipe import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    Bools,
    Floats,
    ViewParameters,
)

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow and torchvision
TO_GREY = np.tile(GREY_WEIGHTS, (3, 1))
IDENTITY = np.eye(3)

Matrices = NDArray[np.float32]


def colour_maps(parameters: ViewParameters) -> tuple[Bools, Matrices, Matrices]:
    """``(changes_N, A_N33, B_N33)``: view = A x + B mean(x), identity where nothing changes."""
    count = len(parameters.grey)
    own = np.tile(IDENTITY, (count, 1, 1))
    mean = np.zeros((count, 3, 3))
    grey = np.where(parameters.grey[:, None, None], TO_GREY, IDENTITY)
    if parameters.grey_first:
        own = grey @ own
    for place in range(parameters.jitter_order.shape[1]):
        operation = parameters.jitter_order[:, place]
        factor = np.take_along_axis(parameters.factors, operation[:, None], axis=1)[:, 0]
        matrix, about_mean = _operation(operation, factor)
        own, mean = matrix @ own, matrix @ mean + about_mean @ (own + mean)
    if not parameters.grey_first:
        own, mean = grey @ own, grey @ mean
    changes = parameters.jitter | parameters.grey
    return changes, own.astype(np.float32), mean.astype(np.float32)


def _operation(operation: NDArray[np.int64], factor: Floats) -> tuple[Floats, Floats]:
    """The matrix on the picture, and that on the mean colour it has just before."""
    factor = factor[:, None, None]
    kind = operation[:, None, None]
    scaled = factor * IDENTITY
    matrix = np.select(
        [kind == BRIGHTNESS, kind == CONTRAST, kind == SATURATION],
        [scaled, scaled, scaled + (1 - factor) * TO_GREY],
        hue_rotation(factor),
    )
    about_mean = np.where(kind == CONTRAST, (1 - factor) * TO_GREY, 0.0)
    return matrix, about_mean


def hue_rotation(turns: Floats) -> Floats:
    """Rotation of RGB space about its grey axis, by a share of the full circle (``[N, 1, 1]``)."""
    angle = 2 * np.pi * turns
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    onto_grey = np.full((3, 3), 1 / 3)
    turned: Floats = np.cos(angle) * (IDENTITY - onto_grey) + onto_grey + np.sin(angle) * cross
    return turned
